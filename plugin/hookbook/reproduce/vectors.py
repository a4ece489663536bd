"""Effects of vectors: task vectors, function vectors, their sums, and steering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from hookbook import scores, tasks, tokens
from hookbook.card import ModelCard
from hookbook.recipes.steering.contrast_vectors import contrast_vector
from hookbook.recipes.steering.generation import Generation, generate
from hookbook.recipes.steering.in_context_shift import in_context_vector
from hookbook.recipes.steering.refusal_direction import select_direction
from hookbook.recipes.steering.steering import Steering, steer
from hookbook.recipes.vectors.function_vectors import FunctionVectors, HeadEffects, function_vector, head_effects
from hookbook.recipes.vectors.task_sweep import TaskSweep
from hookbook.recipes.vectors.task_vectors import Composition, TaskVectors, compose, task_vector
from hookbook.reproduce import behaviours
from hookbook.reproduce.effect import Expected, Found, Line, least, most
from hookbook.reproduce.suite import Suite
from hookbook.results import Result

if TYPE_CHECKING:
    from hookbook.adapter import Adapter

SIZES: dict[str, Any] = {"n_prompts": 24, "queries": 40}
OTHERS = {
    "country_capital": "present_past",
    "singular_plural": "present_past",
    "present_past": "country_capital",
    "capitalize": "country_capital",
}
"""Tasks, and the other task whose vector is the control."""
TURNS = (0.02, 0.05, 0.1)
"""How far in-context vectors turn an output; the paper's is the last."""
GOOD, BAD = [" good", " great", " wonderful", " excellent", " amazing"], [" bad", " terrible", " awful", " horrible", " poor"]


