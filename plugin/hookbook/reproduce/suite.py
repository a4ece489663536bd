"""Suites of effects: running them on a model, and the folder of tables, pictures and a page."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from hookbook import storage
from hookbook.errors import DataError, ResultError
from hookbook.models import packages
from hookbook.models.loading import load
from hookbook.reproduce.effect import Effect, Find, Line, Outcome, SetupT, to_csv
from hookbook.show import html
from hookbook.show.text import need

if TYPE_CHECKING:
    import pandas as pd

    from hookbook.adapter import Adapter

RULE = (
    "Holds here: yes, if the whole rule holds; partly, if the effect is there and a control or a layer is not as the rule has it; no, "
    "if the effect is not there. "
    "Rules were fixed before these runs."
)
COLUMNS = ("effect", "what", "measured", "controls", "the paper says", "holds here")


@dataclass(frozen=True)
class Suite(Generic[SetupT]):
    """Effects that are looked for together, in the order in which they are written down."""

    title: str
    setups: Mapping[str, SetupT]
    """By name of the model."""
    default: SetupT
    """For models that were not measured before."""
    numbers: str = ""
    """How the numbers are to be read."""
    effects: dict[str, Effect[SetupT]] = field(default_factory=dict)
    """By their keys."""

    def effect(self, heading: str, *, minutes: float, key: str = "") -> Callable[[Find[SetupT]], Find[SetupT]]:
        """The line above a function that makes it an effect of this suite; its key is the function's name, unless another is given."""

        def add(find: Find[SetupT]) -> Find[SetupT]:
            effect = Effect(key or find.__name__.replace("_", "-"), heading, find, minutes)
            if self.effects.setdefault(effect.key, effect) is not effect:
                raise DataError(f"two effects {effect.key!r} in {self.title}", "", "give one another name, or a key")
            return find

        return add

    def setup(self, name: str) -> SetupT:
        """Of a model by any name that `hookbook.load` knows it by."""
        own = {known.lower(): key for key, package in packages.PACKAGES.items() for known in (key, package.hub_name)}
        return self.setups.get(own.get(name.lower(), name), self.default)


def run(suite: Suite[Any], name: str, out: str | os.PathLike[str], only: Sequence[str] = ()) -> list[Outcome]:
    """Run the effects on a model, and write a folder: a table and the pictures of every result, `summary.csv`, and `report.html`.

    Args:
        suite: Whose effects.
        name: A model name, as for `hookbook.load`.
        out: A new or empty folder; it appears whole or not at all.
        only: Names of effects; none: all of them.

    Returns:
        What came of each effect, without the results themselves, which may be large.

    Raises:
        ResultError: The folder has something in it.
        DataError: No such effect.
        ModelError: The model cannot be found.
        Refused: What draws pictures is not installed.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ResultError(f"{out} exists", "a report does not overwrite", "name a new folder with --out, or remove it")
    if unknown := [one for one in only if one not in suite.effects]:
        raise DataError(f"no effect {unknown[0]!r}", "", f"use some of {', '.join(suite.effects)}")
    need("matplotlib", "a report")
    need("pandas", "a report")
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # what libraries say
        model, setup = load(name), suite.setup(name)
        with storage.whole_folder(out) as scratch:
            chosen = [effect for key, effect in suite.effects.items() if not only or key in only]
            outcomes = [_written(effect.run(model, setup), scratch) for effect in _shown(chosen)]
            (scratch / "summary.csv").write_bytes(to_csv(frame(lines_of(outcomes))).encode())
            html.write(scratch / "report.html", _page(suite, name, model, outcomes, time.perf_counter() - start))
    return outcomes


def _shown(effects: Sequence[Effect[Any]]) -> Iterator[Effect[Any]]:
    """One after the other, with a bar of progress."""
    from tqdm.auto import tqdm

    with tqdm(effects, desc="effects", file=sys.stderr) as bar:
        for effect in bar:
            bar.set_postfix_str(effect.key)
            yield effect


def _written(outcome: Outcome, folder: Path) -> Outcome:
    """Its files in the folder; without its results."""
    for file in outcome.files:
        (folder / file.name).write_bytes(file.data)
    return replace(outcome, results={})


def lines_of(outcomes: Sequence[Outcome]) -> list[Line]:
    """The lines of the summary."""
    return [line for outcome in outcomes for line in outcome.lines]


def verdict(lines: Sequence[Line]) -> str:
    """How many of the lines that count hold."""
    counted = [line for line in lines if line.counts]
    return f"{sum(line.holds == 'yes' for line in counted)} of {len(counted)} effects that were expected of this model hold."


def frame(lines: Sequence[Line]) -> pd.DataFrame:
    """The summary as pandas, with controls as text."""
    import pandas as pd

    return pd.DataFrame([line.cells() | {"controls": controls_text(line)} for line in lines])


def number(value: Any) -> str:
    """Two decimals; a dash for what is not known."""
    return "–" if value != value else f"{float(value):z.2f}"


def controls_text(line: Line) -> str:
    """Controls with their names."""
    return ", ".join(f"{name} {number(value)}" for name, value in line.controls.items())


def row(line: Line) -> list[str]:
    """A line under `COLUMNS`."""
    return [line.effect, line.what, number(line.measured), controls_text(line), line.paper, line.holds]


def _page(suite: Suite[Any], name: str, model: Adapter, outcomes: Sequence[Outcome], seconds: float) -> str:
    """A summary, and a section for each effect."""
    from hookbook import __version__

    lines, card = lines_of(outcomes), model.card
    words = f"{verdict(lines)} {RULE} {suite.numbers} {len(outcomes)} effects took {seconds:.0f} s."
    footer = f"hookbook {__version__}; {card.model_id} through {card.backend}, {card.dtype}; {seconds:.0f} s."
    return html.page(f"{suite.title} in {name}", [("Summary", words, _summary(lines)), *map(section, outcomes)], footer)


def _summary(lines: Sequence[Line]) -> str:
    rows = [[*row(line), line.cells()["rule"], "yes" if line.counts else "not known before"] for line in lines]
    return html.table([*COLUMNS, "rule", "expected here"], rows, caption="Each effect beside its controls")


def section(outcome: Outcome) -> tuple[str, str, str]:
    """An effect on a page: its heading; its question, what the lines note and how long it took; and its pictures."""
    notes = " ".join(line.note for line in outcome.lines if line.note)
    pictures = [html.picture(file.data, file.words) for file in outcome.files if file.words and not outcome.error]
    return outcome.effect.heading, f"{outcome.effect.question} {notes} ({outcome.seconds:.0f} s)", "".join(pictures)
