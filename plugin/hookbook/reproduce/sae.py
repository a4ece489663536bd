"""Effects seen and made through a sparse autoencoder: whether it fits the model, states and vectors as sums of features, clamping,
attribution, and one that is trained beside the one that ships."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from hookbook import sae as saes, scores, tasks
from hookbook.errors import DataError
from hookbook.recipes.features.attribution import feature_attribution
from hookbook.recipes.features.decomposition import FeatureVector
from hookbook.recipes.features.effects import feature_sweep
from hookbook.recipes.features.examples import feature_examples
from hookbook.recipes.features.reading import FeatureActivations, feature_activations
from hookbook.recipes.features.sae_report import sae_report
from hookbook.recipes.features.sae_training import train
from hookbook.recipes.features.sparse_coding import sparse_coding
from hookbook.recipes.features.steering import steer_feature
from hookbook.recipes.steering.contrast_vectors import contrast_vector
from hookbook.recipes.steering.steering import Steering
from hookbook.recipes.vectors.task_vectors import task_vector
from hookbook.reproduce.effect import Expected, Found, Line, least, most
from hookbook.reproduce.suite import Suite
from hookbook.results import Result
from hookbook.vectors import Vector

if TYPE_CHECKING:
    from sae_lens import SAE

    from hookbook.adapter import Adapter

SUMMED = 8
"""How many features a state is a sum of where that is judged."""
TOKENS, ACTIVE = 20_000, 40
"""Of the SAE that is trained: how many tokens the model writes, and how many features are active, as in the one that ships."""
LARGEST = 5
"""How many of a vector's features are looked at."""
WORDS = (" les", " est", " très", " dans", " pour", " une", " des", " le", " du")
SEEDS = (0, 1, 2, 3, 4)
"""Of the random features."""
TIMES = (1.0, 2.0, 4.0)
"""Multiples of a feature's largest activation that it is clamped to."""
SHARED = frozenset("la un une de que il se sur son ses tu".split())
"""French words that may be another Romance language's."""


@dataclass(frozen=True)
class Setup(Expected):
    """Which SAE, and how large an effect must be."""

    sae: Callable[[], SAE] | None = None
    french: float = 0.5


SETUPS = {"gemma-3-270m": Setup(sae=saes.demo)}

SUITE = Suite(
    "SAE features", SETUPS, Setup(), "The SAE is the demonstration SAE that ships with hookbook; layers count block outputs from 0."
)


def _attached(model: Adapter, setup: Setup) -> saes.AttachedSAE:
    if setup.sae is None:
        raise DataError(
            f"an SAE of {model.card.model_id}",
            "none ships for it",
            "reproduce gemma-3-270m, or attach your own: hb.sae.attach(model, SAE.from_pretrained(...))",
        )
    return saes.attach(model, setup.sae())


@SUITE.effect("Whether the SAE fits", minutes=0.3)
def fit(model: Adapter, setup: Setup) -> Found:
    """Whether the SAE fits this model: how sparse it is, what it does not reconstruct, and what the model loses when it goes on from
    reconstructions.

    The texts are hookbook's own French and English ones, on which the SAE was not trained.
    """
    french, english = map(list, tasks.contrast("language_french"))
    found = sae_report(_attached(model, setup), french + english)
    controls = {"FVU": float(found.fvu), "L0": float(found.l0), "dead": float(found.dead)}
    rule = (least("loss recovered", float(found.loss_recovered), 0.5), *most(controls, {"FVU": 0.5}))
    line = Line("the SAE fits", "loss recovered", float(found.loss_recovered), controls, "", rule, setup.expects("fit"))
    return {"sae_report": found}, [line]


