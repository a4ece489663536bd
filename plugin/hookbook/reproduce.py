"""`hookbook reproduce vectors`: published effects of vectors on one model, each beside its controls and judged by a rule that was fixed before.

An effect is a function of a model and its `Setup` that gives results, and lines of the summary. Its docstring stands in the report.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookbook import report, scores, storage, tasks, tokens
from hookbook.card import ModelCard
from hookbook.errors import DataError, HookbookError, ResultError
from hookbook.loading import load
from hookbook.recipes.contrast_vectors import contrast_vector
from hookbook.recipes.function_vectors import FunctionVectors, HeadEffects, function_vector, head_effects
from hookbook.recipes.refusal_direction import select_direction
from hookbook.recipes.steering import Steering, steer
from hookbook.recipes.task_sweep import TaskSweep
from hookbook.recipes.task_vectors import Composition, TaskVectors, compose, task_vector
from hookbook.results import Result, need

if TYPE_CHECKING:
    import pandas as pd

    from hookbook.adapter import Adapter

Check = tuple[str, bool]
SIZES: dict[str, Any] = {"n_prompts": 24, "queries": 40}
OTHERS = {"country_capital": "present_past", "singular_plural": "present_past", "present_past": "country_capital", "capitalize": "country_capital"}
"""Tasks, and the other task whose vector is the control."""
GOOD, BAD = [" good", " great", " wonderful", " excellent", " amazing"], [" bad", " terrible", " awful", " horrible", " poor"]


@dataclass(frozen=True)
class Line:
    """One line of the summary."""

    effect: str
    what: str
    measured: float
    controls: dict[str, float]
    paper: str
    rule: tuple[Check, ...]
    """What must be true, and whether it is: the effect itself first, then its controls."""
    counts: bool = True
    """Whether this was expected of this model beforehand."""
    note: str = ""

    @property
    def holds(self) -> str:
        """`yes`: the whole rule; `partly`: the effect is there, and a control or a layer is not as it should be; `no`: the effect is not there;
        `not run`: there is no rule."""
        if not self.rule:
            return "not run"
        return "yes" if all(ok for _, ok in self.rule) else "partly" if self.rule[0][1] else "no"

    def cells(self) -> dict[str, Any]:
        """The columns of the summary, as plain data; a number that is not known is None."""
        numbers = {name: None if value != value else round(value, 3) for name, value in {"": self.measured, **self.controls}.items()}
        return {
            "effect": self.effect,
            "what": self.what,
            "measured": numbers.pop(""),
            "controls": numbers,
            "paper": self.paper,
            "holds": self.holds,
            "rule": "; ".join(f"{words}{'' if ok else ' (not so)'}" for words, ok in self.rule),
            "counts": self.counts,
            "note": self.note,
        }


@dataclass(frozen=True)
class Setup:
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
    counted: frozenset[tuple[str, str]] | None = None
    """Effects and tasks that decide the exit code; None: all with a rule of their own."""

    def expects(self, effect: str, task: str = "") -> bool:
        """Whether an effect on a task decides the exit code."""
        return self.counted is None or (effect, task) in self.counted

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
            + [("heads", ""), ("sum of vectors", "capitalize"), ("steering to French", ""), ("steering sentiment", "")]
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
            + [("sum of vectors", "capitalize"), ("steering to French", ""), ("steering sentiment", "")]
        ),
    ),
}

Found = tuple[dict[str, Result], list[Line]]


def task_vectors(model: Adapter, setup: Setup) -> Found:
    """The mean state behind examples, set or added at the last token of a query without examples (Hendel et al. 2023; Todd et al. 2023).

    Shuffled labels are no null: their vector still holds what kind of answer is wanted. Look at another task, at random and at late layers. Setting the state
    works in a window of middle layers and not after them; adding the difference fades slowly.
    """
    results: dict[str, Result] = {}
    for name, other in OTHERS.items():
        for mode in ("replace", "difference"):
            layers = "all" if mode == "replace" and name in ("country_capital", "singular_plural") else setup.near(model.card)
            results[f"task_vector_{mode}_{name}"] = task_vector(model, tasks.load(name), layers=layers, mode=mode, other=tasks.load(other), **SIZES)
    return results, [task_line(found, setup) for found in results.values() if isinstance(found, TaskVectors)]


def task_line(found: TaskVectors, setup: Setup) -> Line:
    """A task's vector at the layer that is judged."""
    at, layer = _place(found, setup.layer)
    measured, controls = _numbers(found, at)
    rule = [_least("accuracy", measured, setup.task), *_most(controls, {"zero-shot": setup.zero_shot, "random": setup.random, "other task": setup.other_task})]
    by_layer = [(site.layer or 0, float(x)) for site, x in zip(found.sites, found.accuracy, strict=True)]
    if found.mode == "replace" and setup.dead is not None:
        early, late = setup.dead
        controls["early or late"] = max(x for at, x in by_layer if at <= early or at >= late)
        rule += _most(controls, {"early or late": 0.15})
    works = [at for at, x in by_layer if x >= max(0.1, 0.5 * max(x for _, x in by_layer))]
    after = [x for at, x in by_layer if works and at > works[-1]]
    where = f"{found.task}, {found.mode}: at least half of the best at layers {', '.join(map(str, works)) or 'none'} of those tried"
    note = where + (f", and at most {max(after):.2f} after them." if after else ".")
    effect = f"task vector, {found.mode}"
    return Line(effect, f"{found.task}, layer {layer}", measured, controls, "works in middle layers", tuple(rule), setup.expects(effect, found.task), note)


