"""What must be true of a model for the forked pass to be exact, checked once for each model on four short passes.

Families differ in more than their module trees. Instead of a list of those that work, every model is asked: are its
logits the unembedding of its last block's output; do later tokens leave earlier ones alone; do kept keys and values,
padding and rows that join the batch give what whole separate passes give; do attention and MLP add up to the block?
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookbook.errors import ModelError, Refused
from hookbook.sites import Site
from hookbook.travel.climb import Climb

if TYPE_CHECKING:
    from hookbook.adapter import Adapter

_passed: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
"""Models that passed, and whether their blocks add up."""

_inner: weakref.WeakKeyDictionary[Any, dict[str, Refused | None]] = weakref.WeakKeyDictionary()
"""What models that were asked said about the sites inside attention and MLP."""

_packs: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
"""Models that were asked whether rows may be packed, and whether they may."""


def check(adapter: Adapter, sites: set[Site] = frozenset(), knock_out: bool = False) -> None:  # type: ignore[assignment]
    """Raise unless a model can be run exactly, and, if sublayers are asked for, unless they add up to their block.

    Raises:
        ModelError: The forked pass would not be exact on this model.
        Refused: `attn_out` or `mlp_out` is asked for, and is not what this model's blocks add to the stream.
    """
    if adapter.model not in _passed:
        with torch.no_grad():
            _passed[adapter.model] = _check(adapter)
    if not _passed[adapter.model] and any(site.name in ("attn_out", "mlp_out") for site in sites):
        raise Refused(f"attn_out and mlp_out of {adapter.card.architecture}", "they are not what its blocks add to the stream", "use resid_pre or resid_post")
    for name in sorted({site.name for site in sites} & {"head_z", "mlp_act", "attn_pattern"}):
        known = _inner.setdefault(adapter.model, {})
        if name not in known:
            with torch.no_grad():
                known[name] = _check_inner(adapter, name)
        if known[name] is not None:
            raise known[name]  # type: ignore[misc]
    if knock_out and not _inner[adapter.model]["attn_pattern sums to 1"]:
        raise Refused(
            f"knock_out of attention in {adapter.card.architecture}", "its patterns leave a part to a sink, which would have to share, too", "use set or scale"
        )


def _check_inner(adapter: Adapter, name: str) -> Refused | None:
    """Whether what is written at a site inside a block reaches what the block adds to the stream, and nothing else does."""
    n, card = torch.tensor, adapter.card
    source, out = ("mlp_act", "mlp_out") if name == "mlp_act" else ("head_z", "attn_out")
    refused = Refused(f"{name} of {card.architecture}", "what is written there does not reach the stream as it should", f"use {out}")
    if adapter.refuses(Site(source, 0)) is not None or adapter.refuses(Site(out, 0)) is not None:
        return refused
    width = Site(source, 0).width(card)
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
    reads = {(site, 0): [(site, n([0, 1]), n([1, 1]))] for site in {source, out, name}}
    climb = Climb(1, {0: (None, n([0]))}, {(name, 0): [edit]}, reads, 1)
    try:
        adapter.forward(n([[adapter.pad_id + 1, adapter.pad_id + 2]]), None, climb)
        project, norm = adapter.writer(source, 0)
        inside, outside = climb.found[source], climb.found[out]
        if inside.shape[-1] != width:
            return refused
        written = project(inside)
        written = written if norm is None else norm(written)
    except Exception:  # whatever a family does instead, and however its library says so
        return refused
    moved = _close(card.itemsize, inside[1] - inside[0], edit["value"][0]) if name != "attn_pattern" else (inside[1] == 0).all()
    if name == "attn_pattern":
        sums = climb.found[name][0].sum(-1)
        _inner[adapter.model]["attn_pattern sums to 1"] = _close(card.itemsize, sums, torch.ones_like(sums))  # type: ignore[assignment]
    return None if climb.fired == 1 and moved and _close(card.itemsize, written, outside) else refused


def packs(adapter: Adapter) -> bool:
    """Whether rows packed as tokens that do not see each other give what separate rows give; asked once for each model."""
    if adapter.model not in _packs:
        with torch.no_grad():
            _packs[adapter.model] = _check_packs(adapter)
    return _packs[adapter.model]


def _check_packs(adapter: Adapter) -> bool:
    n, last, d_model = torch.tensor, adapter.card.n_layers, adapter.card.d_model
    tokens, found = n([[adapter.pad_id + 1, adapter.pad_id + 2]]), []
    value = torch.linspace(-1, 1, 5 * d_model).reshape(5, d_model).roll(7, 1)
    edit = {"rows": n([1, 2, 3, 4, 5]), "cols": n([0] * 5), "op": "add", "value": value, "to": n([0.0] * 5)}
    reads = {("resid_post", last - 1): [("x", n([0, 1, 2, 3, 4, 5]), n([0] * 6))]}
    for pack in (1, 4):
        prefix = Climb(1, {}, {}, {}, last)
        body = Climb(1, {0: (None, n([0] * 5))}, {("resid_pre", 0): [edit]}, reads, last, pack=pack)
        try:
            adapter.forward(tokens[:, 1:], None, body, kept=adapter.forward(tokens[:, :1], None, prefix, keep=True))
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
        found.append(body.found["x"])
    return _close(adapter.card.itemsize, *found)


def _check(adapter: Adapter) -> bool:
    card, n, last = adapter.card, torch.tensor, adapter.card.n_layers
    pad, site = adapter.pad_id, ("resid_post", adapter.card.n_layers - 1)
    tokens, mask = n([[pad + 1, pad + 2], [pad, pad + 3]]), n([[1, 1], [0, 1]])
    pads = mask == 0
    names = ["resid_pre", *(name for name in ("attn_out", "mlp_out") if adapter.refuses(Site(name, 0)) is None), "resid_post"]
    parts = {(name, 0): [(name, n([0]), n([1]))] for name in names}
    alone = Climb(1, {}, {}, parts | {site: [*parts.get(site, []), ("x", n([0, 0]), n([0, 1]))]}, last)
    whole = Climb(2, {}, {}, {site: [("x", n([0, 0, 1, 0, 1]), n([0, 1, 1, 1, 1]))]}, last, pads)
    prefix = Climb(2, {}, {}, {site: [("x", n([0]), n([0]))]}, last, pads[:, :1])
    rest = Climb(2, {1: (None, n([0, 1]))}, {}, {site: [("x", n([0, 1, 2, 3]), n([0, 0, 0, 0]))]}, last, pads[:, 1:])
    short = Climb(1, {}, {}, {site: [("x", n([0]), n([0]))]}, last)
    try:
        adapter.forward(tokens[:1], None, alone)
        adapter.forward(tokens, mask, whole)
        kept = adapter.forward(tokens[:, :1], mask[:, :1], prefix, keep=True)
        adapter.forward(tokens[:, 1:], mask, rest, kept=kept)
        adapter.forward(tokens[1:, 1:], None, short)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        raise ModelError(
            f"{card.model_id} cannot be run as forks", f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}", _INSTEAD
        ) from error
    a, b = whole.found["x"], torch.cat([prefix.found["x"], rest.found["x"]])
    c, d = torch.cat([a[:2], a[2:3]]), torch.cat([alone.found["x"], short.found["x"]])
    if not _close(card.itemsize, a, b) or not _close(card.itemsize, c, d):
        raise ModelError(
            f"{card.model_id} cannot be run as forks", f"{card.architecture} gives other numbers for kept tokens, padding or rows of a batch than for separate runs", _INSTEAD,
        )  # fmt: skip
    if not _close(card.itemsize, adapter.unembed(adapter.final_norm(alone.found["x"])), adapter.plain_logits(tokens[:1])[0]):
        raise ModelError(
            f"the logits of {card.model_id} are not the unembedding of its last block's output", f"{card.architecture} does something to them that this adapter does not know", _INSTEAD,
        )  # fmt: skip
    added = [alone.found[name] for name in names[1:-1]]
    return len(added) < 2 or _close(card.itemsize, alone.found["resid_pre"] + sum(added), alone.found["resid_post"])


_INSTEAD = "use a causal language model whose blocks keep keys and values of every token, or report this one"


def _close(itemsize: int, a: Tensor, b: Tensor) -> bool:
    a, b = a.float().cpu(), b.float().cpu()
    return a.shape == b.shape and bool((a - b).abs().max() <= (1e-3 if itemsize >= 4 else 5e-2) * (1 + b.abs().max()))
