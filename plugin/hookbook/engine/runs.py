"""Runs requests: takes planned climbs through the model, collects what was asked for, and decodes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hookbook import deferred
from hookbook.engine import cost, planning, questions, selfcheck
from hookbook.engine.checkpoint import Checkpoint
from hookbook.engine.checks import join_place
from hookbook.engine.planning import Part
from hookbook.engine.seam import Backend, RemoteBackend
from hookbook.engine.state import using
from hookbook.errors import EditError, Refused
from hookbook.reply import Reading, Reply, TokenReadout
from hookbook.request import Edit, FeatureChange, Request, Sampling
from hookbook.sites import Site
from hookbook.tokens import resolve
from hookbook.travel.climb import Climb
from hookbook.travel.decoding import edited
from hookbook.travel.edits import group_edits, take


def run(backend: Backend, request: Request, *, progress: bool | None = None, checkpoint: str | os.PathLike[str] | None = None) -> Reply:
    """Run a request. Every check that can be made before the first forward pass is made before it.

    Args:
        backend: The model.
        request: What to run.
        progress: Show a progress bar, in tokens times blocks; None: only if it takes longer than two seconds.
        checkpoint: A folder that keeps each climb that is finished; a repeated call runs only what is missing there.
    """
    with using(backend):
        return _checked(backend, request, progress, checkpoint)


def _checked(backend: Backend, request: Request, progress: bool | None, checkpoint: Any) -> Reply:
    if not backend.remote and cost.account() is None:
        request = _here(request)
    parts = planning.plan(backend, request)
    if not backend.remote and cost.account() is None and any(max(part.pack, part.pack_decoding) > 1 for part in parts):
        parts = parts if selfcheck.packs(backend) else planning.plan(backend, request)
    if checkpoint is not None and any(part.apart for part in parts):
        raise EditError("a checkpoint of a model with hooks", "a file cannot tell what they do", "take them off, or leave checkpoint out")
    if checkpoint is not None and request.grad:
        raise EditError("a checkpoint of a request with gradients", "a file keeps values, not their graph", "leave one of them out")
    if checkpoint is not None and backend.remote:
        raise Refused(
            "a checkpoint of a remote run", "it is one job, which is done or not", "submit it: recipe.submit(...), and save the handle"
        )
    if (account := cost.account()) is not None:
        account.add(parts)
        if not backend.remote:
            return _blank(request, parts)
    if isinstance(backend, RemoteBackend) and deferred.current() is None:
        with deferred.recording() as record:
            reply = deferred.settle(_run(backend, request, parts, progress, None), record)
    else:
        reply = _run(backend, request, parts, progress, checkpoint)
    cost.spend(reply.cost)
    return reply


def _here(request: Request) -> Request:
    """A request with its numbers, if some are promises of a model elsewhere."""
    for edit in (edit for row in request.rows for edit in row.edits):
        if isinstance(edit.value, deferred.Deferred):
            object.__setattr__(edit, "value", deferred.here(edit.value))
        elif isinstance(edit.value, FeatureChange) and any(isinstance(x, deferred.Deferred) for x in (edit.value.scale, edit.value.shift)):
            scale, shift = deferred.here((edit.value.scale, edit.value.shift))
            object.__setattr__(edit, "value", replace(edit.value, scale=scale, shift=shift))
    ask = request.readout
    if ask is not None and any(isinstance(x, deferred.Deferred) for x in (ask.tokens, ask.token_logits)):
        tokens, words = deferred.here((ask.tokens, ask.token_logits))
        request = replace(request, readout=replace(ask, tokens=tokens, token_logits=words))
    return request


def _run(backend: Backend, request: Request, parts: list[Part], progress: bool | None, checkpoint: Any) -> Reply:
    sites = {site for row in request.rows for edit in row.edits for site in edit.touches} | {read.site for read in request.reads}
    prompts = list({request.prompts[row.prompt].ids: None for part in parts if part.apart for row in part.rows})
    if not backend.remote:
        backend.fuse(None)  # what is asked of the model is asked of its own attention
    selfcheck.check(backend, sites, any(edit.op == "knock_out" for row in request.rows for edit in row.edits), prompts)
    long = max(part.n for part in parts) + request.generate >= planning.FUSED_FROM
    if long and not (backend.remote or request.grad or parts[0].apart) and selfcheck.fuses(backend):
        backend.fuse(planning.FUSED_FROM)
    work = sum(part.token_layers for part in parts)
    if isinstance(backend, RemoteBackend):
        deferred.tape(backend).progress = progress
    hidden = {"disable": backend.remote or progress is False, "delay": 0 if progress else 2}
    with (
        torch.set_grad_enabled(request.grad),
        tqdm(total=work, desc="climb", unit=" token-layers", unit_scale=True, leave=False, **hidden) as bar,
    ):
        store = None if checkpoint is None else Checkpoint(checkpoint, backend)
        done, logits, kept, end = [], None, None, 0
        if request.readout is not None and request.readout.logits and len(parts) > 1 and not backend.remote and not request.grad:
            logits = torch.empty(
                len(request.rows), backend.card.d_vocab, dtype=torch.promote_types(getattr(torch, backend.card.dtype), torch.float32)
            )
        for part in parts:
            reply, end = None if store is None else store.load(part), end + part.token_layers
            if reply is None:
                part.follows = part.follows and kept is not None  # the climb before may have been on file
                reply, kept = _run_part(backend, part, kept, bar.update)
                if store is not None:
                    store.save(part, reply)
            else:
                kept = None
            bar.update(end - bar.n)  # beside what was done climbs from a file, and rows that ended early
            if (
                logits is not None and reply.readout is not None and reply.readout.logits is not None
            ):  # in place: both parts and whole would be twice the answer
                logits[[row.number for row in part.rows]] = reply.readout.logits
                reply = replace(reply, readout=replace(reply.readout, logits=None))
            done.append((part, reply))
        reply = merge(done, request)
        return reply if logits is None or reply.readout is None else replace(reply, readout=replace(reply.readout, logits=logits))


def _blank(request: Request, parts: Sequence[Part]) -> Reply:
    """A reply of promises that nobody keeps, in the shapes of the real one."""
    tape = deferred.Tape()
    card, ask, n = parts[0].card, request.readout, len(request.rows)
    rows = sorted((row for part in parts for row in part.rows), key=lambda row: row.number)
    longest = max(part.n for part in parts)
    readings = []
    for i, read in enumerate(request.reads):
        at = torch.tensor([(row.number, p) for row in rows for p in row.reads[i]])
        pattern = read.site.name == "attn_pattern"
        shape = ([] if read.site.unit is not None else [card.n_heads]) + [longest] if pattern else [read.site.width(card)]
        readings.append(Reading(read.site, deferred.Deferred.of(tape, (len(at), *shape), getattr(torch, card.dtype)), at[:, 0], at[:, 1]))
    readout = None
    if ask is not None:
        readout = questions.blank_readout(n, ask, card.d_vocab)
    if not request.generate:
        return Reply(tuple(readings), readout, cost=cost.total())
    tokens, logprobs = (deferred.Deferred.of(tape, (n, request.generate), dtype) for dtype in (torch.long, torch.float64))
    return Reply(tuple(readings), readout, tokens, logprobs, cost.total())


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
        positions = torch.cat([reading.positions for reading in found])
        readings.append(Reading(read.site, _sorted(values, back), rows[back], positions[back]))
    readouts = [reply.readout for reply in replies if reply.readout is not None]
    tokens, logprobs = (
        [x for x in column if x is not None] for column in zip(*((reply.tokens, reply.token_logprobs) for reply in replies), strict=True)
    )
    return Reply(
        tuple(readings),
        _sorted(TokenReadout.cat(readouts), order) if readouts else None,
        _sorted(torch.cat(tokens), order) if tokens else None,
        _sorted(torch.cat(logprobs), order) if logprobs else None,
        deferred.later(cost.total, *(reply.cost for reply in replies)),
    )


def _decoded(before: dict[str, int], more: Tensor) -> dict[str, int]:
    return cost.total(before, dict(zip(("passes", "token_layers", "unembedded"), more.tolist(), strict=True)))


def _sorted(x: Any, order: Tensor) -> Any:
    """`x[order]`, without a copy of what is in order."""
    return x if torch.equal(order, torch.arange(len(order))) else x[order]


def _run_part(backend: Backend, part: Part, kept: Any, tick: Callable[[int], Any]) -> tuple[Reply, Any]:
    """A climb's reply, and its prefix if that is kept for the next; `kept` is that of the climb before, if this one follows it."""
    request, n_prompts, split, top = part.request, len(part.prompts), part.split, backend.card.n_layers - 1
    with planning.uncollected():
        edits, collect = group_edits([item for item, _ in _items(backend, part)]), _Collector(part, top)
    ids, mask, climbs = part.ids(backend.pad_id), part.mask, []
    early, pads = (None, None) if mask is None else (mask[:, :split], mask == 0)
    if part.runs_prefix:
        climb = Climb(n_prompts, {}, {}, collect.reads(0), part.last, None if early is None else early == 0, tick=tick)
        with torch.no_grad():
            kept = backend.forward(ids[:, :split], early, climb, keep=1)
        climbs.append(climb)
    lasts = [copy(one) for one in kept] if part.lasts else None  # the climb takes out what it is given
    pads = None if pads is None else pads[:, split:]
    body = Climb(n_prompts, part.layout.joining(), edits, collect.reads(1), part.last, pads, part.pack, tick=tick)
    kept = backend.forward(ids[:, split:], mask, body, kept=kept, keep=request.generate)
    climbs.append(body)
    n_groups = sum(map(len, edits.values()))
    if body.fired != n_groups:
        raise EditError(
            "an edit never fired",
            f"{n_groups - body.fired} of {n_groups} groups of edits were not reached",
            "report this: the backend did not visit a site",
        )

    found = {slot: value for climb in climbs for slot, value in climb.found.items()}
    del climbs
    readings = tuple(_reading(backend, part, collect, i, found) for i in range(len(request.reads)))
    said = len(part.rows) * (request.readout is not None and request.readout.of_all)
    spent = cost.total({"climbs": 1, "passes": 1 + part.runs_prefix, "token_layers": part.prompt_token_layers, "unembedded": said})
    readout = tokens = logprobs = None
    if request.readout is not None:
        ask, numbers = request.readout, [row.number for row in part.rows]
        normed = _normed(backend, part, collect.gather("readout", found))
        wanted = {name: None if x is None else x[numbers] for name in ("tokens", "token_logits") for x in [getattr(ask, name)]}
        readout = questions.readout(backend, normed.values, replace(ask, **wanted), normed=True)
    if request.generate:
        normed = _normed(backend, part, collect.gather("next", found)).values
        found.clear()
        tokens, logprobs, more = backend.decode(kept, normed, _todo(backend, part), tick)
        spent = deferred.later(_decoded, spent, more)
    return Reply(readings, readout, tokens, logprobs, spent), lasts


