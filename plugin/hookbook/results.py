"""What every result has in common: frozen, saved as safetensors and JSON, drawn, shown and reported offline."""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from hookbook import storage
from hookbook.show import brief, html, page
from hookbook.show.view import View as View

if TYPE_CHECKING:  # what results are annotated with; neither is imported before something is drawn or listed
    from matplotlib.axes import Axes as Axes
    from pandas import DataFrame as DataFrame
else:
    Axes = DataFrame = Any


@dataclass(frozen=True, eq=False)
class Result:
    """Base of results. Subclasses are frozen dataclasses of tensors (on the CPU), plain data, cards, tokens and sites."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.__repr__ = cls.__repr__  # a dataclass makes none, with every number, where its class has one

    def __repr__(self) -> str:
        """Kind, model, sizes and shapes in one line."""
        return brief.line(self)

    def _repr_html_(self) -> str:
        """In notebooks the first rows of `to_frame()`."""
        return brief.rows(self)

    @abstractmethod
    def to_frame(self) -> DataFrame:
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
        return html.write(path, page.of(self, None if type(self).view is Result.view else self.view))

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
