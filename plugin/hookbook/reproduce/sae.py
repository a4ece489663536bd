"""Effects seen and made through a sparse autoencoder: whether it fits the model, what vectors are made of, clamping, and attribution."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from hookbook import sae as saes
from hookbook import scores, tasks
from hookbook.errors import DataError
from hookbook.recipes.contrast_vectors import contrast_vector
from hookbook.recipes.feature_attribution import feature_attribution
from hookbook.recipes.feature_decomposition import FeatureVector
from hookbook.recipes.feature_examples import feature_examples
from hookbook.recipes.feature_reading import FeatureActivations, feature_activations
from hookbook.recipes.feature_steering import steer_feature
from hookbook.recipes.sae_report import sae_report
from hookbook.recipes.steering import Steering
from hookbook.recipes.task_vectors import task_vector
from hookbook.reproduce.suite import Expected, Found, Line, Suite, least, most
from hookbook.results import Result
from hookbook.vectors import Vector

if TYPE_CHECKING:
    from sae_lens import SAE

    from hookbook.adapter import Adapter

TIMES = (1.0, 2.0, 4.0)
"""Multiples of a feature's largest activation that it is clamped to."""
SHARED = frozenset("la un une de que il se sur son ses tu".split())
"""French words that may be another Romance language's."""
SEEDS = (0, 1, 2)
"""Of the random features."""


@dataclass(frozen=True)
class Setup(Expected):
    """Which SAE, and how large an effect must be."""

    sae: Callable[[], SAE] | None = None
    french: float = 0.5


SETUPS = {"gemma-3-270m": Setup(sae=saes.demo)}


def _texts() -> tuple[list[str], list[str]]:
    """French texts and English ones: one half for choosing features, the other for judging them."""
    french, english = tasks.contrast("language_french")
    return list(french), list(english)


def _half(texts: list[str], which: int) -> list[str]:
    return texts[which::2]


def _attached(model: Adapter, setup: Setup) -> saes.AttachedSAE:
    if setup.sae is None:
        raise DataError(
            f"an SAE of {model.card.model_id}",
            "none ships for it",
            "reproduce gemma-3-270m, or attach your own: hb.sae.attach(model, SAE.from_pretrained(...))",
        )
    return saes.attach(model, setup.sae())


def fit(model: Adapter, setup: Setup) -> Found:
    """Whether the SAE fits this model: how sparse it is, what it does not reconstruct, and what the model loses when it goes on from reconstructions.

    The texts are hookbook's own French and English ones, on which the SAE was not trained.
    """
    french, english = _texts()
    found = sae_report(_attached(model, setup), french + english)
    controls = {"FVU": float(found.fvu), "L0": float(found.l0), "dead": float(found.dead)}
    rule = (least("loss recovered", float(found.loss_recovered), 0.5), *most(controls, {"FVU": 0.5}))
    return {"sae_report": found}, [Line("the SAE fits", "loss recovered", float(found.loss_recovered), controls, "", rule, setup.expects("fit"))]


def decompositions(model: Adapter, setup: Setup) -> Found:
    """Vectors as features: the French-steering vector, and the task vector of countries and capitals less that of other tasks.

    A feature fits if it tells texts apart that it was not chosen on: the largest feature's mean activation on French texts against English ones, and at the last
    token of prompts about capitals against those of other tasks; as the area under the curve (AUROC). The control is the median of all features that are
    ever active on these texts.
    """
    sae = _attached(model, setup)
    french, english = _texts()
    vectors_of: dict[str, FeatureVector] = {"french_vector": _steering(model, sae, _half(french, 0), _half(english, 0)).decompose(sae)}
    sides = [feature_activations(sae, _half(texts, 1)) for texts in (french, english)]
    lines = [_told_apart("French vector", vectors_of["french_vector"], sides[0], sides[1], setup)]
    names = ["country_capital", "present_past", "singular_plural", "english_german"]
    vectors, prompts = [], []
    for name in names:
        task = tasks.load(name)
        vectors.append(task_vector(model, task, layers=[sae.site], n_prompts=16, queries=8).vector(0))
        shown = [task.pairs[i : i + 5] for i in range(0, 20, 5)]
        prompts.append([task.template.prompt(some, query) for some in shown for query, _ in task.pairs[-4:]])
    others = (vectors[1] + vectors[2] + vectors[3]) / 3
    vectors_of["capital_vector"] = (vectors[0] - others).decompose(sae)
    at_last = [feature_activations(sae, some, position=-1) for some in (prompts[0], [prompt for some in prompts[1:] for prompt in some])]
    lines.append(_told_apart("country_capital vector", vectors_of["capital_vector"], at_last[0], at_last[1], setup))
    largest = [int(found.features[0]) for found in vectors_of.values()]
    examples = feature_examples(sae, french + english + [prompt for some in prompts for prompt in some], features=largest)
    return {**vectors_of, "examples": examples}, lines


