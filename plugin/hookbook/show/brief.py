"""Results in a line, and in a few rows."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch import Tensor

from hookbook.card import ModelCard
from hookbook.errors import HookbookError
from hookbook.show.html import frame_table
from hookbook.sites import Site
from hookbook.tokens import Tokens

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

LONGEST = 300
"""Characters of a line."""
ROWS = 20
_SIZES = {"prompts", "sources", "tasks", "sites", "pairs", "edges", "windows", "heads", "features", "strengths", "ranks", "betas"} | {
    "train",
    "test",
    "changes",
    "edits",
}
"""Fields of which it is said how many there are."""


class Shown(Protocol):
    """A result, as what shows it sees it."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def to_frame(self) -> pd.DataFrame: ...

    def plot(self, ax: Axes | None = None) -> Axes: ...

    def sections(self) -> Sequence[tuple[str, str, str]]: ...


def models(result: Shown) -> str:
    """The names of a result's models."""
    cards = [value for _, value in _fields(result) if isinstance(value, ModelCard)]
    return " and ".join(dict.fromkeys(card.model_id for card in cards))


def line(result: Shown) -> str:
    """Its kind, its model, what was asked for, how many there are, and the shapes of its tensors, of which no number is looked at."""
    values = _fields(result)
    words = [_cut(models(result), 100), *(word for name, value in values for word in _words(name, value))]
    words += [shape for name, value in values for shape in _shapes(name, value)]
    head, room = f"{type(result).__name__}(", ""
    for word in filter(None, words):
        if len(head) + len(room) + len(word) + len(", ...)") > LONGEST:
            return f"{head}, ...)"
        head, room = head + room + word, ", "
    return f"{head})"


def rows(result: Shown) -> str:
    """The first rows of its frame as HTML; the line, if its numbers are not here yet."""
    try:
        return frame_table(result.to_frame(), " of ".join(filter(None, (type(result).__name__, models(result)))), limit=ROWS)
    except HookbookError:
        return f"<p>{html.escape(line(result))}</p>"


def _fields(result: Any) -> list[tuple[str, Any]]:
    return [(f.name, getattr(result, f.name)) for f in fields(result)]


def _words(name: str, value: Any) -> Iterator[str]:
    """What is said of a field that is no tensor."""
    if isinstance(value, Site):
        yield str(value) if name == "site" else f"{name} {value}"
    elif isinstance(value, (str, Tokens)) and value and name != "page":
        text = value.text if isinstance(value, Tokens) else value
        yield f"{name} {_cut(text, 40)!r}"
    elif isinstance(value, (int, float)):
        yield f"{value} {name[2:]}" if name.startswith("n_") else f"{name} {value:.4g}"
    elif isinstance(value, tuple) and value and name in _SIZES:
        yield f"{_many(value)} {name[:-1] if len(value) == 1 and name.endswith('s') else name}"


def _cut(text: str, n: int) -> str:
    return text if len(text) <= n else f"{text[: n - 1]}…"


def _many(values: tuple[Any, ...]) -> str:
    """How many there are; of all pairs of two sets, how many of each."""
    if all(isinstance(value, tuple) and len(value) == 2 for value in values):
        sides = [len({value[side] for value in values}) for side in (0, 1)]
        if min(sides) > 1 and sides[0] * sides[1] == len(values):
            return f"{sides[0]} x {sides[1]}"
    return str(len(values))


def _shapes(name: str, value: Any) -> Iterator[str]:
    """The shape of a tensor, or of several by name."""
    if isinstance(value, Tensor):
        yield f"{name} {list(value.shape)}"
    elif isinstance(value, dict) and value and all(isinstance(one, Tensor) for one in value.values()):
        yield f"{name} {len(value)} x {list(next(iter(value.values())).shape)}"
