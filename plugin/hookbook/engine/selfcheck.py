"""What must be true of a model for the forked pass to be exact, checked once for each model on four short passes.

Families differ in more than their module trees. Instead of a list of those that work, every model is asked: are its
logits the unembedding of its last block's output; do later tokens leave earlier ones alone; do kept keys and values,
padding and rows that join the batch give what whole separate passes give; do attention and MLP add up to the block?
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from hookbook import deferred
from hookbook.engine.seam import Backend, RemoteBackend
from hookbook.engine.state import answers, state
from hookbook.errors import HookbookError, ModelError, Refused
from hookbook.sites import Site
from hookbook.travel.climb import Climb


def check(backend: Backend, sites: Collection[Site] = (), knock_out: bool = False, prompts: Sequence[Sequence[int]] = ()) -> None:
    """Raise unless a model can be run exactly, and unless the sites that are asked for are what they should be.

    Of a model on a server the questions are part of the job, until it answered them once. While hooks of the user's are on a model, nothing
    is shared between rows, and what is asked is asked of the prompts themselves, each time, and of each block that is looked into: a hook
    on a part of a block may come before or after what is read there.

    Raises:
        ModelError: The forked pass would not be exact on this model, or the model was changed since.
        Refused: A site is asked for, and is not what it should be in this model's blocks.
    """
    names = {site.name for site in sites}
    inner = sorted(names & {"head_z", "mlp_in", "mlp_act", "attn_pattern"})
    hooks = () if backend.remote else state(backend).hooks
    if hooks:
        _check_alone(backend, hooks, prompts)
    asked = ["runs"] * (not hooks) + ["sublayers"] * bool(names & {"attn_out", "mlp_out"}) + inner + ["knock_out"] * knock_out
    if hooks:
        _check_inside(backend, asked, sites, prompts)
        return
    for question in asked:
        if isinstance(backend, RemoteBackend):
            tape = deferred.tape(backend)
            if question not in backend.verified | tape.verified:
                tape.verified.add(question)
                for condition, error in _conditions(backend, question):
                    deferred.hold(condition, error)
            continue
        known = answers(backend)
        if question not in known:
            with torch.no_grad():
                known[question] = next((error for condition, error in _conditions(backend, question) if not bool(condition)), None)
        error = known[question]
        if error is not None:
            raise error


def _check_alone(backend: Backend, hooks: Sequence[str], prompts: Sequence[Sequence[int]]) -> None:
    """Raise if a hook does something above the last block that depends on which token is where: there tokens are looked at one by one."""
    last = backend.card.n_layers
    for ids in prompts or [_two(backend)[0].tolist()]:
        climb = Climb(1, {}, {}, {("resid_post", last - 1): [("x", torch.zeros(len(ids), dtype=torch.long), torch.arange(len(ids)))]}, last)
        with torch.no_grad():
            backend.forward(torch.tensor([ids]), None, climb)
            logits = backend.unembed(backend.final_norm(climb.found["x"]))
            alike = _close(backend.card.itemsize, logits, backend.plain_logits(torch.tensor([ids]))[0])
        if not alike:
            raise ModelError(
                f"a hook on {backend.card.model_id} cannot be followed: {', '.join(hooks)}",
                "above the last block it does not do the same to each token",
                "take it off, or put it on a block",
            )


def _check_inside(backend: Backend, asked: Sequence[str], sites: Collection[Site], prompts: Sequence[Sequence[int]]) -> None:
    """Raise if a site inside a block is not what it should be in one of the blocks where it is asked for."""
    of = {"sublayers": {"attn_out", "mlp_out"}, "knock_out": {"attn_pattern"}}
    for question in asked:
        for layer in sorted({site.layer for site in sites if site.layer is not None and site.name in of.get(question, {question})}):
            with torch.no_grad():
                for condition, error in _conditions(backend, question, layer, prompts):
                    if not bool(condition):
                        raise error


def _conditions(backend: Backend, question: str, layer: int = 0, prompts: Sequence[Sequence[int]] = ()) -> list[tuple[Any, HookbookError]]:
    """What must hold, and what is raised if it does not."""
    if question == "runs":
        return _runs(backend)
    architecture = backend.card.architecture
    if question == "sublayers":
        error = Refused(
            f"attn_out and mlp_out of {architecture}", "they are not what its blocks add to the stream", "use resid_pre or resid_post"
        )
        return [(_add_up(backend, layer, prompts), error)]
    if question == "knock_out":
        why = "its patterns leave a part to a sink, which would have to share, too"
        return [(_sums_to_one(backend, layer), Refused(f"knock_out of attention in {architecture}", why, "use set or scale"))]
    if question == "mlp_in":
        return [
            (
                _feeds(backend, layer),
                Refused(
                    f"mlp_in of {architecture}",
                    "nothing shows that what is written there is all that its MLPs take",
                    "use resid_pre or resid_post",
                ),
            )
        ]
    source, out = _inner_sites(question)
    return [
        (
            _reaches(backend, question, source, out, layer),
            Refused(f"{question} of {architecture}", "what is written there does not reach the stream as it should", f"use {out}"),
        )
    ]


def _inner_sites(name: str) -> tuple[str, str]:
    return ("mlp_act", "mlp_out") if name == "mlp_act" else ("head_z", "attn_out")


def _reaches(backend: Backend, name: str, source: str, out: str, layer: int = 0) -> Any:
    """Whether what is written at a site inside a block reaches what the block adds to the stream, and nothing else does."""
    n, card = torch.tensor, backend.card
    if backend.refuses(Site(source, layer)) is not None or backend.refuses(Site(out, layer)) is not None:
        return False
    width = Site(source, layer).width(card)
    rows, cols = n([1]), n([1])
    if name == "attn_pattern":
        heads, lines = torch.arange(card.n_heads), torch.ones(card.n_heads, dtype=torch.long)
        edit = {
            "op": "scale",
            "rows": lines,
            "heads": heads,
            "cols": lines,
            "entries": heads.repeat(2),
            "keys": n([0, 1]).repeat_interleave(len(heads)),
            "value": torch.zeros(2 * len(heads)),
        }
    else:
        edit = {"op": "add", "rows": rows, "cols": cols, "value": torch.linspace(-1, 1, width)[None]}
    reads = {(site, layer): [(site, n([0, 1]), n([1, 1]))] for site in {source, out, name}}
    climb = Climb(1, {layer: (None, n([0]))}, {(name, layer): [edit]}, reads, layer + 1)
    try:
        backend.forward(_two(backend), None, climb)
        project, norm = backend.writer(source, layer)
        inside, outside = climb.found[source], climb.found[out]
        if inside.shape[-1] != width or climb.fired != 1:
            return False
        written = project(inside)
        written = written if norm is None else norm(written)
    except Exception:  # whatever a family does instead, and however its library says so
        return False
    moved = _close(card.itemsize, inside[1] - inside[0], edit["value"][0]) if name != "attn_pattern" else (inside[1] == 0).all()
    return _close(card.itemsize, written, outside) & moved


def _feeds(backend: Backend, layer: int = 0) -> Any:
    """Whether what is written at the MLP's input is all that it makes its addition of: two tokens that are given the same get the same."""
    n, card = torch.tensor, backend.card
    if backend.refuses(Site("mlp_in", layer)) is not None or backend.refuses(Site("mlp_out", layer)) is not None:
        return False
    rows, cols, value = n([1, 1]), n([0, 1]), torch.linspace(-1, 1, card.d_model)[None]
    edit = {"op": "set", "rows": rows, "cols": cols, "value": value, "of": n([0, 0])}
    reads = {(site, layer): [(site, rows, cols)] for site in ("mlp_in", "mlp_out")}
    climb = Climb(1, {layer: (None, n([0]))}, {("mlp_in", layer): [edit]}, reads, layer + 1)
    try:
        backend.forward(_two(backend), None, climb)
        inside, outside = climb.found["mlp_in"], climb.found["mlp_out"]
        first, second = outside / outside.abs().max().clamp(min=1e-30)  # of a model that was not trained it may be very small
    except Exception:  # whatever a family does instead, and however its library says so
        return False
    return _close(card.itemsize, inside, value.expand(2, -1)) & _close(card.itemsize, first, second)


