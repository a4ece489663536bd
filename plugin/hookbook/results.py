"""What every result has in common: frozen, saved as safetensors and JSON, shown offline."""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import dataclass, fields
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

    @abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """The numbers, long and tidy."""

    @abstractmethod
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw, and return the axes."""

    @abstractmethod
    def view(self) -> View:
        """An interactive picture that needs no network."""

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

    html: str

    @classmethod
    def of(cls, picture: Any) -> View:
        """A circuitsvis picture; its own display asks the network first, and lets a token end the script it stands in."""
        head, call, rest = picture.local_src.rpartition("CircuitsVis.render(")
        data, end, tail = rest.rpartition("</script>")
        return cls(head + call + data.replace("</", "<\\/").replace("<!--", "<\\!--") + end + tail)

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a page that opens in any browser."""
        path = Path(path)
        path.write_text(f'<!doctype html><html lang="en"><meta charset="utf-8"><title>hookbook</title><body>{self.html}</body></html>', encoding="utf-8")
        return path


def need(module: str, what: str, install: str = '"hookbook[viz]"') -> Any:
    """An optional library, or `Refused` with how to install it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Refused(what, f"{module.split('.')[0]} is not installed", f"pip install {install}") from error


def show(token: str) -> str:
    """A token for display: white space and line breaks are made visible, control characters and half letters are marked."""
    text = token.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "⏎")
    return "".join(c if c.isprintable() else "·" for c in text) if text.strip() else "␣" * max(1, len(text))