@SUITE.effect("Every state is a sum of few features", minutes=0.5)
def sums(model: Adapter, setup: Setup) -> Found:
    """How much of a state few features explain, beside as many of as many random directions, chosen in the same way, and principal axes and
    components of other states (Huben et al. 2023).

    The states are of hookbook's own French and English texts, less their mean.
    """
    french, english = map(list, tasks.contrast("language_french"))
    found = sparse_coding(_attached(model, setup), french + english)
    at = found.ks.index(SUMMED)
    shares = {name: float(curve[at]) for name, curve in found.curves.items()}
    measured = shares.pop("features")
    above = [(f"more than {name}", measured > shares[name]) for name in ("principal axes", "principal components")]
    rule = (least("share explained", measured, shares["random directions"] + 0.1), *above)
    note = "; ".join(
        f"{k} features {float(own):.2f}, random {float(random):.2f}, axes {float(axes):.2f}"
        for k, own, random, axes in zip(found.ks, found.explained, found.random, found.principal_axes, strict=True)
    )
    what = f"{SUMMED} features, a share of a state"
    return {"sparse_coding": found}, [
        Line("states are sums of few features", what, measured, shares, "", rule, setup.expects("sums"), note)
    ]


@SUITE.effect("What vectors are made of", minutes=0.5)
def decompositions(model: Adapter, setup: Setup) -> Found:
    """Vectors as features: the French-steering vector, and the task vector of countries and capitals less that of other tasks.

    A feature fits if it tells texts apart that it was not chosen on: by its mean activation on French texts against English ones, and at
    the last token of prompts about capitals against those of other tasks; as the area under the curve (AUROC). Of the five largest
    features of a vector the best counts: the others are often active on every kind of text. The control is the best of five random
    features that are ever active on these texts, the mean of a thousand draws.
    """
    sae = _attached(model, setup)
    french, english = map(list, tasks.contrast("language_french"))
    vectors_of: dict[str, FeatureVector] = {"french_vector": _steering(model, sae, french[::2], english[::2]).decompose(sae)}
    sides = [feature_activations(sae, texts[1::2]) for texts in (french, english)]
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
    largest = list(dict.fromkeys(feature for found in vectors_of.values() for feature in found.features[:LARGEST].tolist()))
    examples = feature_examples(sae, french + english + [prompt for some in prompts for prompt in some], features=largest)
    return {**vectors_of, "examples": examples}, lines


def _steering(model: Adapter, sae: saes.AttachedSAE, french: list[str], english: list[str]) -> Vector:
    """The mean state of French texts less that of English ones, at the SAE's site."""
    return contrast_vector(model, french, english, layers=[sae.site], position=slice(1, None)).vector()


def _told_apart(what: str, found: FeatureVector, here: FeatureActivations, there: FeatureActivations, setup: Setup) -> Line:
    """How well the best of a vector's largest features tells two sets of prompts apart."""
    frame: Any = here.contrast(there).set_index("feature")
    of = {feature: float(frame.auroc.get(feature, 0.5)) for feature in found.features[:LARGEST].tolist()}
    best = max(of, key=lambda feature: of[feature])
    every, generator = torch.tensor(frame.auroc.to_numpy()), torch.Generator().manual_seed(0)
    drawn = torch.stack([every[torch.randperm(len(every), generator=generator)[:LARGEST]].max() for _ in range(1000)])
    controls = {f"best of {LARGEST} random": float(drawn.mean())}
    rule = (least("AUROC", of[best], 0.9), *most(controls, {f"best of {LARGEST} random": 0.85}))
    listed = ", ".join(f"{feature} {value:.2f}" for feature, value in of.items())
    note = (
        f"AUROCs of the largest features: {listed}. {len(found.features)} features are {float(found.explained):.0%} "
        "of the vector's squared length."
    )
    effect = "a vector's features fit"
    return Line(effect, f"{what}, feature {best}", of[best], controls, "", rule, setup.expects("decompositions", what), note)