def _sums_to_one(backend: Backend, layer: int = 0) -> Any:
    """Whether a pattern is all of the attention there is."""
    n = torch.tensor
    climb = Climb(1, {}, {}, {("attn_pattern", layer): [("x", n([0]), n([1]))]}, layer + 1)
    backend.forward(_two(backend), None, climb)
    sums = climb.found["x"][0].sum(-1)
    return _close(backend.card.itemsize, sums, torch.ones_like(sums))


def _add_up(backend: Backend, layer: int = 0, prompts: Sequence[Sequence[int]] = ()) -> Any:
    """Whether attention and MLP are what a block adds to the stream, at the end of two tokens, or at all tokens of prompts."""
    names = ["resid_pre", *(name for name in ("attn_out", "mlp_out") if backend.refuses(Site(name, layer)) is None), "resid_post"]
    if len(names) < 4:
        return True
    for ids in prompts or [_two(backend)[0].tolist()]:
        at = torch.arange(len(ids)) if prompts else torch.tensor([1])
        climb = Climb(1, {}, {}, {(name, layer): [(name, torch.zeros_like(at), at)] for name in names}, layer + 1)
        backend.forward(torch.tensor([ids]), None, climb)
        before, *added, after = (climb.found[name] for name in names)
        alike = _close(backend.card.itemsize, before + sum(added), after)
        if not prompts or not bool(alike):
            return alike
    return True


