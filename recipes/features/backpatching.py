"""Backpatching of features: of the state that a later layer computed, an earlier layer gets only the activations of chosen features.

Backpatching a whole state says that something in it helps; here is asked what. The chosen features of the earlier state take the
activations that the later state gives them, and the rest of the earlier state stays.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hookbook.asking import as_question, pose
from hookbook.controls import check_controls, other_questions
from hookbook.errors import DataError, Refused
from hookbook.recipe import recipe
from hookbook.recipes.hops.backpatching import Backpatch, by_layer, pairs_of, patched, place_of
from hookbook.request import Each, Read, Readout, Request, Row
from hookbook.sae import AttachedSAE, checked
from hookbook.sites import Site
from hookbook.tokens import Position

CONTROLS = ("shuffled", "random")


@dataclass(frozen=True, eq=False)
class FeatureBackpatch(Backpatch):
    """What the chosen features of each source layer do at the SAE's layer to each of `n` questions, beside controls, which are keys of
    `right`:

    - `patch`: the activations of the question's own state of the source layer;
    - `shuffled`: those of another question, with another answer;
    - `random`: the question's own, of as many other features.
    """

    sae: str
    features: tuple[int, ...]
    labels: dict[int, str]
    """What features were said to be about."""


@recipe
def backpatch_features(
    sae: AttachedSAE,
    questions: Sequence[Any],
    features: int | Sequence[int],
    *,
    source_layers: Literal["later"] | Sequence[int] = "later",
    position: Position | Literal["bridge"] = -1,
    controls: Sequence[str] = CONTROLS,
    generate: int = 0,
    seed: int = 0,
    progress: bool | None = None,
) -> FeatureBackpatch:
    """Give chosen features, at the SAE's layer, the activations that they have in the same token's state of a later layer, from a
    question's own clean run.

    With `x` the state at the SAE's site, `y` that of the source layer, `f` the SAE's activations and `d` its decoder's rows, `x` becomes
    `x + sum over the chosen i of (f_i(y) - f_i(x)) d_i`. One SAE reads both, so it should be one that makes sense of either: neighbouring
    layers share much of their directions, distant ones less.

    Args:
        sae: An SAE of `resid_post` or `resid_pre`; its layer is the target.
        questions, position, generate, seed, progress: See `hookbook.backpatch`.
        features: Which.
        source_layers: `"later"`: every layer above the SAE's; or a list, also of layers below.
        controls: Which to run of `"shuffled"` and `"random"` (see `FeatureBackpatch`).

    Returns:
        A `FeatureBackpatch`, as a `Backpatch` with one target layer.

    Raises:
        ModelError: `sae` is not attached to a model.
        Refused: A transcoder or an SAE of another site, which no other layer's state can be given to; one whose features cannot be changed
            inside the model.
        EditError: An unknown feature.
        DataError, SiteError, TokenError: As `hookbook.backpatch`; too few other features for `"random"`; the SAE's own layer as a source.

    Source: ours, after Biran et al. 2024, arXiv:2406.12775, section 5.

    Differs: the paper patches whole states, here only some features of them travel.

    Example:
        found = hb.backpatch_features(sae, questions, [12, 404])
        found.summary()
    """
    sae = checked(sae)
    adapter, chosen = sae.model, sae.chosen(features)
    if sae.site != sae.out or sae.site.name not in ("resid_pre", "resid_post"):
        raise Refused(
            f"backpatching features of {sae.site} to {sae.out}",
            "source and target are states of the stream",
            "use an SAE of resid_post or resid_pre",
        )
    if not chosen:
        raise DataError("no features", "nothing would be patched", "give at least one")
    names, target = ("patch", *check_controls(controls, CONTROLS)), sae.site.layer
    assert target is not None
    if isinstance(source_layers, str) and source_layers != "later":
        raise DataError(f"source_layers={source_layers!r}", "", "use 'later', or a list of layers")
    sources = range(target + 1, adapter.card.n_layers) if isinstance(source_layers, str) else source_layers
    if target in sources:
        raise DataError(f"layer {target} as a source", "it is the SAE's own, so nothing would change", "name other layers")
    pairs = pairs_of([(source, target) for source in sources], adapter.card)
    asked = pose(adapter, [as_question(question) for question in questions], generate, sae.bos)
    at = [place_of(question, prompt, position) for question, prompt in zip(asked.questions, asked.prompts, strict=True)]
    n, draw = len(at), random.Random(seed)
    order = draw.sample(range(n), n)
    donors = other_questions(asked.questions, draw, "answer") if "shuffled" in names else []
    rest = [i for i in range(sae.n_features) if i not in set(chosen)] if "random" in names else []
    if "random" in names and len(rest) < len(chosen):
        raise DataError(
            f"{len(rest)} features that are not among the chosen {len(chosen)}",
            "the random control takes as many",
            "choose fewer, or leave it out",
        )
    drawn = tuple(draw.sample(rest, len(chosen))) if rest else ()
    layers = [source for source, _ in pairs]
    sites = [Site(sae.site.name, layer) for layer in layers]
    for site in (sae.site, *sites):
        adapter.require(site)

    reads = [Read(site, Each(tuple(at))) for site in sites]
    ask_clean = Request(asked.prompts, [Row(i) for i in range(n)], reads, Readout(k=1, tokens=asked.answers[:, None]), generate)
    clean = adapter.run(ask_clean, progress=progress)
    states = torch.stack([reading.values for reading in clean.readings], 1)

    def acts(some: Sequence[int]) -> list[dict[int, Tensor]]:
        return by_layer(sae.activations(states.flatten(0, 1), some).unflatten(0, (n, -1)), layers)

    own = acts(chosen)
    noise = acts(drawn) if drawn else []
    rows = []
    for i in range(n):
        for name in names:
            some, values = (drawn, noise[i]) if name == "random" else (chosen, own[donors[i]] if name == "shuffled" else own[i])
            rows += [Row(i, (sae.edit(some, to=values[layer], position=at[i]),)) for layer in layers]
    found = patched(adapter, asked, at, clean, rows, names, pairs, generate, progress)
    settings = {"rule": asked.rule, "random": drawn}
    return FeatureBackpatch(
        **found, donors=tuple(donors), order=tuple(order), settings=settings, sae=sae.name, features=chosen, labels=sae.labels_of(chosen)
    )
