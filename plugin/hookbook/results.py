"""What every result has in common: frozen, saved as safetensors and JSON, drawn, shown and reported offline."""

from __future__ import annotations

import math
import os
import re
from abc import abstractmethod
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

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
        """Write one safetensors file with everything in it; the file appears whole or not at all.

        Raises:
            ResultError: It cannot be written there, such as on a disk that is full.
        """
        return storage.write(path, type(self).__name__, {f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote. Nothing is unpickled.

        Raises:
            ResultError: The file is not a result, or of another kind or a newer format, or damaged: also if shapes do not fit each other.
        """
        data = storage.read(path, cls.__name__)
        try:
            result = cls(**data)
            _check_shapes(result)
        except (TypeError, ValueError) as error:
            raise storage.damaged(path, error) from error
        return result


@cache
def _shapes(kind: type) -> dict[str, list[list[str]]]:
    """The shapes that the docstrings of a result's fields name, such as `[n, site]`; where there are several, any may be."""
    found = {name: re.findall(r"`\[([^\]`]+)\]", text) for name, text in page.meanings(kind).items()}
    return {name: [shape.split(", ") for shape in shapes] for name, shapes in found.items() if shapes}


def _check_shapes(result: Result) -> None:
    """Raise `ValueError` unless what docstrings call by one name has one size: in tensors, in lists (`site` is one of `sites`) and in the
    card."""
    data = {f.name: getattr(result, f.name) for f in fields(result)}
    sizes = {key: len(value) for name, value in data.items() if isinstance(value, tuple) for key in (name, name.removesuffix("s"))}
    sizes |= {name: value for name, value in data.items() if isinstance(value, int)}
    if (card := data.get("card")) is not None:
        sizes |= {"layer": card.n_layers, "head": card.n_heads, "d_model": card.d_model}
        if site := data.get("site") or next(iter(data.get("sites", ())), None):
            sizes["width"] = site.width(card)
    each: dict[int, dict[str, int]] = {}  # of the tensors of a tuple, such as sources of several widths
    for name, shapes in _shapes(type(result)).items():
        value = data[name]
        several = isinstance(value, tuple) and all(isinstance(x, Tensor) for x in value)
        for i, x in enumerate(value.values() if isinstance(value, dict) else value if several else [value]):
            shape = list(x.shape) if isinstance(x, Tensor) else [len(x)] if isinstance(x, tuple) else []
            if shape in ([], [0]):  # what was not asked for
                continue
            known = sizes | each.get(i, {}) if several else sizes
            found = [_new_sizes(shape, dims[: len(shape)] if isinstance(x, tuple) else dims, known) for dims in shapes]
            new = next((new for new in found if new is not None), None)
            if new is None:
                raise ValueError(f"{name} has shape {shape}, where {' or '.join(', '.join(dims) for dims in shapes)} is meant")
            (each.setdefault(i, {}) if several else sizes).update(new)


def _new_sizes(shape: list[int], dims: list[str], sizes: dict[str, int]) -> dict[str, int] | None:
    """The sizes of dimensions that a shape is the first to have; None if it has not these dimensions."""
    if dims[-1] == "...":
        shape, dims = shape[: len(dims) - 1], dims[:-1]
    found: dict[str, int] = {}
    for dim, n in zip(dims, shape, strict=False):
        try:
            size = sum(math.prod(int(x) if x.isdigit() else (sizes | found)[x] for x in term.split(" * ")) for term in dim.split(" + "))
        except KeyError:
            size = sizes.get(dim, found.setdefault(dim, n))
        if size != n:
            return None
    return found if len(dims) == len(shape) else None