def _two(backend: Backend) -> Tensor:
    return torch.tensor([[backend.pad_id + 1, backend.pad_id + 2]])


def packs(backend: Backend) -> bool:
    """Whether rows packed as tokens that do not see each other give what separate rows give; asked once for each model."""
    known = answers(backend)
    if "packs" not in known:
        with torch.no_grad():
            known["packs"] = backend.packs and _check_packs(backend)
    return known["packs"]


def _check_packs(backend: Backend) -> bool:
    n, last, d_model = torch.tensor, backend.card.n_layers, backend.card.d_model
    tokens, found = n([[backend.pad_id + 1, backend.pad_id + 2]]), []
    value = torch.linspace(-1, 1, 5 * d_model).reshape(5, d_model).roll(7, 1)
    edit = {"rows": n([1, 2, 3, 4, 5]), "cols": n([0] * 5), "op": "add", "value": value, "to": n([0.0] * 5)}
    reads = {("resid_post", last - 1): [("x", n([0, 1, 2, 3, 4, 5]), n([0] * 6))]}
    for pack in (1, 4):
        prefix = Climb(1, {}, {}, {}, last)
        body = Climb(1, {0: (None, n([0] * 5))}, {("resid_pre", 0): [edit]}, reads, last, pack=pack)
        try:
            backend.forward(tokens[:, 1:], None, body, kept=backend.forward(tokens[:, :1], None, prefix, keep=1))
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
        found.append(body.found["x"])
    return bool(_close(backend.card.itemsize, *found))


def fuses(backend: Backend) -> bool:
    """Whether attention that computes no patterns gives what the model's own gives: for kept tokens, padding, forks and packed rows, and at
    the heads; asked once for each model. Leaves it off."""
    known = answers(backend)
    if "fuses" not in known:
        with torch.no_grad():
            known["fuses"] = backend.fuse(0) and _check_fuses(backend)
        backend.fuse(None)
    return known["fuses"]


