"""Effects seen and made through a sparse autoencoder: whether it fits the model, what vectors are made of, clamping, and attribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookbook import sae as saes
from hookbook import scores, tasks
from hookbook.errors import DataError
from hookbook.recipes.contrast_vectors import contrast_vector
from hookbook.recipes.feature_attribution import feature_attribution
from hookbook.recipes.feature_examples import feature_examples
from hookbook.recipes.feature_reading import FeatureActivations, feature_activations
from hookbook.recipes.feature_steering import steer_feature
from hookbook.recipes.sae_report import sae_report
from hookbook.recipes.task_vectors import task_vector
from hookbook.reproduce.suite import Expected, Found, Line, Suite, least, most
from hookbook.results import Result

if TYPE_CHECKING:
    from sae_lens import SAE

    from hookbook.adapter import Adapter

TIMES = (1.0, 2.0, 4.0)
"""Multiples of a feature's largest activation that it is clamped to."""
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
    steering = contrast_vector(model, _half(french, 0), _half(english, 0), layers=[sae.site], position=slice(1, None)).vector()
    results: dict[str, Result] = {"french_vector": steering.decompose(sae)}
    sides = [feature_activations(sae, _half(texts, 1)) for texts in (french, english)]
    lines = [_told_apart("French vector", results["french_vector"], sides[0], sides[1], setup)]
    names = ["country_capital", "present_past", "singular_plural", "english_german"]
    vectors, prompts = [], []
    for name in names:
        task = tasks.load(name)
        vectors.append(task_vector(model, task, layers=[sae.site], n_prompts=16, queries=8).vector(0))
        shown = [task.pairs[i : i + 5] for i in range(0, 20, 5)]
        prompts.append([task.template.prompt(some, query) for some in shown for query, _ in task.pairs[-4:]])
    others = (vectors[1] + vectors[2] + vectors[3]) / 3
    results["capital_vector"] = (vectors[0] - others).decompose(sae)
    at_last = [feature_activations(sae, some, position=-1) for some in (prompts[0], [prompt for some in prompts[1:] for prompt in some])]
    lines.append(_told_apart("country_capital vector", results["capital_vector"], at_last[0], at_last[1], setup))
    largest = [int(found.features[0]) for found in results.values()]  # pyright: ignore[reportAttributeAccessIssue]
    results["examples"] = feature_examples(sae, french + english + [prompt for some in prompts for prompt in some], features=largest)
    return results, lines


def _told_apart(what: str, found: Any, here: FeatureActivations, there: FeatureActivations, setup: Setup) -> Line:
    """How well the largest feature of a vector tells two sets of prompts apart."""
    curves = _auroc(*(torch.stack([side.dense(i).double().mean(0) for i in range(len(side.prompts))]) for side in (here, there)))
    active = (here.share() + there.share()) > 0
    top, control = int(found.features[0]), float(curves[active].median())
    rule = (least("AUROC", float(curves[top]), 0.9), *most({"median feature": control}, {"median feature": 0.65}))
    note = f"The largest features are {', '.join(map(str, found.features[:5].tolist()))}; {len(found.features)} of them are {float(found.explained):.0%} of its squared length."
    return Line("a vector's largest feature fits", what, float(curves[top]), {"median feature": control}, "", rule, setup.expects("decompositions", what), note)


def _auroc(first: Tensor, second: Tensor) -> Tensor:
    """Of each column: how often a number of `first` `[n, m]` is above one of `second` `[k, m]`; ties count half."""
    return torch.stack([((a[:, None] > b).double() + (a[:, None] == b).double() / 2).mean() for a, b in zip(first.T, second.T, strict=True)])


def language(model: Adapter, setup: Setup) -> Found:
    """The largest feature of the French-steering vector, clamped to multiples of its largest activation at every token, against random features pushed as far.

    The score is the share of continuations of English openings with more French function words than English ones.
    """
    sae = _attached(model, setup)
    french, english = _texts()
    steering = contrast_vector(model, french, english, layers=[sae.site], position=slice(1, None)).vector()
    feature = int(steering.decompose(sae).features[0])
    sae = replace(sae, maxima=feature_examples(sae, french + english).maxima)
    openings = tasks.openings("english")[:24]
    found = {
        f"steer_feature_{seed}": steer_feature(sae, feature, openings, times_max=TIMES, score=scores.french_score, generate=12, seed=seed) for seed in SEEDS
    }
    first = next(iter(found.values()))
    shares = first.scores.mean(0)[0]
    best = int(shares.argmax())
    random = [float(one.random.mean(0)[0, best]) for one in found.values()]
    measured, controls = float(shares[best]), {"no clamp": float(first.base.mean()), "random features": sum(random) / len(random), "worst random": max(random)}
    rule = (least("share in French", measured, setup.french), *most(controls, {"no clamp": 0.1, "worst random": measured - 0.25}))
    note = f"An example: {first.prompts[0].text!r} goes on {first.said[0][1 + best]!r}; with a random feature {first.said[0][1 + len(TIMES) + best]!r}."
    what = f"feature {feature}, {TIMES[best]:g} times its maximum"
    return dict(found), [Line("clamping the language feature", what, measured, controls, "steers", rule, setup.expects("language"), note)]


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