def _item(backend: Backend, edit: Edit, row: int, columns: list[int]) -> dict[str, Any]:
    """An edit of some tokens of a row of the batch, as `group_edits` takes it."""
    site = edit.site
    item = {"row": row, "cols": columns, "site": (site.name, site.layer), "op": edit.op, "value": edit.value, "to": edit.to}
    if isinstance(edit.value, FeatureChange):
        item["value"] = edit.value.plain
    if site.name == "attn_pattern":
        item["heads"] = list(range(backend.card.n_heads)) if site.unit is None else [site.unit]
        return item
    item["width"] = site.width(backend.card)
    if site.unit is not None:
        item["unit"], item["n_units"] = site.unit, site.units(backend.card)[0]
    return item


def _items(backend: Backend, part: Part) -> list[tuple[dict[str, Any], int]]:
    """What acts on the prompts' tokens from the first edited one on, and on which row."""
    items = []
    for i, row in enumerate(part.rows):
        trunk = part.trunk_of[i]
        pad = part.pads[trunk]
        for edit, positions in row.edits:
            item = _item(backend, edit, part.layout.batch_row[i], [pad + p - part.split for p in positions])
            if edit.site.name == "attn_pattern":
                seen = _seen(part, trunk, edit)
                # a token attends to those that are not after it
                item["keys"] = [[pad + key for key in (range(p + 1) if seen is None else seen) if key <= p] for p in positions]
            items.append((item, i))
    return items


