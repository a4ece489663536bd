"""Which neurons are meant, and what one is set to when it is taken out: nothing, a number, or what it is on other texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from hookbook.adapter import Adapter, ModelCard
from hookbook.asking import encode_prompts
from hookbook.errors import DataError, SiteError
from hookbook.request import Each, Read, Request, Row
from hookbook.sites import Site, layers_to_sites
from hookbook.tokens import Tokens

Ablation = Literal["zero", "mean", "resample"] | float
HELD = 64 << 20
"""How many bytes of activations are held at once."""


def neuron_sites(layers: Any, card: ModelCard, single: bool = False) -> tuple[Site, ...]:
    """`mlp_act` of layers, or if `single` of single neurons as well.

    Raises:
        SiteError: Something else is named.
    """
    sites = layers_to_sites(layers, card, "mlp_act")
    for site in sites:
        if site.name != "mlp_act":
            raise SiteError(f"neurons of {site}", "neurons are numbers of mlp_act", "write 'mlp_act.25.1120'" if single else "give layers")
        if site.unit is not None and not single:
            raise SiteError(f"neurons of {site}", "all neurons of a layer are looked at", "give layers")
    return sites


def ablated(adapter: Adapter, sites: Sequence[Site], ablate: Ablation, reference: Any, seed: int, progress: bool | None) -> list[Tensor]:
    """What each neuron of whole sites is set to, `[neuron]` of each.

    Args:
        adapter: The model.
        sites: `mlp_act` of some layers.
        ablate: `"zero"`; a number; `"mean"`: its mean over the tokens of `reference`; `"resample"`: what it is at one of these tokens,
            drawn for each neuron.
        reference: Texts; of all their tokens but special ones.
        seed: Of the draws.
        progress: As the recipe's.

    Raises:
        DataError: An unknown way, or a number that is not one; texts that are missing, not used, or without a token that counts.
    """
    draws = isinstance(ablate, str) and ablate in ("mean", "resample")
    if not draws and not (ablate == "zero" or (isinstance(ablate, Real) and not isinstance(ablate, bool) and math.isfinite(ablate))):
        raise DataError(f"ablate={ablate!r}", "", "use 'zero', 'mean', 'resample' or a number")
    if draws != (reference is not None):
        why = "it is what neurons are on other texts" if draws else "nothing of them is used"
        raise DataError(f"ablate={ablate!r} {'without' if draws else 'with'} reference=", why, "give texts" if draws else "leave it out")
    if not draws:
        number = 0.0 if ablate == "zero" else float(ablate)
        return [torch.full((site.width(adapter.card),), number, dtype=torch.float64) for site in sites]
    return _of_texts(adapter, sites, ablate == "mean", reference, seed, progress)


def _of_texts(adapter: Adapter, sites: Sequence[Site], mean: bool, texts: Any, seed: int, progress: bool | None) -> list[Tensor]:
    coded = encode_prompts(adapter, texts)
    where = [counted(adapter, tokens) for tokens in coded]
    total, widths = sum(map(len, where)), [site.width(adapter.card) for site in sites]
    if not total:
        raise DataError("reference texts of special tokens alone", "activations on them mean nothing", "give longer ones")
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randint(total, (width,), generator=generator) for width in widths]
    found: list[Any] = [None] * len(sites)
    done = 0
    for start, end in held_at_once(adapter, sites, list(map(len, where))):
        each = Each(tuple(where[start:end]))
        request = Request(coded[start:end], [Row(i) for i in range(end - start)], [Read(site, each) for site in sites])
        for i, reading in enumerate(adapter.run(request, progress=progress).readings):
            values = reading.values.detach().double()
            if mean:
                part = values.sum(0) / total
            else:
                at = draws[i] - done
                here = (at >= 0) & (at < len(values))
                part = values.gather(0, at.clamp(0, len(values) - 1)[None])[0] * here
            found[i] = part if found[i] is None else found[i] + part
        done += sum(map(len, where[start:end]))
    return found


def held_at_once(adapter: Adapter, sites: Sequence[Site], sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """From which text to which activations at sites are held at once, given how many tokens of each are read: one text at least."""
    each, start = sum(site.width(adapter.card) for site in sites) * adapter.card.itemsize, 0
    while start < len(sizes):
        end, held = start + 1, sizes[start]
        while end < len(sizes) and (held + sizes[end]) * each <= HELD:
            held += sizes[end]
            end += 1
        yield start, end
        start = end


def counted(adapter: Adapter, tokens: Tokens) -> list[int]:
    """The tokens of a text that are not special, such as the beginning-of-sequence token."""
    special = set(adapter.tokenizer.all_special_ids)
    return [i for i, token in enumerate(tokens.ids) if token not in special]


def set_to(values: Sequence[Tensor], at: Sequence[tuple[int, int]]) -> list[Any]:
    """What single neurons are set to, as edits take it: of `at` the tensor and the place in it; numbers, or promises of them."""
    if any(type(x) is not Tensor for x in values):
        return [values[place][i : i + 1] for place, i in at]
    lists = [x.tolist() for x in values]
    return [lists[place][i] for place, i in at]
