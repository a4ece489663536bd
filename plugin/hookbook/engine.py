"""Runs requests: takes planned climbs through the model, collects what was asked for, and decodes."""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hookbook import planning, selfcheck
from hookbook.checkpoint import Checkpoint
from hookbook.climb import Climb, apply_edit, take
from hookbook.errors import EditError
from hookbook.planning import Layout, Part, join_place
from hookbook.request import Edit, Reading, Reply, Request, Sampling, TokenReadout
from hookbook.sites import Site
from hookbook.tokens import resolve

if TYPE_CHECKING:
    from hookbook.adapter import Adapter


def run(adapter: Adapter, request: Request, *, progress: bool | None = None, checkpoint: str | os.PathLike[str] | None = None) -> Reply:
    """Run a request. Every check that can be made before the first forward pass is made before it.

    Args:
        adapter: The model.
        request: What to run.
        progress: Show a progress bar; None: only for work of several climbs or a long decoding.
        checkpoint: A folder that keeps each climb that is finished; a repeated call runs only what is missing there.
    """
    parts = planning.plan(adapter, request)
    if checkpoint is not None and request.grad:
        raise EditError("a checkpoint of a request with gradients", "a file keeps values, not their graph", "leave one of them out")
    if (account := planning.account()) is not None:
        account.add(parts)
        return _blank(request, parts)
    sites = {edit.site for row in request.rows for edit in row.edits} | {read.site for read in request.reads}
    selfcheck.check(adapter, sites, knock_out=any(edit.op == "knock_out" for row in request.rows for edit in row.edits))
    steps = len(parts) * (1 + request.generate)
    quiet = not (steps > 8 if progress is None else progress)
    with torch.set_grad_enabled(request.grad), tqdm(total=steps, desc="climb", leave=False, disable=quiet) as bar:
        store = None if checkpoint is None else Checkpoint(checkpoint, adapter)
        done = []
        for part in parts:
            reply = None if store is None else store.load(part)
            if reply is None:
                reply = _run_part(adapter, part, bar)
                if store is not None:
                    store.save(part, reply)
            else:
                bar.update(1 + request.generate)
            done.append((part, reply))
        return merge(done, request)


def _blank(request: Request, parts: Sequence[Part]) -> Reply:
    """A reply of zeros, in the shapes of the real one."""
    card, ask, n = parts[0].card, request.readout, len(request.rows)
    rows = sorted((row for part in parts for row in part.rows), key=lambda row: row.number)
    longest = max(part.n for part in parts)
    readings = []
    for i, read in enumerate(request.reads):
        at = torch.tensor([(row.number, p) for row in rows for p in row.reads[i]])
        pattern = read.site.name == "attn_pattern"
        shape = ([] if read.site.unit is not None else [card.n_heads]) + [longest] if pattern else [read.site.width(card)]
        readings.append(Reading(read.site, torch.zeros(len(at), *shape, dtype=getattr(torch, card.dtype)), at[:, 0], at[:, 1]))
    readout = None
    if ask is not None:
        m = 0 if ask.tokens is None else ask.tokens.shape[1]
        readout = blank_readout(n, ask.k, m, card.d_vocab if ask.logits else 0)
    return Reply(
        tuple(readings),
        readout,
        ((),) * n if request.generate else (),
        ((),) * n if request.generate else (),
        {"climbs": 0, "passes": 0, "token_layers": 0, "unembedded": 0},
    )


def blank_readout(n: int, k: int, m: int, d_vocab: int = 0) -> TokenReadout:
    """A readout of zeros."""
    zero = torch.zeros(())
    return TokenReadout(torch.zeros(n, k, dtype=torch.long), torch.zeros(n, k), torch.zeros(n, m), zero.expand(n, d_vocab) if d_vocab else None)


