"""What suites of effects share: lines and their rules, running the effects, and the folder of tables, pictures and a page.

An effect is a function of a model and the suite's setup for it that gives results, and lines of the summary. Its docstring stands in the
report.
"""

from __future__ import annotations

import contextlib
import csv
import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hookbook import storage
from hookbook.errors import DataError, HookbookError, ResultError
from hookbook.models import packages
from hookbook.models.loading import load
from hookbook.results import Result
from hookbook.show import html as report, page as reporting
from hookbook.show.text import need

if TYPE_CHECKING:
    import pandas as pd

    from hookbook.adapter import Adapter

Check = tuple[str, bool]
RULE = (
    "Holds here: yes, if the whole rule holds; partly, if the effect is there and a control or a layer is not as the rule has it; no, "
    "if the effect is not there. "
    "Rules were fixed before these runs."
)


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
        """`yes`: the whole rule; `partly`: the effect is there, and a control or a layer is not as it should be; `no`: the effect is not
        there;
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


def least(name: str, value: float, limit: float) -> Check:
    """A number must be at least this large."""
    return f"{name} >= {limit:g}", value >= limit


def most(controls: Mapping[str, float], limits: Mapping[str, float | None]) -> list[Check]:
    """Controls must be at most this large; one whose limit is None may be anything."""
    return [(f"{name} <= {limit:g}", controls[name] <= limit) for name, limit in limits.items() if limit is not None]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Base of setups: what decides the exit code."""

    counted: frozenset[tuple[str, str]] | None = None
    """Effects, and what they are looked for in, such as a task; None: all with a rule of their own."""

    def expects(self, effect: str, what: str = "") -> bool:
        """Whether an effect was expected of this model beforehand."""
        return self.counted is None or (effect, what) in self.counted


Found = tuple[dict[str, Result], list[Line]]
"""Results by the names of their files, and lines of the summary."""
SetupT = TypeVar("SetupT", bound=Expected)


@dataclass(frozen=True)
class Suite(Generic[SetupT]):
    """Effects that are looked for together."""

    title: str
    effects: Mapping[str, tuple[str, Callable[[Adapter, SetupT], Found]]]
    """By what `only` calls them: a heading, and the effect."""
    setups: Mapping[str, SetupT]
    """By name of the model."""
    default: SetupT
    """For models that were not measured before."""
    numbers: str = ""
    """How the numbers are to be read."""

    def setup(self, name: str) -> SetupT:
        """Of a model by any name that `hookbook.load` knows it by."""
        own = {known.lower(): key for key, package in packages.PACKAGES.items() for known in (key, package.hub_name)}
        return self.setups.get(own.get(name.lower(), name), self.default)


def run(suite: Suite[Any], name: str, out: str | os.PathLike[str], only: Sequence[str] = ()) -> list[Line]:
    """Run the effects on a model, and write a folder: a table and the pictures of every result, `summary.csv`, and `report.html`.

    Args:
        suite: Whose effects.
        name: A model name, as for `hookbook.load`.
        out: A new or empty folder; it appears whole or not at all.
        only: Names of effects; none: all of them.

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
    if unknown := [one for one in only if one not in suite.effects]:
        raise DataError(f"no effect {unknown[0]!r}", "", f"use some of {', '.join(suite.effects)}")
    need("matplotlib", "a report")
    need("pandas", "a report")
    start = time.perf_counter()
    lines, sections = [], []
    chosen = [key for key in suite.effects if not only or key in only]
    with contextlib.redirect_stdout(sys.stderr):  # what libraries say
        model, setup = load(name), suite.setup(name)
    with contextlib.redirect_stdout(sys.stderr), storage.whole_folder(out) as scratch, tqdm(chosen, desc="effects", file=sys.stderr) as bar:
        for key in bar:
            bar.set_postfix_str(key)
            title, effect = suite.effects[key]
            begun = time.perf_counter()
            try:
                results, found = effect(model, setup)
                pictures = [picture for file, result in results.items() for picture in _save(scratch, file, result)]
            except Exception as error:  # hookbook's own: of a model that cannot do this one; any other must not lose the effects that ran
                why = str(error) if isinstance(error, HookbookError) else f"{type(error).__name__}: {error}"
                pictures, found = [], [Line(key, "not run", float("nan"), {}, "", (("it runs", False),), True, why)]
            seconds = time.perf_counter() - begun
            words = (
                f"{' '.join((inspect.getdoc(effect) or '').split())} {' '.join(line.note for line in found if line.note)} ({seconds:.0f} s)"
            )
            sections.append((title, words, "".join(pictures)))
            lines += found
        (scratch / "summary.csv").write_bytes(to_csv(frame(lines)).encode())
        seconds = time.perf_counter() - start
        page = report.page(
            f"{suite.title} in {name}",
            [
                ("Summary", f"{verdict(lines)} {RULE} {suite.numbers} {len(chosen)} effects took {seconds:.0f} s.", _summary(lines)),
                *sections,
            ],
            f"hookbook {hookbook.__version__}; {model.card.model_id} through {model.card.backend}, {model.card.dtype}; {seconds:.0f} s.",
        )
        report.write(scratch / "report.html", page)
    return lines


def verdict(lines: Sequence[Line]) -> str:
    """How many of the lines that count hold."""
    counted = [line for line in lines if line.counts]
    return f"{sum(line.holds == 'yes' for line in counted)} of {len(counted)} effects that were expected of this model hold."


def frame(lines: Sequence[Line]) -> pd.DataFrame:
    """The summary as pandas, with controls as text."""
    import pandas as pd

    return pd.DataFrame([line.cells() | {"controls": controls_text(line)} for line in lines])


def to_csv(frame: pd.DataFrame) -> str:
    """A frame as CSV; every text is quoted, since one may hold a bare carriage return, which pandas leaves unquoted."""
    return frame.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)


def number(value: Any) -> str:
    """Two decimals; a dash for what is not known."""
    return "–" if value != value else f"{float(value):z.2f}"


def controls_text(line: Line) -> str:
    """Controls with their names."""
    return ", ".join(f"{name} {number(value)}" for name, value in line.controls.items())


def _summary(lines: Sequence[Line]) -> str:
    header = ["effect", "what", "measured", "controls", "the paper says", "holds here", "rule", "expected here"]
    rows = [[*map(str, (line.effect, line.what)), number(line.measured), controls_text(line), line.paper, line.holds] for line in lines]
    ends = [[line.cells()["rule"], "yes" if line.counts else "not known before"] for line in lines]
    return report.table(header, [row + end for row, end in zip(rows, ends, strict=True)], caption="Each effect beside its controls")


def _save(folder: Path, file: str, result: Result) -> Iterator[str]:
    """Write a result's table and pictures; the pictures as HTML."""
    (folder / f"{file}.csv").write_bytes(to_csv(result.to_frame()).encode())
    for plot, words, png in reporting.pictures(result):
        name = file + plot.removeprefix("plot")
        (folder / f"{name}.png").write_bytes(png)
        numbers = f" The numbers are in {file}.csv." if name == file else ""
        yield report.picture(png, f"{name.replace('_', ' ')}: {words}{numbers}")