@dataclass(frozen=True)
class Setup(Expected):
    """Where an effect is looked for, and how large it must be. The defaults are the papers', for models that were not measured before."""

    layer: int | None = None
    """Block output at which task vectors and sums are judged; None: the best on validation pairs."""
    task: float = 0.5
    zero_shot: float | None = 0.08
    random: float = 0.03
    other_task: float | None = 0.15
    dead: tuple[int, int] | None = None
    """Replacing does nothing up to the one layer and from the other on."""
    top_heads: tuple[tuple[int, int, float], ...] = ()
    """The heads with the largest effects, and at least how large they are."""
    heads: int = 10
    strength: float = 1.0
    function_layers: tuple[int, ...] = ()
    sums: tuple[str, ...] = ("capitalize", "country_capital")
    sum: float = 0.35
    french_layer: int | None = None
    sentiment_layer: int | None = None

    def near(self, card: ModelCard) -> list[int]:
        """Some layers: around the one that matters, and a few early and late ones."""
        n = card.n_layers
        at = self.layer if self.layer is not None else n * 3 // 5
        return sorted({n // 6, n // 3, n * 5 // 6} | {layer for layer in range(at - 2, at + 3) if 0 <= layer < n})


SETUPS = {
    "gemma-3-270m": Setup(
        layer=11,
        dead=(6, 13),
        top_heads=((9, 3, 0.2), (11, 2, 0.08)),
        heads=2,
        function_layers=(9, 10, 11),
        french_layer=5,
        sentiment_layer=13,
        counted=frozenset(
            [(f"task vector, {mode}", task) for mode in ("replace", "difference") for task in ("country_capital", "singular_plural")]
            + [
                ("heads", ""),
                ("sum of vectors", "capitalize"),
                ("steering to French", ""),
                ("in-context vector", ""),
                ("steering sentiment", ""),
            ]
        ),
    ),
    "smollm2-135m-instruct": Setup(
        layer=21,
        task=0.55,
        zero_shot=None,
        random=0.1,
        other_task=None,
        strength=4.0,
        function_layers=(10, 12, 14, 16),
        sums=("capitalize", "singular_plural"),
        sum=0.6,
        french_layer=9,
        sentiment_layer=21,
        counted=frozenset(
            [("task vector, difference", "singular_plural"), ("function vector", "singular_plural"), ("function vector", "present_past")]
            + [("sum of vectors", "capitalize"), ("steering to French", ""), ("in-context vector", ""), ("steering sentiment", "")]
        ),
    ),
}

SUITE = Suite(
    "Vectors",
    SETUPS,
    Setup(),
    "Accuracies are of an answer's first token among all tokens, on test pairs; layers count block outputs from 0.",
)


@SUITE.effect("Task vectors", minutes=4)
def task_vectors(model: Adapter, setup: Setup) -> Found:
    """The mean state behind examples, set or added at the last token of a query without examples (Hendel et al. 2023; Todd et al. 2023).

    Shuffled labels are no null: their vector still holds what kind of answer is wanted. Look at another task, at random and at late
    layers. Setting the state works in a window of middle layers and not after them; adding the difference fades slowly.
    """
    results: dict[str, Result] = {}
    for name, other in OTHERS.items():
        for mode in ("replace", "difference"):
            layers = "all" if mode == "replace" and name in ("country_capital", "singular_plural") else setup.near(model.card)
            results[f"task_vector_{mode}_{name}"] = task_vector(
                model, tasks.load(name), layers=layers, mode=mode, other=tasks.load(other), **SIZES
            )
    return results, [task_line(found, setup) for found in results.values() if isinstance(found, TaskVectors)]


def task_line(found: TaskVectors, setup: Setup) -> Line:
    """A task's vector at the layer that is judged."""
    at, layer = _place(found, setup.layer)
    measured, controls = _numbers(found, at)
    rule = [
        least("accuracy", measured, setup.task),
        *most(controls, {"zero-shot": setup.zero_shot, "random": setup.random, "other task": setup.other_task}),
    ]
    by_layer = [(site.layer or 0, float(x)) for site, x in zip(found.sites, found.accuracy, strict=True)]
    if found.mode == "replace" and setup.dead is not None:
        early, late = setup.dead
        controls["early or late"] = max(x for at, x in by_layer if at <= early or at >= late)
        rule += most(controls, {"early or late": 0.15})
    works = [at for at, x in by_layer if x >= max(0.1, 0.5 * max(x for _, x in by_layer))]
    after = [x for at, x in by_layer if works and at > works[-1]]
    where = f"{found.task}, {found.mode}: at least half of the best at layers {', '.join(map(str, works)) or 'none'} of those tried"
    note = where + (f", and at most {max(after):.2f} after them." if after else ".")
    effect, what = f"task vector, {found.mode}", f"{found.task}, layer {layer}"
    counts = setup.expects(effect, found.task)
    return Line(effect, what, measured, controls, "works in middle layers", tuple(rule), counts, note)


@SUITE.effect("Heads and function vectors", minutes=3)
def function_vectors(model: Adapter, setup: Setup) -> Found:
    """A few heads carry a task from examples to the last token; the sum of their mean outputs, added, makes the model do it (Todd et al.
    2023).

    The paper adds ten heads as they are, at a layer about a third deep, in models of six billion parameters and more. Lines named "as
    published" do that here. The layer is the best on validation pairs, of a few around the middle.
    """
    three = [tasks.load(name) for name in ("country_capital", "singular_plural", "present_past")]
    effects = head_effects(model, three, n_prompts=SIZES["n_prompts"], n_trials=12)
    n = model.card.n_layers
    layers = list(setup.function_layers) or sorted({n // 3, n // 2, n * 3 // 5})
    results: dict[str, Result] = {"head_effects": effects}
    lines = [heads_line(effects, setup)]
    ways = [("function vector", task, setup.heads, setup.strength) for task in three]
    if (setup.heads, setup.strength) != (10, 1.0):
        ways.append(("function vector as published", three[0], 10, 1.0))
    for effect, task, heads, strength in ways:
        found = function_vector(model, task, heads=heads, effects=effects, strength=strength, layers=layers, **SIZES)
        results[f"{effect.replace(' ', '_')}_{task.name}"] = found
        lines.append(function_line(effect, found, setup))
    return results, lines


def heads_line(found: HeadEffects, setup: Setup) -> Line:
    """The heads with the largest effects."""
    top = found.top(3)
    sizes = [float(found.mean[head]) for head in top]
    names = [f"{layer}.{head}" for layer, head in top]
    controls = {f"third, {names[2]}": sizes[2], "median of all": float(found.mean.median())}
    if setup.top_heads:
        wanted = {(layer, head) for layer, head, _ in setup.top_heads}
        rule = [("the first two are " + " and ".join(f"{layer}.{head}" for layer, head in sorted(wanted)), set(top[:2]) == wanted)]
        rule += [least(f"effect of {layer}.{head}", float(found.mean[layer, head]), limit) for layer, head, limit in setup.top_heads]
        rule.append(("third <= 0.1", sizes[2] <= 0.1))
    else:
        rule = [least("largest effect", sizes[0], 0.08), ("median of all <= 0.01", abs(controls["median of all"]) <= 0.01)]
    note = f"The largest mean indirect effects: {', '.join(f'{name} {size:+.2f}' for name, size in zip(names, sizes, strict=True))}."
    controls = {f"second, {names[1]}": sizes[1], **controls}
    return Line("heads", f"largest, {names[0]}", sizes[0], controls, "few matter", tuple(rule), setup.expects("heads"), note)


def function_line(effect: str, found: FunctionVectors, setup: Setup) -> Line:
    """A function vector at the layer that was best on validation pairs."""
    at, layer = _place(found, None)
    measured, controls = _numbers(found, at)
    rule = (least("accuracy", measured, 0.55), *most(controls, {"random heads": 0.2}))
    what = f"{found.task}, {len(found.heads)} heads x {found.settings['strength']:g}, layer {layer}"
    note = (
        f"{found.task}: {len(found.heads)} heads added with strength {found.settings['strength']:g} give {measured:.2f}, "
        f"{controls['with examples']:.2f} with examples."
    )
    return Line(effect, what, measured, controls, "works", rule, effect == "function vector" and setup.expects(effect, found.task), note)


@SUITE.effect("Sums of vectors", minutes=2)
def sums(model: Adapter, setup: Setup) -> Found:
    """Vectors of lists of three: last copy + first answer - first copy should answer for the last item (Todd et al. 2023, section 3.3;
    here mean states are set).

    Each of the three parts alone is a control. `direct` is the vector of last answers itself.
    """
    layers = setup.near(model.card) if setup.layer is None else [setup.layer - 1, setup.layer, setup.layer + 1]
    found = {f"sum_{name}": compose(model, tasks.load(name), layers=layers, **SIZES) for name in setup.sums}
    return dict(found), [sum_line(name, one, setup) for name, one in zip(setup.sums, found.values(), strict=True)]


def sum_line(task: str, found: Composition, setup: Setup) -> Line:
    """A sum at the layer that is judged."""
    at, layer = _place(found, setup.layer)
    measured, controls = _numbers(found, at)
    parts = max(controls[name] for name in ("first answer", "last copy", "first copy"))
    rule = (least("accuracy", measured, setup.sum), least("above the best of its parts", measured - parts, 0.25))
    return Line("sum of vectors", f"{task}, layer {layer}", measured, controls, "adds up", rule, setup.expects("sum of vectors", task))


@SUITE.effect("Steering to French", minutes=0.3)
def french(model: Adapter, setup: Setup) -> Found:
    """The mean state of French texts less that of English ones, added at all tokens, makes English openings go on in French.

    The score is the share of continuations with more French function words than English ones. Read the texts: in a small model they may
    say nothing.
    """
    layer = setup.french_layer if setup.french_layer is not None else model.card.n_layers // 3
    found = contrast_vector(model, *tasks.contrast("language_french"), position=slice(1, None))
    said = steer(model, found, tasks.openings("english")[:24], layers=[layer], strengths=[1, 2], score=scores.french_score, generate=12)
    return {"contrast_french": found, "steer_french": said}, [french_line(said, layer, setup)]


def french_line(said: Steering, layer: int, setup: Setup) -> Line:
    """The better strength of two, beside the worst of the controls."""
    measured, at = said.scores.mean(0)[0].max(0)
    controls = {"no vector": float(said.base.mean()), "random": float(said.random.mean(0).max())}
    rule = (least("share in French", float(measured), 0.75), *most(controls, {"no vector": 0.1, "random": 0.1}))
    note = f"An example: {said.prompts[0].text!r} goes on {said.said[0][1 + int(at)]!r}."
    what = f"layer {layer}, better of strengths {' and '.join(f'{x:g}' for x in said.strengths)}"
    return Line("steering to French", what, float(measured), controls, "steers", rule, setup.expects("steering to French"), note)


@SUITE.effect("In-context vectors", minutes=1)
def in_context(model: Adapter, setup: Setup) -> Found:
    """What leads from the last state of an English sentence to that of its French translation, at all layers together, makes English
    openings go on in French (Liu et al. 2023).

    Outputs of all MLPs are turned towards it, at all tokens. The paper changes how texts sound, in models of seven billion parameters,
    with a strength of 0.1; here the language is changed, and lower strengths are tried too. Random directions, turned towards as far, are
    the control. Read the texts: the higher strengths break them.
    """
    wanted, plain = tasks.contrast("language_french")
    found = in_context_vector(model, list(zip(plain[:32], wanted[:32], strict=True)))
    noise = replace(found, values=torch.randn(found.values.shape, generator=torch.Generator().manual_seed(0)))
    openings = tasks.openings("english")[:24]
    said, random = (
        {strength: generate(model, openings, edits=vectors.edits(strength), max_new_tokens=12) for strength in TURNS}
        for vectors in (found, noise)
    )
    best, line = in_context_line(said, random, setup)
    return {"in_context_vector": found, "in_context": said[best], "in_context_random": random[best]}, [line]


def in_context_line(said: Mapping[float, Generation], random: Mapping[float, Generation], setup: Setup) -> tuple[float, Line]:
    """The best of the strengths, and its share of French texts beside the best of random directions."""
    shares = {strength: scores.french_score(one.texts) for strength, one in said.items()}
    best = max(shares, key=shares.__getitem__)
    chosen = said[best]
    controls = {
        "no vector": scores.french_score(chosen.control_texts),
        "random": max(scores.french_score(one.texts) for one in random.values()),
    }
    rule = (least("share in French", shares[best], 0.5), *most(controls, {"no vector": 0.1, "random": 0.1}))
    by_strength = ", ".join(f"{share:.2f} at {strength:g}" for strength, share in shares.items())
    example = f"An example: {chosen.prompts[0].text!r} goes on {chosen.texts[0]!r}."
    note = f"In-context vectors, share in French by strength: {by_strength}. {example}"
    effect, what = "in-context vector", f"to French, strength {best:g}"
    return best, Line(effect, what, shares[best], controls, "steers", rule, setup.expects(effect), note)


@SUITE.effect("Steering sentiment", minutes=0.2)
def sentiment(model: Adapter, setup: Setup) -> Found:
    """The mean state of favourable reviews less that of unfavourable ones, added with strength 2 and -2, moves the log-odds of good
    against bad words both ways."""
    layer = setup.sentiment_layer if setup.sentiment_layer is not None else model.card.n_layers * 2 // 3
    found = contrast_vector(model, *tasks.contrast("sentiment"))
    odds = steer(model, found, tasks.openings("neutral"), layers=[layer], strengths=[-2, -1, 1, 2], tokens=(GOOD, BAD))
    return {"contrast_sentiment": found, "steer_sentiment": odds}, [sentiment_line(odds, layer, setup)]


def sentiment_line(odds: Steering, layer: int, setup: Setup) -> Line:
    """Log-odds under +2, beside those under -2, under none and under random vectors."""
    base = float(odds.base.mean())
    (down, *_, up), (below, *_, above) = odds.scores.mean(0)[0].tolist(), odds.random.mean(0)[0].tolist()
    controls = {"no vector": base, "strength -2": down, "random +2": above, "random -2": below}
    rule = (least("rise", up - base, 3), ("strength -2 <= 0", down <= 0))
    what = f"log-odds, layer {layer}, strength 2"
    return Line("steering sentiment", what, up, controls, "steers", rule, setup.expects("steering sentiment"))


@SUITE.effect("The refusal direction", minutes=1)
def refusal(model: Adapter, setup: Setup) -> Found:
    """One direction decides whether a chat model refuses (Arditi et al. 2024, models of 1.8 billion parameters and more): is there one to
    choose?

    No threshold is set: neither of the two small models refuses by its first token, so there is nothing a direction could be of. That it
    tells the two kinds of requests apart shows nothing about what the model does.
    """
    effect, paper = "refusal direction", "one direction decides"
    if not getattr(model.tokenizer, "chat_template", None):
        note = "This model has no chat template: it is no chat model, and refuses nothing."
        return {}, [Line(effect, "needs a chat model", float("nan"), {}, paper, (), False, note)]
    asked, ordinary = tasks.contrast("refusal")
    n, tail = model.card.n_layers, tokens.after_instruction(model.tokenizer)
    where: dict[str, Any] = {"site": "resid_pre", "layers": [n // 3, n * 2 // 5, n // 2, n * 3 // 5], "position": tail[-1:], "chat": True}
    found = contrast_vector(model, asked[:48], ordinary[:48], **where)
    chosen = select_direction(model, found, asked[48:], ordinary[48:], tokens=["I"])
    shares = [float((odds > 0).double().mean()) for odds in chosen.base]
    controls = {"ordinary requests": shares[1], "AUROC of the direction": float(found.auroc.max())}
    note = f"No direction is chosen: {chosen.why}." if chosen.best is None else f"{chosen.best.site} is chosen."
    what = "share of requests to be declined that begin with I"
    rule = (("a direction is chosen", chosen.best is not None),)
    return {"contrast_refusal": found, "select_refusal": chosen}, [Line(effect, what, shares[0], controls, paper, rule, False, note)]


SUITE.effect("Sycophancy", minutes=3)(behaviours.sycophancy)
SUITE.effect("Truthfulness", minutes=3)(behaviours.truthfulness)
SUITE.effect("A refusal that was induced", minutes=4)(behaviours.induced_refusal)


def _place(found: TaskSweep, layer: int | None) -> tuple[int, int]:
    """Where among a sweep's sites the layer is that is judged, and which it is."""
    layers = [site.layer or 0 for site in found.sites]
    at = layers.index(layer) if layer is not None else found.best_index
    return at, layers[at]


def _numbers(found: TaskSweep, at: int) -> tuple[float, dict[str, float]]:
    """Accuracy at a site, and of the controls."""
    controls = {name: float(values[at]) for name, values in found.controls.items()}
    return float(found.accuracy[at]), {"zero-shot": float(found.zero_shot), "with examples": float(found.few_shot), **controls}
