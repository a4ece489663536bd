"""Runs requests: plans what rows share, climbs, and decodes.

What is computed once: each distinct prompt (the trunk), up to the boundary where a row's first edit is; the tokens
before the first edited one (the prefix), of which only keys and values are kept. What is not computed: blocks above the
last thing that is read, and logits nobody asked for.
"""

from __future__ import annotations

import itertools
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hookbook import selfcheck
from hookbook.climb import Climb, take
from hookbook.errors import EditError, TokenError
from hookbook.request import Each, Edit, Reading, Reply, Request, Row, TokenReadout, position_of
from hookbook.sites import Site
from hookbook.tokens import Position, resolve

if TYPE_CHECKING:
    from hookbook.adapter import Adapter

BUDGET_BYTES = int(os.environ.get("HOOKBOOK_BUDGET_BYTES", str(2 << 30)))
"""About how much memory the forks of one climb may take; a longer sweep is cut into several climbs."""


@torch.no_grad()
def run(adapter: Adapter, request: Request, *, progress: bool | None = None) -> Reply:
    """Run a request. Every check that can be made before the first forward pass is made before it.

    Args:
        adapter: The model.
        request: What to run.
        progress: Show a progress bar; None: only for work of several climbs or a long decoding.
    """
    sites = _check(adapter, request)
    selfcheck.check(adapter, sites)
    parts = _split(adapter, request)
    steps = len(parts) * (1 + request.generate)
    with tqdm(total=steps, desc="climb", leave=False, disable=not (steps > 8 if progress is None else progress)) as bar:
        return _merge([_run_part(adapter, part, bar) for part in parts], request)


def _check(adapter: Adapter, request: Request) -> set[Site]:
    """Raise for what can be known to be wrong; return the sites that are read or edited."""
    card = adapter.card
    if not request.rows:
        raise EditError("a request without rows", "there is nothing to run", "give at least one row")
    ask = request.readout
    if request.generate < 0 or (ask is not None and ask.k < 0):
        raise TokenError(f"generate={request.generate}, k={0 if ask is None else ask.k}", "less than no tokens", "use 0 or more")
    if ask is not None and ask.tokens is not None:
        wanted = ask.tokens
        if wanted.dim() != 2 or len(wanted) != len(request.rows) or wanted.is_floating_point():
            raise TokenError(f"wanted tokens of shape {list(wanted.shape)} for {len(request.rows)} rows", "each row has its own", "give [row, m] of token ids")
        if wanted.numel() and not (0 <= int(wanted.min()) and int(wanted.max()) < card.d_vocab):
            raise TokenError("a wanted token id outside the vocabulary", f"this model has ids 0 to {card.d_vocab - 1}", "use one of them")
    for tokens in request.prompts:
        if max(tokens.ids) >= card.d_vocab:
            raise TokenError(f"token id {max(tokens.ids)}", f"this model has ids 0 to {card.d_vocab - 1}", "use a tokenizer of this model")
        if card.n_ctx and len(tokens) + request.generate > card.n_ctx:
            raise TokenError(
                f"{len(tokens)} tokens and {request.generate} to decode", f"this model reads at most {card.n_ctx}", "shorten the prompt or decode less"
            )
    for read in [*request.reads, *([request.readout] if request.readout is not None else [])]:
        if isinstance(read.position, Each) and len(read.position.positions) != len(request.rows):
            raise TokenError(f"{len(read.position.positions)} positions for {len(request.rows)} rows", "Each has one for every row", "make the numbers agree")
    needed = {read.site for read in request.reads}
    top = _top(request, card.n_layers)
    for i, row in enumerate(request.rows):
        if not 0 <= row.prompt < len(request.prompts):
            raise EditError(f"a row of prompt {row.prompt}", f"the request has prompts 0 to {len(request.prompts) - 1}")
        tokens = request.prompts[row.prompt]
        for edit in row.edits:
            edit.check(card.d_model, card.n_layers, len(resolve(edit.position, tokens)))
            if card.itemsize < 4 and isinstance(edit.value, Tensor) and not bool(torch.isfinite(edit.value.to(getattr(torch, card.dtype))).all()):
                raise EditError(
                    f"a vector at {edit.site} that overflows {card.dtype}", "it would become infinite", "scale it down, or load the model in float32"
                )
            needed.add(edit.site)
            if edit.site.order > top:
                raise EditError(
                    f"the edit at {edit.site} would never fire",
                    "it lies above everything that is read",
                    "read a later site or the next token, or drop the edit",
                )
        seen = [max(resolve(position_of(read.position, i), tokens)) for read in request.reads]
        if ask is not None:
            said = resolve(position_of(ask.position, i), tokens)
            if len(said) != 1:
                raise TokenError("a readout after several tokens", "it is about the next token after one", "give one position")
            seen += said
        if row.edits and not request.generate and all(min(resolve(edit.position, tokens)) > max(seen) for edit in row.edits):
            raise EditError(
                "an edit that changes nothing", f"it is after token {max(seen)}, the last that is read", "read a later token, or edit an earlier one"
            )
    for site in needed:
        adapter.require(site.check(card.n_layers))
    return needed