def function_vectors(model: Adapter, setup: Setup) -> Found:
    """A few heads carry a task from examples to the last token; the sum of their mean outputs, added, makes the model do it (Todd et al. 2023).

    The paper adds ten heads as they are, at a layer about a third deep, in models of six billion parameters and more. Lines named "as published" do that here.
    The layer is the best on validation pairs, of a few around the middle.
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
        rule += [_least(f"effect of {layer}.{head}", float(found.mean[layer, head]), least) for layer, head, least in setup.top_heads]
        rule.append(("third <= 0.1", sizes[2] <= 0.1))
    else:
        rule = [_least("largest effect", sizes[0], 0.08), ("median of all <= 0.01", abs(controls["median of all"]) <= 0.01)]
    note = f"The largest mean indirect effects: {', '.join(f'{name} {size:+.2f}' for name, size in zip(names, sizes, strict=True))}."
    return Line(
        "heads", f"largest, {names[0]}", sizes[0], {f"second, {names[1]}": sizes[1], **controls}, "few matter", tuple(rule), setup.expects("heads"), note
    )


def function_line(effect: str, found: FunctionVectors, setup: Setup) -> Line:
    """A function vector at the layer that was best on validation pairs."""
    at, layer = _place(found, None)
    measured, controls = _numbers(found, at)
    rule = (_least("accuracy", measured, 0.55), *_most(controls, {"random heads": 0.2}))
    what = f"{found.task}, {len(found.heads)} heads x {found.settings['strength']:g}, layer {layer}"
    note = f"{found.task}: {len(found.heads)} heads added with strength {found.settings['strength']:g} give {measured:.2f}, {controls['with examples']:.2f} with examples."
    return Line(effect, what, measured, controls, "works", rule, effect == "function vector" and setup.expects(effect, found.task), note)


def sums(model: Adapter, setup: Setup) -> Found:
    """Vectors of lists of three: last copy + first answer - first copy should answer for the last item (Todd et al. 2023, section 3.3; here mean states are set).

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
    rule = (_least("accuracy", measured, setup.sum), _least("above the best of its parts", measured - parts, 0.25))
    return Line("sum of vectors", f"{task}, layer {layer}", measured, controls, "adds up", rule, setup.expects("sum of vectors", task))


def french(model: Adapter, setup: Setup) -> Found:
    """The mean state of French texts less that of English ones, added at all tokens, makes English openings go on in French.

    The score is the share of continuations with more French function words than English ones. Read the texts: in a small model they may say nothing.
    """
    layer = setup.french_layer if setup.french_layer is not None else model.card.n_layers // 3
    found = contrast_vector(model, *tasks.contrast("language_french"), position=slice(1, None))
    said = steer(model, found, tasks.openings("english")[:24], layers=[layer], strengths=[1, 2], score=scores.french_score, generate=12)
    return {"contrast_french": found, "steer_french": said}, [french_line(said, layer, setup)]


