"""What every result has in common: frozen, saved as safetensors and JSON, drawn, shown and reported offline."""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from hookbook import storage
from hookbook.errors import Refused

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Result:
    """Base of results. Subclasses are frozen dataclasses of tensors (on the CPU), plain data, cards, tokens and sites."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.__repr__ = cls.__repr__  # a dataclass makes none, with every number, where its class has one

    def __repr__(self) -> str:
        """Kind, model, sizes and shapes in one line."""
        from hookbook.show.brief import line

        return line(self)

    def _repr_html_(self) -> str:
        """In notebooks the first rows of `to_frame()`."""
        from hookbook.show.brief import rows

        return rows(self)

    @abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """The numbers, long and tidy."""

    @abstractmethod
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw, and return the axes."""

    def view(self) -> View:
        """What a browser shows, without a network: of a result whose tokens matter something to click on, of others the table of
        `to_frame()`."""
        return View.table(self.to_frame(), type(self).__name__)

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write one HTML file with everything in it: what was run and how, the pictures, the table, the controls, the texts, and the view.

        It needs no network and no other file, and is smaller than 5 MB: what is longer is cut or left out, which the page says.

        Args:
            path: The file; it appears whole or not at all, and missing folders are made.

        Raises:
            Refused: matplotlib is not installed.
            ResultError: It would be larger all the same.
        """
        from hookbook.show import html as report, page as reporting

        return report.write(path, reporting.of(self))

    def sections(self) -> list[tuple[str, str, str]]:
        """What a report has of this kind of result alone: headings, a sentence or two, and HTML."""
        return []

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file with everything in it; the file appears whole or not at all."""
        return storage.write(path, type(self).__name__, {f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote. Nothing is unpickled.

        Raises:
            ResultError: The file is not a result, or of another kind or a newer format, or damaged.
        """
        data = storage.read(path, cls.__name__)
        try:
            return cls(**data)
        except (TypeError, ValueError) as error:
            raise storage.damaged(path, error) from error


@dataclass(frozen=True)
class View:
    """HTML that draws itself without a network, in a notebook or saved to a file."""

    html: str = field(repr=False)

    @classmethod
    def of(cls, picture: Any) -> View:
        """A circuitsvis picture, without its own display, which asks the network first."""
        from hookbook.show.circuitsvis import drawn

        return cls(drawn(picture.local_src))

    @classmethod
    def table(cls, frame: pd.DataFrame, caption: str, *, limit: int = 200) -> View:
        """A table with its index if that has a name; longer ones are cut, which the caption says."""
        from hookbook.show.html import frame_table

        return cls(frame_table(frame, caption, limit=limit))

    def __add__(self, other: View) -> View:
        """One below the other."""
        return View(self.html + other.html)

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a page that opens in any browser."""
        from hookbook.show import html as report

        return report.write(path, report.page("hookbook", [("", "", self.html)], ""))


def need(module: str, what: str, install: str = '"hookbook[viz]"') -> Any:
    """An optional library, or `Refused` with how to install it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Refused(what, f"{module.split('.')[0]} is not installed", f"pip install {install}") from error


def ending(text: str, n: int) -> str:
    """The last `n` characters of a text, and a mark where more was before them."""
    return text if len(text) <= n else "…" + text[1 - n :]


def show(token: str) -> str:
    """A token for display: white space and line breaks are made visible, control characters and half letters are marked; joiners of
    letters and signs stay."""
    text = token.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "⏎")
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else "·" for c in text) if text.strip() else "␣" * max(1, len(text))
