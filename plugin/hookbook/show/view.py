"""What a browser shows of a result, without a network."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookbook.show import html
from hookbook.show.circuitsvis import drawn

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class View:
    """HTML that draws itself without a network, in a notebook or saved to a file."""

    html: str = field(repr=False)

    @classmethod
    def of(cls, picture: Any) -> View:
        """A circuitsvis picture, without its own display, which asks the network first."""
        return cls(drawn(picture.local_src))

    @classmethod
    def table(cls, frame: pd.DataFrame, caption: str, *, limit: int = 200) -> View:
        """A table with its index if that has a name; longer ones are cut, which the caption says."""
        return cls(html.frame_table(frame, caption, limit=limit))

    def __add__(self, other: View) -> View:
        """One below the other."""
        return View(self.html + other.html)

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a page that opens in any browser."""
        return html.write(path, html.page("hookbook", [("", "", self.html)], ""))