def _top(request: Request, n_layers: int) -> tuple[int, int]:
    if request.readout is not None or request.generate:
        return (n_layers, 0)
    return max((read.site.order for read in request.reads), default=(-1, 0))


def _split(adapter: Adapter, request: Request) -> list[Request]:
    """Cut the rows into parts that fit the budget; rows of one prompt stay together where they can."""
    card = adapter.card
    longest = max(len(request.prompts[row.prompt]) for row in request.rows)
    width = longest - min((min(resolve(e.position, request.prompts[r.prompt])) for r in request.rows for e in r.edits), default=0)
    per_token = 6 * card.d_model + 3 * card.d_mlp + 2 * card.n_heads * longest + 4 * card.n_kv_heads * card.d_head
    kept = 2 * card.n_kv_heads * card.d_head * (longest + request.generate)
    per_row = (width * per_token + kept * (2 * card.n_layers if request.generate else 2)) * card.itemsize
    per_prompt = (longest * per_token + 2 * card.n_kv_heads * card.d_head * longest * card.n_layers) * card.itemsize
    cuts, used, taken = [0], set(), 0
    for i, row in enumerate(request.rows):
        cost = per_row + (0 if row.prompt in used else per_prompt)
        if i > cuts[-1] and taken + cost > BUDGET_BYTES:
            cuts.append(i)
            used, taken, cost = set(), 0, per_row + per_prompt
        used.add(row.prompt)
        taken += cost
    parts = []
    for part in itertools.starmap(slice, itertools.pairwise([*cuts, len(request.rows)])):
        used = sorted({row.prompt for row in request.rows[part]})
        renumber = {prompt: i for i, prompt in enumerate(used)}
        readout = request.readout
        if readout is not None:
            wanted = None if readout.tokens is None else readout.tokens[part]
            readout = replace(readout, tokens=wanted, position=_cut(readout.position, part))
        parts.append(
            replace(
                request,
                prompts=[request.prompts[i] for i in used],
                rows=[Row(renumber[row.prompt], row.edits) for row in request.rows[part]],
                reads=[replace(read, position=_cut(read.position, part)) for read in request.reads],
                readout=readout,
            )
        )
    return parts


def _cut(position: Position | Each, rows: slice) -> Position | Each:
    return Each(position.positions[rows]) if isinstance(position, Each) else position


def _merge(replies: list[Reply], request: Request) -> Reply:
    if len(replies) == 1:
        return replies[0]
    starts = list(itertools.accumulate((r.cost["rows"] for r in replies), initial=0))[:-1]
    readings = tuple(
        Reading(
            read.site,
            torch.cat([r.readings[i].values for r in replies]),
            torch.cat([r.readings[i].rows + start for r, start in zip(replies, starts, strict=True)]),
            torch.cat([r.readings[i].positions for r in replies]),
        )
        for i, read in enumerate(request.reads)
    )
    readouts = [r.readout for r in replies if r.readout is not None]
    cost = {key: sum(r.cost[key] for r in replies) for key in replies[0].cost}
    return Reply(readings, TokenReadout.cat(readouts) if readouts else None, sum((r.generated for r in replies), ()), cost)


@dataclass
class _Layout:
    """Where rows are in the batch: prompts first, then forks in the order in which they join."""

    tokens: Tensor
    """`[prompt, pos]`, padded on the left."""
    mask: Tensor | None
    """`[prompt, pos]` of 0 and 1; None if nothing is padded."""
    pads: list[int]
    split: int
    """Tokens before this column are the same in every row of a prompt."""
    batch_row: list[int]
    joins: list[tuple[int, int]]
    """The place in the pass where each row leaves the trunk; rows without edits never do."""
    trunk: Tensor
    """The trunk row under each row of the full batch."""
    last: int


_NEVER = (1 << 30, 0)


def _join_place(site: Site) -> tuple[int, int]:
    """Where a site is in the pass, and so where a row that is first edited there leaves: boundary, and 0 or 1 for before or after it is crossed."""
    return (site.layer + 1, 0) if site.name == "resid_post" else (site.layer, 1)