def merge(done: Sequence[tuple[Part, Reply]], request: Request) -> Reply:
    """The replies of the parts as one, rows in the request's order."""
    replies = [reply for _, reply in done]
    numbers = torch.tensor([row.number for part, _ in done for row in part.rows])
    order = torch.argsort(numbers)
    if len(replies) == 1 and torch.equal(numbers, torch.arange(len(numbers))):
        return replies[0]
    starts = torch.tensor([0] + [len(part.rows) for part, _ in done]).cumsum(0).tolist()
    readings = []
    for i, read in enumerate(request.reads):
        found = [reply.readings[i] for reply in replies]
        rows = torch.cat([numbers[reading.rows + start] for reading, start in zip(found, starts, strict=False)])
        back = torch.argsort(rows, stable=True)
        longest = max(reading.values.shape[-1] for reading in found)  # of a pattern, the keys of the longest prompt
        values = torch.cat([torch.nn.functional.pad(reading.values, (0, longest - reading.values.shape[-1])) for reading in found])
        readings.append(Reading(read.site, take(values, back), rows[back], torch.cat([reading.positions for reading in found])[back]))
    readouts = [reply.readout for reply in replies if reply.readout is not None]
    generated = [pair for reply in replies for pair in zip(reply.generated, reply.logprobs, strict=True)]
    generated = [generated[i] for i in order.tolist()] if generated else []
    cost = {key: sum(reply.cost[key] for reply in replies) for key in replies[0].cost}
    return Reply(
        tuple(readings),
        TokenReadout.cat(readouts)[order] if readouts else None,
        tuple(ids for ids, _ in generated),
        tuple(logprobs for _, logprobs in generated),
        cost,
    )


def _run_part(adapter: Adapter, part: Part, bar: Any) -> Reply:
    request, n_prompts, split, top = part.request, len(part.prompts), part.split, adapter.card.n_layers - 1
    items = [
        (part.layout.batch_row[i], [part.pads[part.trunk_of[i]] + p - split for p in positions], edit, part.pads[part.trunk_of[i]])
        for i, row in enumerate(part.rows)
        for edit, positions in row.edits
    ]
    edits = edit_groups(adapter, items, lambda item, column: _keys(part, part.layout.trunk[item[0]], item[2], column + split))
    collect = _Collector(part, top)
    pack = part.pack if part.pack > 1 and selfcheck.packs(adapter) else 1
    ids = torch.tensor([[adapter.pad_id] * pad + list(tokens.ids) for pad, tokens in zip(part.pads, part.prompts, strict=True)])
    mask = part.mask
    pads = None if mask is None else mask == 0

    kept, climbs = None, []
    if split:
        climb = Climb(n_prompts, {}, {}, collect.reads(0), part.last, None if pads is None else pads[:, :split])
        with torch.no_grad():
            kept = adapter.forward(ids[:, :split], None if mask is None else mask[:, :split], climb, keep=True)
        climbs.append(climb)
    body = Climb(n_prompts, _forks(part.layout), edits, collect.reads(1), part.last, None if pads is None else pads[:, split:], pack)
    kept = adapter.forward(ids[:, split:], mask, body, kept=kept, keep=request.generate > 0)
    climbs.append(body)
    bar.update()
    n_groups = sum(map(len, edits.values()))
    if body.fired != n_groups:
        raise EditError(
            "an edit never fired", f"{n_groups - body.fired} of {n_groups} groups of edits were not reached", "report this: the adapter did not visit a site"
        )

    found = {slot: value for climb in climbs for slot, value in climb.found.items()}
    del climbs
    readings = tuple(_reading(adapter, part, collect, i, found) for i in range(len(request.reads)))
    cost = {"climbs": 1, "passes": 1 + (split > 0), "token_layers": part.prompt_token_layers, "unembedded": 0}
    readout, generated, logprobs = None, (), ()
    if request.readout is not None:
        ask = request.readout
        normed = _normed(adapter, part, collect.gather("readout", found))
        wanted = None if ask.tokens is None else ask.tokens[[row.number for row in part.rows]]
        readout = adapter.readout(normed.values, k=ask.k, tokens=wanted, logits=ask.logits, normed=True)
        cost["unembedded"] += len(part.rows)
    if request.generate:
        normed = _normed(adapter, part, collect.gather("next", found)).values
        found.clear()
        generated, logprobs = _decode(adapter, part, kept, normed, bar, cost)
    return Reply(readings, readout, generated, logprobs, cost)


def edit_groups(adapter: Adapter, items: Iterable[tuple[int, list[int], Edit, int]], keys: Any) -> dict:
    """Edits by site, and among those by operation, in an order that keeps each row's own.

    Args:
        adapter: The model.
        items: Batch row, columns, edit and padding of the row.
        keys: From an item and one of its columns to the columns of its keys, for `attn_pattern`.
    """
    found: dict[tuple, dict[tuple, list]] = defaultdict(lambda: defaultdict(list))
    nth: dict[tuple, int] = defaultdict(int)
    for item in items:
        row, _, edit, _ = item
        site = edit.site
        pattern = site.name == "attn_pattern"
        found[site.name, site.layer][nth[row, site.whole], edit.op, site.unit is not None and not pattern].append(item)
        nth[row, site.whole] += 1
    return {
        site: [
            (_pattern_group(adapter, key[1], group, keys) if site[0] == "attn_pattern" else _group(adapter, key[1], group))
            for key, group in sorted(groups.items())
        ]
        for site, groups in found.items()
    }