def _check_fuses(backend: Backend) -> bool:
    n, last, pad = torch.tensor, backend.card.n_layers, backend.pad_id
    tokens = n([[pad + i for i in range(1, 9)], [pad, pad, *(pad + i for i in range(9, 15))]])
    mask = n([[1] * 8, [0, 0] + [1] * 6])
    pads, pack = mask == 0, 2 if packs(backend) else 1
    site = ("resid_post", last - 1)
    sites = [site] + [("head_z", last - 1)] * (backend.refuses(Site("head_z", last - 1)) is None)
    found = []
    for keys in (None, 0):
        backend.fuse(keys)
        whole = Climb(2, {}, {}, {one: [(one, n([0] * 8 + [1] * 6), n([*range(8), *range(2, 8)]))] for one in sites}, last, pads)
        prefix = Climb(2, {}, {}, {}, last, pads[:, :7])
        body = Climb(2, {1: (None, n([0, 1]))}, {}, {site: [("x", n([0, 1, 2, 3]), n([0] * 4))]}, last, pads[:, 7:], pack)
        try:
            backend.forward(tokens, mask, whole)
            backend.forward(tokens[:, 7:], mask, body, kept=backend.forward(tokens[:, :7], mask[:, :7], prefix, keep=1))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError):
            return False
        found.append([*whole.found.values(), *body.found.values()])
    return len(found[0]) == len(found[1]) and all(bool(_close(backend.card.itemsize, a, b)) for a, b in zip(*found, strict=True))


def _runs(backend: Backend) -> list[tuple[Any, HookbookError]]:
    """Whether kept tokens, padding, forks and the unembedding give what separate plain runs give."""
    card, n, last = backend.card, torch.tensor, backend.card.n_layers
    pad, site = backend.pad_id, ("resid_post", backend.card.n_layers - 1)
    tokens, mask = n([[pad + 1, pad + 2], [pad, pad + 3]]), n([[1, 1], [0, 1]])
    pads = mask == 0
    alone = Climb(1, {}, {}, {site: [("x", n([0, 0]), n([0, 1]))]}, last)
    whole = Climb(2, {}, {}, {site: [("x", n([0, 0, 1, 0, 1]), n([0, 1, 1, 1, 1]))]}, last, pads)
    prefix = Climb(2, {}, {}, {site: [("x", n([0]), n([0]))]}, last, pads[:, :1])
    rest = Climb(2, {min(1, last - 1): (None, n([0, 1]))}, {}, {site: [("x", n([0, 1, 2, 3]), n([0, 0, 0, 0]))]}, last, pads[:, 1:])
    short = Climb(1, {}, {}, {site: [("x", n([0]), n([0]))]}, last)
    try:
        backend.forward(tokens[:1], None, alone)
        backend.forward(tokens, mask, whole)
        kept = backend.forward(tokens[:, :1], mask[:, :1], prefix, keep=1)
        backend.forward(tokens[:, 1:], mask, rest, kept=kept)
        backend.forward(tokens[1:, 1:], None, short)
        normed, half = backend.final_norm(alone.found["x"]), backend.splits() // 2
        logits = (
            torch.cat([backend.unembed(normed, part) for part in (slice(half), slice(half, None))], -1) if half else backend.unembed(normed)
        )
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
        return [(False, ModelError(f"{card.model_id} cannot be run as forks", why, _INSTEAD))]
    a, b = whole.found["x"], torch.cat([prefix.found["x"], rest.found["x"]])
    c, d = torch.cat([a[:2], a[2:3]]), torch.cat([alone.found["x"], short.found["x"]])
    others = f"{card.architecture} gives other numbers for kept tokens, padding or rows of a batch than for separate runs"
    unknown = f"{card.architecture} does something to them that this backend does not know"
    return [
        (
            _close(card.itemsize, a, b) & _close(card.itemsize, c, d),
            ModelError(f"{card.model_id} cannot be run as forks", others, _INSTEAD),
        ),
        (
            _close(card.itemsize, logits, backend.plain_logits(tokens[:1])[0]),
            ModelError(f"the logits of {card.model_id} are not the unembedding of its last block's output", unknown, _INSTEAD),
        ),
    ]


_INSTEAD = "use a causal language model whose blocks keep keys and values of every token, or report this one"


def _close(itemsize: int, a: Tensor, b: Tensor) -> Any:
    """Whether two say the same of every token, whose own largest number is what a difference is measured by: a first token's may be 1000
    times the others'."""
    a, b = a.float().cpu(), b.float().cpu()
    if a.shape != b.shape:
        return torch.tensor(False)
    return (torch.isfinite(b) & ((a - b).abs() <= (1e-3 if itemsize >= 4 else 5e-2) * (1 + b.abs().amax(-1, keepdim=True)))).all()