def _lay_out(adapter: Adapter, request: Request) -> _Layout:
    n = max(len(tokens) for tokens in request.prompts)
    pads = [n - len(tokens) for tokens in request.prompts]
    ids = torch.tensor([[adapter.pad_id] * pad + list(tokens.ids) for pad, tokens in zip(pads, request.prompts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (n - pad) for pad in pads]) if any(pads) else None
    joins = [min((_join_place(edit.site) for edit in row.edits), default=_NEVER) for row in request.rows]
    forks = sorted((i for i, place in enumerate(joins) if place != _NEVER), key=lambda i: joins[i])
    batch_row = [row.prompt for row in request.rows]
    for place, i in enumerate(forks):
        batch_row[i] = len(pads) + place
    columns = [pads[row.prompt] + i for row in request.rows for edit in row.edits for i in resolve(edit.position, request.prompts[row.prompt])]
    trunk = torch.tensor([*range(len(pads)), *(request.rows[i].prompt for i in forks)])
    if request.readout is not None or request.generate:
        last = adapter.card.n_layers
    else:
        last = max((read.site.layer + (read.site.name != "resid_pre") for read in request.reads), default=0)
    return _Layout(ids, mask, pads, min(columns, default=0) if last else 0, batch_row, joins, trunk, last)


def _run_part(adapter: Adapter, request: Request, bar: Any) -> Reply:
    layout = _lay_out(adapter, request)
    edits, n_groups = _edit_groups(request, layout)
    reads, places = _read_groups(adapter, request, layout)
    n_prompts, split = len(layout.pads), layout.split
    forks: dict[int, list[list[int]]] = defaultdict(lambda: [[], []])
    for place, prompt in zip(sorted(p for p in layout.joins if p != _NEVER), layout.trunk[n_prompts:].tolist(), strict=True):
        forks[place[0]][place[1]].append(prompt)

    # rows of one token, of one prompt, share batch rows: about as many as the prefix is long keeps memory smallest
    alone = split and n_prompts == 1 and layout.tokens.shape[1] - split == 1 and len(layout.trunk) > 1 and not request.generate
    pack = min(max(split, 8), 64) if alone and adapter.packs and selfcheck.packs(adapter) else 1

    def climb(part: int, forks: dict, edits: dict) -> Climb:
        pads = None if layout.mask is None else layout.mask[:, split:] == 0 if part else layout.mask[:, :split] == 0
        return Climb(n_prompts, forks, edits, {key: groups[part] for key, groups in reads.items() if groups[part]}, layout.last, pads, pack if part else 1)

    kept, climbs = None, []
    if split:
        prefix = climb(0, {}, {})
        mask = None if layout.mask is None else layout.mask[:, :split]
        kept = adapter.forward(layout.tokens[:, :split], mask, prefix, keep=True)
        climbs.append(prefix)
    body = climb(1, {b: tuple(torch.tensor(rows, dtype=torch.long) for rows in pair) for b, pair in forks.items()}, edits)
    kept = adapter.forward(layout.tokens[:, split:], layout.mask, body, kept=kept, keep=request.generate > 0)
    climbs.append(body)
    bar.update()
    if body.fired != n_groups:
        raise EditError(
            "an edit never fired", f"{n_groups - body.fired} of {n_groups} groups of edits were not reached", "report this: the adapter did not visit a site"
        )

    found = {slot: value for c in climbs for slot, value in c.found.items()}
    readings = tuple(_gather(read.site, i, places[i], found) for i, read in enumerate(request.reads))
    cost = {"rows": len(request.rows), "passes": len(climbs), "token_layers": sum(c.token_layers for c in climbs), "unembedded": 0}
    readout, generated = None, ()
    if request.readout is not None:
        ask = request.readout
        resid = _gather(Site("resid_post", adapter.card.n_layers - 1), "readout", places["readout"], found).values
        readout = adapter.readout(resid, k=ask.k, tokens=ask.tokens, logits=ask.logits)
        cost["unembedded"] += len(resid)
    if request.generate:
        resid = _gather(Site("resid_post", adapter.card.n_layers - 1), "next", places["next"], found).values
        generated = _decode(adapter, request, layout, body, kept, resid, bar, cost)
    return Reply(readings, readout, generated, cost)


def _edit_groups(request: Request, layout: _Layout) -> tuple[dict, int]:
    """Edits by site, and among those by operation, in an order that keeps each row's own."""
    found: dict[tuple[str, int], dict[tuple[int, str], list]] = defaultdict(lambda: defaultdict(list))
    for i, row in enumerate(request.rows):
        nth: dict[Site, int] = defaultdict(int)
        for edit in row.edits:
            positions = resolve(edit.position, request.prompts[row.prompt])
            columns = [layout.pads[row.prompt] + p - layout.split for p in positions]
            found[edit.site.name, edit.site.layer][nth[edit.site], edit.op].append((layout.batch_row[i], columns, edit))
            nth[edit.site] += 1
    edits = {site: [_edit_group(op, items) for (_, op), items in sorted(groups.items())] for site, groups in found.items()}
    return edits, sum(map(len, edits.values()))


def _edit_group(op: str, items: Sequence[tuple[int, list[int], Edit]]) -> dict:
    rows = torch.tensor([row for row, columns, _ in items for _ in columns])
    cols = torch.tensor([column for _, columns, _ in items for column in columns])
    to = torch.tensor([edit.to for _, columns, edit in items for _ in columns], dtype=torch.float64)
    if op == "scale":
        value = torch.tensor([edit.value for _, columns, edit in items for _ in columns], dtype=torch.float64)
    else:
        value = torch.cat([edit.value.expand(len(columns), -1) for _, columns, edit in items])  # type: ignore[union-attr]
    return {"rows": rows, "cols": cols, "op": op, "value": value, "to": to}


def _read_groups(adapter: Adapter, request: Request, layout: _Layout) -> tuple[dict, dict]:
    """Reads by site, split into those of the prefix and those of the rest, and where each value belongs."""
    n_layers = adapter.card.n_layers
    wanted: list[tuple[Any, Site, Any]] = [(i, read.site, read.position) for i, read in enumerate(request.reads)]
    if request.readout is not None:
        wanted.append(("readout", Site("resid_post", n_layers - 1), request.readout.position))
    if request.generate:
        wanted.append(("next", Site("resid_post", n_layers - 1), -1))
    reads: dict[tuple[str, int], tuple[list, list]] = defaultdict(lambda: ([], []))
    places: dict[Any, list[list[tuple[int, int]]]] = {}
    for slot, site, position in wanted:
        parts: tuple[list, list] = ([], [])  # (batch row, column) of the prefix, of the rest
        place: list[list[tuple[int, int]]] = [[], []]  # (row, position) alike
        here = _join_place(site)
        for i, row in enumerate(request.rows):
            # a row that has not left the trunk yet, or a token before its first edit, is the trunk's
            batch_row = layout.batch_row[i] if layout.joins[i] <= here else row.prompt
            for p in resolve(position_of(position, i), request.prompts[row.prompt]):
                column = layout.pads[row.prompt] + p
                late = column >= layout.split
                parts[late].append((batch_row, column - layout.split) if late else (row.prompt, column))
                place[late].append((i, p))
        for late in (0, 1):
            if parts[late]:
                rows, cols = torch.tensor(parts[late]).unbind(1)
                reads[site.name, site.layer][late].append(((slot, late), rows, cols))
        places[slot] = place
    return reads, places


def _gather(site: Site, slot: Any, place: list[list[tuple[int, int]]], found: dict) -> Reading:
    values = torch.cat([found[slot, late] for late in (0, 1) if place[late]])
    rows, positions = torch.tensor(place[0] + place[1]).unbind(1)
    if place[0] and place[1]:
        order = torch.argsort(rows * (1 << 32) + positions)
        values, rows, positions = take(values, order), rows[order], positions[order]
    return Reading(site, values, rows, positions)


def _decode(adapter: Adapter, request: Request, layout: _Layout, body: Climb, kept: Any, resid: Tensor, bar: Any, cost: dict) -> tuple:
    """Greedy decoding of all rows together, each from its own keys and values."""
    rows = torch.tensor(layout.batch_row)
    for layer, n in enumerate(body.rows_at):  # in place: a second copy of all keys and values would be the peak
        kept[layer] = tuple(take(t, torch.where(rows < n, rows, layout.trunk[rows])) for t in kept[layer])
    prompts = torch.tensor([row.prompt for row in request.rows])
    mask = None if layout.mask is None else take(layout.mask, prompts)
    out: list[list[int]] = [[] for _ in request.rows]
    done = [False] * len(out)
    n_layers = adapter.card.n_layers
    for step in range(request.generate):
        cost["unembedded"] += len(resid)
        chosen = adapter.readout(resid, k=1).topk_ids[:, 0]
        for i, token in enumerate(chosen.tolist()):
            done[i] = done[i] or token in adapter.eos_ids
            if not done[i]:
                out[i].append(token)
        bar.update()
        if step + 1 == request.generate or all(done):
            bar.update(request.generate - step - 1)
            break
        if mask is not None:
            mask = torch.cat([mask, torch.ones(len(out), 1, dtype=mask.dtype)], 1)
        everyone = torch.arange(len(out))
        read = {("resid_post", n_layers - 1): [("next", everyone, torch.zeros_like(everyone))]}
        climb = Climb(len(out), {}, {}, read, n_layers)
        kept = adapter.forward(chosen[:, None], mask, climb, kept=kept, keep=True)
        resid = climb.found["next"]
        cost["passes"] += 1
        cost["token_layers"] += climb.token_layers
    return tuple(tuple(ids) for ids in out)