def french_line(said: Steering, layer: int, setup: Setup) -> Line:
    """The better strength of two, beside the worst of the controls."""
    measured, at = said.scores.mean(0)[0].max(0)
    controls = {"no vector": float(said.base.mean()), "random": float(said.random.mean(0).max())}
    rule = (_least("share in French", float(measured), 0.75), *_most(controls, {"no vector": 0.1, "random": 0.1}))
    note = f"An example: {said.prompts[0].text!r} goes on {said.said[0][1 + int(at)]!r}."
    what = f"layer {layer}, better of strengths {' and '.join(f'{x:g}' for x in said.strengths)}"
    return Line("steering to French", what, float(measured), controls, "steers", rule, setup.expects("steering to French"), note)


def sentiment(model: Adapter, setup: Setup) -> Found:
    """The mean state of favourable reviews less that of unfavourable ones, added with strength 2 and -2, moves the log-odds of good against bad words both ways."""
    layer = setup.sentiment_layer if setup.sentiment_layer is not None else model.card.n_layers * 2 // 3
    found = contrast_vector(model, *tasks.contrast("sentiment"))
    odds = steer(model, found, tasks.openings("neutral"), layers=[layer], strengths=[-2, -1, 1, 2], tokens=(GOOD, BAD))
    return {"contrast_sentiment": found, "steer_sentiment": odds}, [sentiment_line(odds, layer, setup)]


def sentiment_line(odds: Steering, layer: int, setup: Setup) -> Line:
    """Log-odds under +2, beside those under -2, under none and under random vectors."""
    base = float(odds.base.mean())
    (down, *_, up), (below, *_, above) = odds.scores.mean(0)[0].tolist(), odds.random.mean(0)[0].tolist()
    controls = {"no vector": base, "strength -2": down, "random +2": above, "random -2": below}
    rule = (_least("rise", up - base, 3), ("strength -2 <= 0", down <= 0))
    what = f"log-odds, layer {layer}, strength 2"
    return Line("steering sentiment", what, up, controls, "steers", rule, setup.expects("steering sentiment"))


def refusal(model: Adapter, setup: Setup) -> Found:
    """One direction decides whether a chat model refuses (Arditi et al. 2024, models of 1.8 billion parameters and more): is there one to choose?

    No threshold is set: neither of the two small models refuses by its first token, so there is nothing a direction could be of. That it tells the two kinds of
    requests apart shows nothing about what the model does.
    """
    effect, paper = "refusal direction", "one direction decides"
    if not getattr(model.tokenizer, "chat_template", None):
        return {}, [
            Line(effect, "needs a chat model", float("nan"), {}, paper, (), False, "This model has no chat template: it is no chat model, and refuses nothing.")
        ]
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


EFFECTS: dict[str, tuple[str, Callable[[Adapter, Setup], Found]]] = {
    "task-vectors": ("Task vectors", task_vectors),
    "function-vectors": ("Heads and function vectors", function_vectors),
    "sums": ("Sums of vectors", sums),
    "french": ("Steering to French", french),
    "sentiment": ("Steering sentiment", sentiment),
    "refusal": ("The refusal direction", refusal),
}


def vectors(name: str, out: str | os.PathLike[str], only: Sequence[str] = ()) -> list[Line]:
    """Run the effects on a model, and write a folder: a table and a picture of every result, `summary.csv`, and `report.html`.

    Args:
        name: A model name, as for `hookbook.load`.
        out: A new or empty folder; it appears whole or not at all.
        only: Names of `EFFECTS`; none: all of them.

    Raises:
        ResultError: The folder has something in it.
        DataError: No such effect.
        ModelError: The model cannot be found.
        Refused: What draws pictures is not installed.
    """
    from tqdm.auto import tqdm

    import hookbook

    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ResultError(f"{out} exists", "a report does not overwrite", "name a new folder with --out, or remove it")
    if unknown := [one for one in only if one not in EFFECTS]:
        raise DataError(f"no effect {unknown[0]!r}", "", f"use some of {', '.join(EFFECTS)}")
    plt = need("matplotlib.pyplot", "a report")
    need("pandas", "a report")
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # what libraries say while they load
        model = load(name)
    setup, lines, sections = SETUPS.get(name, Setup()), [], []
    with storage.whole_folder(out) as scratch, tqdm([key for key in EFFECTS if not only or key in only], desc="effects", file=sys.stderr) as bar:
        for key in bar:
            bar.set_postfix_str(key)
            title, effect = EFFECTS[key]
            begun = time.perf_counter()
            try:
                results, found = effect(model, setup)
            except HookbookError as error:  # of a model that cannot do this one
                results, found = {}, [Line(key, "not run", float("nan"), {}, "", (("it runs", False),), True, str(error))]
            seconds = time.perf_counter() - begun
            pictures = [_save(scratch, file, result, plt) for file, result in results.items()]
            words = f"{' '.join((inspect.getdoc(effect) or '').split())} {' '.join(line.note for line in found if line.note)} ({seconds:.0f} s)"
            sections.append((title, words, "".join(pictures)))
            lines += found
        frame(lines).to_csv(scratch / "summary.csv", index=False)
        seconds = time.perf_counter() - start
        page = report.page(
            f"Vectors in {name}",
            [("Summary", f"{verdict(lines)} {RULE} {len(EFFECTS) if not only else len(only)} effects took {seconds:.0f} s.", _summary(lines)), *sections],
            f"hookbook {hookbook.__version__}; {model.card.model_id} through {model.card.backend}, {model.card.dtype}; {seconds:.0f} s.",
        )
        report.write(scratch / "report.html", page)
    return lines