def _group(adapter: Adapter, op: str, items: Sequence[tuple[int, list[int], Edit, int]]) -> dict:
    edits = [edit for _, columns, edit, _ in items for _ in columns]
    group: dict[str, Any] = {
        "op": op,
        "rows": torch.tensor([row for row, columns, *_ in items for _ in columns]),
        "cols": torch.tensor([column for _, columns, *_ in items for column in columns]),
    }
    site = edits[0].site
    if site.unit is not None:
        group |= {"units": torch.tensor([edit.site.unit for edit in edits]), "n_units": site.units(adapter.card)[0]}
    if op == "scale":
        group["value"] = torch.tensor([edit.value for edit in edits], dtype=torch.float64)
    else:
        values = [edit.value if isinstance(edit.value, Tensor) else torch.tensor(edit.value, dtype=torch.float64) for _, _, edit, _ in items]
        if all(value is values[0] for value in values) and values[0].dim() < 2:
            group["value"] = values[0].expand(len(edits), site.width(adapter.card))
        else:
            width = site.width(adapter.card)
            group["value"] = torch.cat([value.expand(len(columns), width) for value, (_, columns, *_) in zip(values, items, strict=True)])
    if op == "clamp":
        group["to"] = torch.tensor([edit.to for edit in edits], dtype=torch.float64)
    return group


def _pattern_group(adapter: Adapter, op: str, items: Sequence[tuple[int, list[int], Edit, int]], keys: Any) -> dict:
    lines, entries, columns_of_keys, values = [], [], [], []
    for item in items:
        row, columns, edit, _ = item
        heads = range(adapter.card.n_heads) if edit.site.unit is None else [edit.site.unit]
        for head, column in itertools.product(heads, columns):
            chosen = keys(item, column)
            entries += [len(lines)] * len(chosen)
            columns_of_keys += chosen
            values += [edit.value] * len(chosen)
            lines.append((row, head, column))
    rows, heads, cols = torch.tensor(lines).unbind(1)
    return {
        "op": op, "rows": rows, "heads": heads, "cols": cols,
        "entries": torch.tensor(entries), "keys": torch.tensor(columns_of_keys), "value": torch.tensor(values, dtype=torch.float64),
    }  # fmt: skip


def _keys(part: Part, trunk_row: int, edit: Edit, column: int) -> list[int]:
    """The columns of the tokens to which the token in `column` attends under an edit: those that are not after it."""
    pad = part.pads[trunk_row]
    if edit.keys is None:
        return list(range(pad, column + 1))
    return [pad + key for key in resolve(edit.keys, part.prompts[trunk_row]) if pad + key <= column]


class _Collector:
    """Which values of a climb are wanted, and where each belongs."""

    def __init__(self, part: Part, top: int) -> None:
        self.part = part
        wanted: list[tuple[Any, Site, list[list[int]]]] = [(i, read.site, [row.reads[i] for row in part.rows]) for i, read in enumerate(part.request.reads)]
        if part.request.readout is not None:
            wanted.append(("readout", Site("final_norm"), [[row.says] for row in part.rows]))  # type: ignore[list-item]
        if part.request.generate:
            wanted.append(("next", Site("final_norm"), [[len(part.prompts[t]) - 1] for t in part.trunk_of]))
        self.by_site: dict[tuple, tuple[list, list]] = defaultdict(lambda: ([], []))
        self.places: dict[Any, tuple[list, list]] = {}
        for slot, site, positions in wanted:
            source = Site("resid_post", top) if site.name == "final_norm" else site  # the norm is applied to what is wanted
            here = join_place(source)
            at: tuple[list, list] = ([], [])  # (row, column) of the prefix, of the rest
            place: tuple[list, list] = ([], [])  # (row of the part, position, place among the row's positions) alike
            for i, (row, chosen) in enumerate(zip(part.rows, positions, strict=True)):
                trunk = part.trunk_of[i]
                # a row that has not left the trunk yet, or a token before its first edit, is the trunk's
                batch_row = part.layout.batch_row[i] if row.join <= here else trunk
                for nth, p in enumerate(chosen):
                    column = part.pads[trunk] + p
                    late = column >= part.split
                    at[late].append((batch_row, column - part.split) if late else (trunk, column))
                    place[late].append((i, p, nth))
            for late in (0, 1):
                if at[late]:
                    rows, cols = torch.tensor(at[late]).unbind(1)
                    self.by_site[source.name, source.layer][late].append(((slot, late), rows, cols))
            self.places[slot] = place

    def reads(self, late: int) -> dict:
        """The reads of the prefix, or of the rest, as a climb takes them."""
        return {site: both[late] for site, both in self.by_site.items() if both[late]}

    def gather(self, slot: Any, found: dict) -> Reading:
        """What was found for one read, rows ascending, positions in each in the order asked for."""
        place = self.places[slot]
        parts = [found.pop((slot, late)) for late in (0, 1) if place[late]]
        longest = max(values.shape[-1] for values in parts)  # of a pattern, the prefix has fewer keys
        values = torch.cat([torch.nn.functional.pad(v, (0, longest - v.shape[-1])) for v in parts]) if len(parts) > 1 else parts[0]
        rows, positions, nth = torch.tensor(place[0] + place[1]).unbind(1)
        if place[0] and place[1]:
            order = torch.argsort(rows * (1 << 32) + nth)
            values, rows, positions = take(values, order), rows[order], positions[order]
        return Reading(Site("final_norm"), values, rows, positions)