def _steering(model: Adapter, sae: saes.AttachedSAE, french: list[str], english: list[str]) -> Vector:
    """The mean state of French texts less that of English ones, at the SAE's site."""
    return contrast_vector(model, french, english, layers=[sae.site], position=slice(1, None)).vector()


def _told_apart(what: str, found: FeatureVector, here: FeatureActivations, there: FeatureActivations, setup: Setup) -> Line:
    """How well the largest feature of a vector tells two sets of prompts apart."""
    frame: Any = here.contrast(there).set_index("feature")
    measured, control = float(frame.auroc.get(int(found.features[0]), 0.5)), float(frame.auroc.median())
    rule = (least("AUROC", measured, 0.9), *most({"median feature": control}, {"median feature": 0.65}))
    note = f"The largest features are {', '.join(map(str, found.features[:5].tolist()))}; {len(found.features)} of them are {float(found.explained):.0%} of its squared length."
    return Line("a vector's largest feature fits", what, measured, {"median feature": control}, "", rule, setup.expects("decompositions", what), note)


def language(model: Adapter, setup: Setup) -> Found:
    """A feature clamped to multiples of its largest activation at every token, against random features pushed as far.

    The feature is the one that best tells French texts from English ones, by its mean activation in a text (AUROC). The score is the share of continuations of
    English openings with more French function words than English ones. Some of these words are Spanish or Italian, too: `French alone` counts only those that are
    not. The largest feature of the steering vector is tried likewise; it is active on many English tokens, too.
    """
    sae = _attached(model, setup)
    french, english = _texts()
    sides = [feature_activations(sae, texts) for texts in (french, english)]
    frame: Any = sides[0].contrast(sides[1]).sort_values("auroc", ascending=False)
    best, largest = int(frame.feature.iloc[0]), int(_steering(model, sae, french, english).decompose(sae).features[0])
    sae = replace(sae, maxima=torch.maximum(sides[0].largest(), sides[1].largest()))
    results: dict[str, Result] = {}
    lines = []
    for what, feature, seeds, counts in (("tells texts apart", best, SEEDS, True), ("largest of the vector", largest, SEEDS[:1], False)):
        found = [
            steer_feature(sae, feature, tasks.openings("english")[:24], times_max=TIMES, score=scores.french_score, generate=12, seed=seed) for seed in seeds
        ]
        results |= {f"steer_{what.replace(' ', '_')}_{seed}": one for seed, one in zip(seeds, found, strict=True)}
        lines.append(_clamped(what, feature, found, setup, counts))
    return results, lines


def _clamped(what: str, feature: int, found: list[Steering], setup: Setup, counts: bool) -> Line:
    """The best of the multiples, beside no clamp and random features at the same."""
    first, n = found[0], len(TIMES)
    shares = first.scores.mean(0)[0]
    at = int(shares.argmax())
    random = [float(one.random.mean(0)[0, at]) for one in found]
    alone = [_french_alone(said[1 + at]) for said in first.said]
    controls = {
        "French alone": sum(alone) / len(alone),
        "no clamp": float(first.base.mean()),
        "random, mean": sum(random) / len(random),
        "random, worst": max(random),
    }
    rule = (least("share in French", float(shares[at]), setup.french), *most(controls, {"no clamp": 0.1, "random, worst": float(shares[at]) - 0.25}))
    note = f"An example: {first.prompts[0].text!r} goes on {first.said[0][1 + at]!r}; with a random feature {first.said[0][1 + n + at]!r}."
    effect = "clamping the language feature"
    return Line(effect, f"feature {feature} ({what}), {TIMES[at]:g} times its maximum", float(shares[at]), controls, "steers", rule, counts, note)


def _french_alone(text: str) -> bool:
    """Whether a text has more words that are French and neither Spanish nor Italian nor Portuguese than English ones."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    return sum(word in scores.FRENCH - SHARED for word in words) > sum(word in scores.ENGLISH for word in words)


def attribution(model: Adapter, setup: Setup) -> Found:
    """Gradient times activation against what taking a feature out at a token really does (Marks et al. 2024), on prompts about capitals."""
    sae = _attached(model, setup)
    task = tasks.load("country_capital")
    shown = task.pairs[:3]
    asked = task.pairs[3:9]
    prompts = [task.template.prompt(shown, country) for country, _ in asked]
    found = feature_attribution(sae, prompts, answer=[f" {capital}" for _, capital in asked])
    r = found.correlation()
    rule = (least("correlation", r, 0.7),)
    what = f"{len(prompts)} prompts, the 50 largest of each"
    return {"attribution": found}, [Line("attribution agrees with ablation", what, r, {}, "close", rule, setup.expects("attribution"))]


EFFECTS: dict[str, tuple[str, Callable[[Adapter, Setup], Found]]] = {
    "fit": ("Whether the SAE fits", fit),
    "decompositions": ("What vectors are made of", decompositions),
    "language": ("Clamping the language feature", language),
    "attribution": ("Attribution of an answer to features", attribution),
}

SUITE = Suite("SAE features", EFFECTS, SETUPS, Setup(), "The SAE is the demonstration SAE that ships with hookbook; layers count block outputs from 0.")