@SUITE.effect("Clamping the language feature", minutes=1.5)
def language(model: Adapter, setup: Setup) -> Found:
    """A feature clamped to a multiple of its largest activation at every token, against random features pushed as far.

    Of the features that are more active in French texts than in English ones (AUROC of at least 0.6), the four that make French words
    likeliest after four openings are tried on half of the openings; the best is judged on the others. The score is the share of
    continuations with more French words than English ones, where words that may as well be Spanish, Italian or Portuguese do not count.
    Features that are large in the French-steering vector are active on English, too, and bring little French alone.
    """
    sae = _attached(model, setup)
    french, english = map(list, tasks.contrast("language_french"))
    sides = [feature_activations(sae, texts) for texts in (french, english)]
    sae = replace(sae, maxima=torch.maximum(sides[0].largest(), sides[1].largest()))
    apart: Any = sides[0].contrast(sides[1]).query("auroc >= 0.6 and difference > 0")
    openings = tasks.openings("english")
    sweep = feature_sweep(
        sae, openings[:8:2], features=apart.feature.tolist(), strengths=TIMES, change="times_max", position=sae.every, tokens=WORDS
    )
    likely = (sweep.changes + sweep.wanted_logprobs[sweep.rows][:, None]).logsumexp(-1).unflatten(0, (4, -1)).mean(0)
    candidates = apart.feature.iloc[likely.amax(-1).topk(min(4, len(likely))).indices.tolist()].tolist()

    def clamp(feature: int, some: Sequence[str], times: Sequence[float], seed: int = 0) -> Steering:
        return steer_feature(sae, feature, some, times_max=times, score=french_alone, generate=12, seed=seed)

    tried = {feature: clamp(feature, openings[::2], TIMES) for feature in candidates}
    means = {feature: one.scores.mean(0)[0] for feature, one in tried.items()}
    feature = max(means, key=lambda feature: float(means[feature].max()))
    times = TIMES[int(means[feature].argmax())]
    found = [clamp(feature, openings[1::2], [times], seed) for seed in SEEDS]
    measured, random = float(found[0].scores.mean()), [float(one.random.mean()) for one in found]
    controls = {"no clamp": float(found[0].base.mean()), "random, mean": sum(random) / len(random), "random, worst": max(random)}
    rule = (least("share in French", measured, setup.french), *most(controls, {"no clamp": 0.1, "random, mean": 0.1}))
    tries = ", ".join(f"{one} {float(mean.max()):.2f}" for one, mean in means.items())
    example = f"{found[0].prompts[0].text!r} goes on {found[0].said[0][1]!r}; with a random feature {found[0].said[0][2]!r}"
    note = f"On the other half, each at its best multiple: {tries}. An example: {example}."
    effect, what = "clamping the language feature", f"feature {feature}, {times:g} times its maximum"
    line = Line(effect, what, measured, controls, "steers", rule, setup.expects("language"), note)
    results: dict[str, Result] = {"sweep": sweep, **{f"steer_{one}": run for one, run in tried.items()}}
    return results | {f"judged_{seed}": one for seed, one in zip(SEEDS, found, strict=True)}, [line]


def french_alone(texts: Sequence[str]) -> float:
    """The share of texts with more words that are French, and not Spanish, Italian or Portuguese as well, than English ones."""
    return scores.french_score(texts, scores.FRENCH - SHARED)


@SUITE.effect("Attribution of an answer to features", minutes=0.2)
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


@SUITE.effect("A few minutes' training", minutes=8)
def training(model: Adapter, setup: Setup) -> Found:
    """Whether a few minutes' training on little text that the model writes gives an SAE that fits, by the rule of the one that ships; and
    what that one does on the same held-out texts.

    The one that ships has twice as many features, and was trained on twelve times as much text, from other beginnings.
    """
    shipped = _attached(model, setup)
    found = train(model, tokens=TOKENS, site=shipped.site, k=ACTIVE)
    other = sae_report(shipped, found.held_out_texts)
    controls = {"FVU": float(found.held_out_fvu[-1]), "L0": float(found.held_out_l0[-1]), "dead": float(found.dead[-1])}
    controls |= {"shipped: loss recovered": float(other.loss_recovered), "shipped: FVU": float(other.fvu), "shipped: L0": float(other.l0)}
    measured = float(found.loss_recovered[-1])
    rule = (least("loss recovered", measured, 0.5), *most(controls, {"FVU": 0.5}))
    note = (
        f"{found.n_tokens:,} states of {found.n_texts} texts, {int(found.steps[-1])} steps; judged on {len(found.held_out_texts)} others."
    )
    line = Line("a few minutes' training", "loss recovered", measured, controls, "", rule, setup.expects("training"), note)
    return {"training": found, "shipped": other}, [line]
