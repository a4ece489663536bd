"""One effect on one model: lines that stand beside their controls and are judged by rules, tables and pictures, and how long it took.

An effect is a function of a model and a setup that gives results, and lines of the summary. Its docstring is the question it asks, and
stands in the report; the line above it (`Suite.effect`) says the rest.
"""

from __future__ import annotations

import csv
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from hookbook.errors import HookbookError
from hookbook.results import Result
from hookbook.show import page

if TYPE_CHECKING:
    import pandas as pd

    from hookbook.adapter import Adapter

Check = tuple[str, bool]


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
        there; `not run`: there is no rule."""
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


Found = tuple[Mapping[str, Result], Sequence[Line]]
"""Results by the names of their files, and lines of the summary."""
SetupT = TypeVar("SetupT", bound=Expected)
Find = Callable[["Adapter", SetupT], Found]


class File(NamedTuple):
    """A table; or a picture, and what is on it in words."""

    name: str
    data: bytes
    words: str = ""


@dataclass(frozen=True)
class Outcome:
    """What came of an effect on a model; of one that failed, why, and a line that does not hold."""

    effect: Effect[Any]
    lines: tuple[Line, ...]
    seconds: float
    results: Mapping[str, Result]
    files: tuple[File, ...]
    """A table and the pictures of every result."""
    error: str = ""

    @property
    def holds(self) -> str:
        """The worst of the lines that count, or of all if none does."""
        said = {line.holds for line in self.lines if line.counts} or {line.holds for line in self.lines}
        return next((word for word in ("no", "partly", "yes") if word in said), "not run")


@dataclass(frozen=True)
class Effect(Generic[SetupT]):
    """A question about models, and how its answer is found."""

    key: str
    """What `only` calls it."""
    heading: str
    find: Find[SetupT]
    minutes: float
    """About how long it takes on a model of a quarter of a billion parameters, on one core."""

    @property
    def question(self) -> str:
        """The function's docstring, on one line."""
        return " ".join((inspect.getdoc(self.find) or "").split())

    def run(self, model: Adapter, setup: SetupT) -> Outcome:
        """Find it, and draw what was found. Whatever fails is told in the outcome: it must not lose the effects that ran."""
        begun, results, files, error = time.perf_counter(), {}, [], ""
        try:
            results, lines = self.find(model, setup)
            for name, result in results.items():
                files.extend(_drawn(name, result))
        except Exception as failed:  # hookbook's own: of a model that cannot do this one
            error = str(failed) if isinstance(failed, HookbookError) else f"{type(failed).__name__}: {failed}"
            lines = [Line(self.key, "not run", float("nan"), {}, "", (("it runs", False),), True, error)]
        return Outcome(self, tuple(lines), time.perf_counter() - begun, results, tuple(files), error)


def _drawn(name: str, result: Result) -> Iterator[File]:
    """A result's table and pictures."""
    yield File(f"{name}.csv", to_csv(result.to_frame()).encode())
    for plot, words, png in page.pictures(result):
        picture = name + plot.removeprefix("plot")
        numbers = f" The numbers are in {name}.csv." if picture == name else ""
        yield File(f"{picture}.png", png, f"{picture.replace('_', ' ')}: {words}{numbers}")


def to_csv(frame: pd.DataFrame) -> str:
    """A frame as CSV; every text is quoted, since one may hold a bare carriage return, which pandas leaves unquoted."""
    return frame.to_csv(index=False, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