def _seen(part: Part, trunk: int, edit: Edit) -> list[int] | None:
    return None if edit.keys is None else list(resolve(edit.keys, part.prompts[trunk]))


class _Collector:
    """Which values of a climb are wanted, and where each belongs."""

    def __init__(self, part: Part, top: int) -> None:
        self.part = part
        wanted: list[tuple[Any, Site, list[list[int]]]] = [
            (i, read.site, [row.reads[i] for row in part.rows]) for i, read in enumerate(part.request.reads)
        ]
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


def _reading(backend: Backend, part: Part, collect: _Collector, i: int, found: dict) -> Reading:
    site, got = part.request.reads[i].site, collect.gather(i, found)
    if site.name == "final_norm":
        return _normed(backend, part, got)
    values = got.values
    if site.name == "attn_pattern":
        pads = torch.tensor([part.pads[part.trunk_of[row]] for row in got.rows.tolist()])
        columns = pads[:, None] + torch.arange(values.shape[-1])
        index = columns.clamp(max=values.shape[-1] - 1)[:, None].expand(-1, values.shape[1], -1).to(values.device)
        values = values.gather(-1, index) * (columns < values.shape[-1])[:, None].to(values.device)
        values = torch.nn.functional.pad(values, (0, part.n - values.shape[-1]))
    if site.unit is not None:
        units, width = site.units(backend.card)
        values = values[:, site.unit] if site.name == "attn_pattern" else values.unflatten(-1, (units, width))[:, site.unit]
    return Reading(site, values, got.rows, got.positions)