RULE = (
    "Holds here: yes, if the whole rule holds; partly, if the effect is there and a control or a layer is not as the rule has it; no, if the effect is not there. "
    "Rules were fixed before these runs. Accuracies are of an answer's first token among all tokens, on test pairs; layers count block outputs from 0."
)


def verdict(lines: Sequence[Line]) -> str:
    """How many of the lines that count hold."""
    counted = [line for line in lines if line.counts]
    return f"{sum(line.holds == 'yes' for line in counted)} of {len(counted)} effects that were expected of this model hold."


def frame(lines: Sequence[Line]) -> pd.DataFrame:
    """The summary as pandas, with controls as text."""
    import pandas as pd

    return pd.DataFrame([line.cells() | {"controls": controls_text(line)} for line in lines])


def number(value: float) -> str:
    """Two decimals; a dash for what is not known."""
    return "–" if value != value else f"{value:z.2f}"


def controls_text(line: Line) -> str:
    """Controls with their names."""
    return ", ".join(f"{name} {number(value)}" for name, value in line.controls.items())


def _summary(lines: Sequence[Line]) -> str:
    header = ["effect", "what", "measured", "controls", "the paper says", "holds here", "rule", "expected here"]
    rows = [[*map(str, (line.effect, line.what)), number(line.measured), controls_text(line), line.paper, line.holds] for line in lines]
    ends = [[line.cells()["rule"], "yes" if line.counts else "not known before"] for line in lines]
    return report.table(header, [row + end for row, end in zip(rows, ends, strict=True)], caption="Each effect beside its controls")


def _save(folder: Path, file: str, result: Result, plt: Any) -> str:
    """Write a result's table and picture; the picture as HTML."""
    result.to_frame().to_csv(folder / f"{file}.csv", index=False)
    figure: Any = result.plot().figure
    title = file.replace("_", " ")
    figure.suptitle(title)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    plt.close(figure)
    (folder / f"{file}.png").write_bytes(drawn.getvalue())
    return report.picture(drawn.getvalue(), f"{title}: {(inspect.getdoc(type(result).plot) or '').splitlines()[0]} The numbers are in {file}.csv.")


def _place(found: TaskSweep, layer: int | None) -> tuple[int, int]:
    """Where among a sweep's sites the layer is that is judged, and which it is."""
    layers = [site.layer or 0 for site in found.sites]
    at = layers.index(layer) if layer is not None else found.best_index
    return at, layers[at]


def _numbers(found: TaskSweep, at: int) -> tuple[float, dict[str, float]]:
    """Accuracy at a site, and of the controls."""
    controls = {name: float(values[at]) for name, values in found.controls.items()}
    return float(found.accuracy[at]), {"zero-shot": float(found.zero_shot), "with examples": float(found.few_shot), **controls}


def _least(name: str, value: float, limit: float) -> Check:
    return f"{name} >= {limit:g}", value >= limit


def _most(controls: dict[str, float], limits: dict[str, float | None]) -> list[Check]:
    return [(f"{name} <= {limit:g}", controls[name] <= limit) for name, limit in limits.items() if limit is not None]
