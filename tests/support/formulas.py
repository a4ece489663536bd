"""What edits do, written from their definitions, one vector at a time."""

from __future__ import annotations

from typing import Any

import torch

import hookbook as hb
from hookbook.tokens import resolve


def flat(
    edits: tuple[hb.Edit, ...], tokens: hb.tokens.Tokens, length: int | None = None
) -> tuple[tuple[hb.Site, int, hb.Edit, list[int]], ...]:
    """Edits of a row as (site, index, edit of one vector, keys), for a run of the prompt and generated tokens of together `length`."""
    n = len(tokens)
    found = []
    for edit in edits:
        where = list(resolve(edit.position, tokens)) if edit.scope in ("prompt", "all") else []
        where += list(range(n, length or n)) if edit.scope in ("generated", "all") else []
        where += [i for i in edit.scope if i < (length or n)] if isinstance(edit.scope, tuple) else []
        for nth, index in enumerate(where):
            value = (
                edit.value[nth] if isinstance(edit.value, torch.Tensor) and edit.value.dim() == 2 and len(edit.value) > 1 else edit.value
            )
            value = value[0] if isinstance(value, torch.Tensor) and value.dim() == 2 else value
            keys = range(index + 1) if edit.keys is None else [key for key in resolve(edit.keys, tokens) if key <= index]
            found.append((edit.site, index, hb.Edit(edit.site, value, edit.op, to=edit.to), list(keys)))
    return tuple(found)


def unit_formula(x: torch.Tensor, edit: hb.Edit, card: hb.ModelCard) -> torch.Tensor:
    """What an edit does to one head or neuron of a vector, or to all of it."""
    if edit.site.unit is None:
        return formula(x, edit)
    width = card.d_head if edit.site.name == "head_z" else 1
    x = x.clone()
    part = slice(edit.site.unit * width, (edit.site.unit + 1) * width)
    x[part] = formula(x[part], edit)
    return x


def pattern_formula(x: torch.Tensor, edit: hb.Edit, keys: list[int]) -> torch.Tensor:
    """What an edit does to one token's attention, `[head, key]`."""
    x = x.clone()
    for head in range(len(x)) if edit.site.unit is None else [edit.site.unit]:
        for key in keys:
            x[head, key] = {"set": edit.value, "add": x[head, key] + edit.value, "scale": x[head, key] * edit.value, "knock_out": 0.0}[
                edit.op
            ]
        if edit.op == "knock_out" and x[head].sum() > 0:
            x[head] /= x[head].sum()
    return x


def formula(x: torch.Tensor, edit: hb.Edit) -> torch.Tensor:
    """What an edit does to one vector, written from its definition."""
    if edit.op == "features":
        return through_sae(x, edit)
    if edit.op == "scale":
        return x * edit.value
    value = torch.as_tensor(edit.value, dtype=x.dtype).expand_as(x)
    if edit.op == "set":
        return value
    if edit.op == "add":
        return x + value
    unit = value / value.norm()
    if edit.op == "rotate":  # Liu et al. 2023, arXiv:2311.06668: lam is the length of the value
        y = value.norm() * (1 + max(0.0, float(x @ -unit / x.norm()))) * unit
        turned = x / x.norm() + y
        return x.norm() * turned / turned.norm()
    return x - (x @ unit) * unit + (edit.to * unit if edit.op == "clamp" else 0)


SAES: dict[str, Any] = {}
"""SAEs of SAELens by the names that edits of their features have."""


def through_sae(x: torch.Tensor, edit: hb.Edit) -> torch.Tensor:
    """What SAELens makes of one vector when activations are changed between its `encode` and its `decode`."""
    change: Any = edit.value
    sae, chosen = SAES[change.sae], list(range(len(change.scale))) if change.whole else list(change.features)
    given = x[None, None] if sae.hook_z_reshaping_mode else x[None]
    plain = sae.decode(sae.encode(given)).flatten()
    acts = sae.encode(given)
    acts[:, chosen] = acts[:, chosen] * change.scale + change.shift
    new = sae.decode(acts).flatten()
    return (new if change.drop else x - plain + new).detach()