def _reading(adapter: Adapter, part: Part, collect: _Collector, i: int, found: dict) -> Reading:
    site, got = part.request.reads[i].site, collect.gather(i, found)
    if site.name == "final_norm":
        return _normed(adapter, part, got)
    values = got.values
    if site.name == "attn_pattern":
        pads = torch.tensor([part.pads[part.trunk_of[row]] for row in got.rows.tolist()])
        columns = pads[:, None] + torch.arange(values.shape[-1])
        index = columns.clamp(max=values.shape[-1] - 1)[:, None].expand(-1, values.shape[1], -1).to(values.device)
        values = values.gather(-1, index) * (columns < values.shape[-1])[:, None].to(values.device)
        values = torch.nn.functional.pad(values, (0, part.n - values.shape[-1]))
    if site.unit is not None:
        units, width = site.units(adapter.card)
        values = values[:, site.unit] if site.name == "attn_pattern" else values.unflatten(-1, (units, width))[:, site.unit]
    return Reading(site, values, got.rows, got.positions)


def _normed(adapter: Adapter, part: Part, got: Reading) -> Reading:
    """The final norm of what was read, under the edits there."""
    values = adapter.final_norm(got.values)
    items = []
    for at, (i, position) in enumerate(zip(got.rows.tolist(), got.positions.tolist(), strict=True)):
        for edit, positions in part.rows[i].finals:
            if position in positions:
                if isinstance(edit.value, Tensor) and edit.value.dim() == 2 and len(edit.value) > 1:
                    edit = Edit(edit.site, edit.value[positions.index(position)], edit.op, to=edit.to)
                items.append((at, [0], edit, 0))
    return Reading(got.site, _apply(adapter, values, items), got.rows, got.positions)


def _apply(adapter: Adapter, values: Tensor, items: list[tuple[int, list[int], Edit, int]]) -> Tensor:
    if not items:
        return values
    values = values.clone()
    for group in edit_groups(adapter, items, None)["final_norm", None]:
        apply_edit(values[:, None], group)
    return values