def _normed(backend: Backend, part: Part, got: Reading) -> Reading:
    """The final norm of what was read, under the edits there."""
    values = backend.final_norm(got.values)
    items = []
    for at, (i, position) in enumerate(zip(got.rows.tolist(), got.positions.tolist(), strict=True)):
        for edit, positions in part.rows[i].finals:
            if position in positions:
                item = _item(backend, edit, at, [0])
                if isinstance(edit.value, Tensor) and edit.value.dim() == 2 and len(edit.value) > 1:
                    item["value"] = edit.value[positions.index(position)]
                items.append(item)
    if items and isinstance(values, deferred.Deferred) and values.number is None:
        values = values.tape.note("edited", {"values": values, "items": items}, values)
    else:
        values = edited(values, items)
    return Reading(got.site, values, got.rows, got.positions)


def _todo(backend: Backend, part: Part) -> dict[str, Any]:
    """What `decode` needs to know."""
    request, late = part.request, []
    items = (
        [({**item, "cols": [column + part.split for column in item["cols"]]}, number) for item, number in _items(backend, part)]
        if backend.remote
        else []
    )
    for i, row in enumerate(part.rows):
        late.append([])
        for edit in row.late:
            item = _item(backend, edit, 0, [])
            item["join"] = None if edit.site.name == "final_norm" else min(map(join_place, edit.touches))
            item["at"] = edit.scope if isinstance(edit.scope, tuple) else None
            if edit.site.name == "attn_pattern":
                item["seen"] = _seen(part, part.trunk_of[i], edit)
            late[-1].append(item)
    return {
        "steps": request.generate,
        "ends": sorted(backend.eos_ids),
        "sampling": _draws(request.sampling, request.generate, [row.number for row in part.rows]),
        "rows_at_once": planning.rows_at_once(backend.card),
        "last": backend.card.n_layers,
        "groups": part.groups,
        "joins": {i: row.join for i, row in enumerate(part.rows)},
        "lengths": [len(tokens) for tokens in part.prompts],
        "pads": part.pads,
        "ids": part.ids(backend.pad_id),
        "mask": part.mask,
        "width": part.n,
        "pack": part.pack_decoding,
        "items": [[item for item, number in items if number == i] for i in range(len(part.rows))],
        "late": late,
    }


def _draws(sampling: Sampling | None, steps: int, rows: list[int]) -> dict[str, Any] | None:
    """The random numbers of every row: its own, whatever the other rows, the parts and the steps."""
    if sampling is None:
        return None
    seeds = torch.randint(1 << 62, (max(rows) + 1,), generator=torch.Generator().manual_seed(sampling.seed)).tolist()
    draws = torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(seeds[row]), dtype=torch.float64) for row in rows])
    return {"draws": draws, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