def _decode(adapter: Adapter, part: Part, kept: Any, normed: Tensor, bar: Any, cost: dict) -> tuple[tuple, tuple]:
    """Decoding of all rows together, each from its own keys and values.

    Each step is a climb that forks: rows of one prompt that said the same so far share a trunk, which they leave where
    they left it in the prompt, or where they were first edited since. Rows that ended are left out.
    """
    request, last = part.request, adapter.card.n_layers
    out: list[list[int]] = [[] for _ in part.rows]
    said: list[list[float]] = [[] for _ in part.rows]
    alive, layout, ends = list(range(len(part.rows))), part.layout, adapter.eos_ids
    joins = {i: row.join for i, row in enumerate(part.rows)}
    choose = _Chooser(request.sampling, request.generate, [row.number for row in part.rows])
    for step in range(request.generate):
        cost["unembedded"] += len(alive)
        chosen, logprobs = choose(adapter, normed, step, alive)
        new = dict(zip(alive, chosen.tolist(), strict=True))
        for i, logprob in zip(alive, logprobs.tolist(), strict=True):
            if new[i] not in ends:
                out[i].append(new[i])
                said[i].append(logprob)
        alive = [i for i in alive if new[i] not in ends]
        bar.update()
        if step + 1 == request.generate or not alive:
            bar.update(request.generate - step - 1)
            break
        acting = [(i, edit) for i in alive for edit in part.rows[i].late if edit.acts_at(len(part.prompts[part.trunk_of[i]]) + step)]
        for i, edit in acting:
            if edit.site.name != "final_norm":
                joins[i] = min(joins[i], join_place(edit.site))
        groups: dict[tuple, list[int]] = defaultdict(list)
        for i in alive:
            groups[part.trunk_of[i], i if joins[i][0] < 0 else tuple(out[i])].append(i)
        before, layout = layout, Layout(list(groups.values()), joins, last)
        for layer in range(last):  # in place: a second copy of all keys and values would be the peak
            rows = [before.at(layer, i) for i in layout.first[: layout.rows_at[layer]]]
            if rows != list(range(before.rows_at[layer])):
                kept[layer] = tuple(take(t, torch.tensor(rows)) for t in kept[layer])
        first = layout.first[: layout.n_trunk]
        mask = part.mask
        if mask is not None:
            mask = torch.cat([mask[[part.trunk_of[i] for i in first]], torch.ones(len(first), step + 1, dtype=mask.dtype)], 1)

        place = {i: k for k, i in enumerate(alive)}
        inside = [(layout.batch_row[i], [0], edit, part.pads[part.trunk_of[i]]) for i, edit in acting if edit.site.name != "final_norm"]
        above = [(place[i], [0], edit, 0) for i, edit in acting if edit.site.name == "final_norm"]
        under = {row: part.trunk_of[i] for i, row in layout.batch_row.items()}
        edits = edit_groups(adapter, inside, lambda item, _, under=under, column=part.n + step: _keys(part, under[item[0]], item[2], column))
        rows = torch.tensor([layout.batch_row[i] for i in alive])
        reads = {("resid_post", last - 1): [("next", rows, torch.zeros_like(rows))]}
        climb = Climb(layout.n_trunk, _forks(layout), edits, reads, last)
        kept = adapter.forward(torch.tensor([[new[i]] for i in first]), mask, climb, kept=kept, keep=True)
        normed = _apply(adapter, adapter.final_norm(climb.found["next"]), above)
        cost["passes"] += 1
        cost["token_layers"] += climb.token_layers
    return tuple(map(tuple, out)), tuple(map(tuple, said))


def _forks(layout: Layout) -> dict[int, tuple[Tensor, ...]]:
    return {boundary: tuple(torch.tensor(rows, dtype=torch.long) for rows in pair) for boundary, pair in layout.forks.items()}


class _Chooser:
    """The next token of every row: the likeliest, or drawn."""

    def __init__(self, sampling: Sampling | None, steps: int, rows: list[int]) -> None:
        self.sampling = sampling
        if sampling is not None:  # a row's numbers are its own, whatever the other rows, the parts and the steps
            seeds = torch.randint(1 << 62, (max(rows) + 1,), generator=torch.Generator().manual_seed(sampling.seed)).tolist()
            self.draws = torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(seeds[row]), dtype=torch.float64) for row in rows])

    def __call__(self, adapter: Adapter, normed: Tensor, step: int, rows: list[int]) -> tuple[Tensor, Tensor]:
        ask = self.sampling
        if ask is None:
            said = adapter.readout(normed, k=1, normed=True)
            return said.topk_ids[:, 0], said.topk_logprobs[:, 0]
        chosen, logprobs = [], []
        draws, some = self.draws[rows, step, None], max(1, planning.LOGITS_BYTES // (16 * adapter.card.d_vocab))
        for start in range(0, len(normed), some):
            logits = adapter.unembed(normed[start : start + some]).double().cpu()
            values, ids = logits.sort(-1, descending=True) if not ask.top_k else logits.topk(min(ask.top_k, logits.shape[-1]), -1)
            probabilities = ((values - values[:, :1]) / ask.temperature).softmax(-1)
            total = probabilities.cumsum(-1)
            allowed = (total - probabilities) < ask.top_p  # the first that reaches top_p is the last
            total = (probabilities * allowed).cumsum(-1)
            draw = draws[start : start + some] * total[:, -1:]
            place = torch.searchsorted(total, draw, right=True).clamp(max=total.shape[-1] - 1)
            chosen.append(ids.gather(-1, place)[:, 0])
            logprobs.append((values.gather(-1, place) - logits.logsumexp(-1, keepdim=True))[:, 0])
        return torch.cat(chosen), torch.cat(logprobs)
