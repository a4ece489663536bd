"""Tables of likeliest tokens, coloured by probability: what a heat map of tokens draws, for a page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from hookbook.show.html import box
from hookbook.show.plots import MAGNITUDES, Cells, ink
from hookbook.show.text import need, show

GRID_ROWS = 100
"""How many rows of a coloured table a page shows."""


class Grid(Protocol):
    """A result with likeliest tokens in cells, such as a patchscope."""

    @property
    def logprobs(self) -> Tensor: ...

    def cells(self, prompt: int = 0) -> Cells: ...

    def token(self, n: int, p: int, rank: int = 0, /) -> str: ...


def grid_table(result: Grid, prompt: int = 0) -> str:
    """The likeliest token in each cell of what `result.plot` draws, coloured by probability; of the first `GRID_ROWS` rows."""
    colours = need("matplotlib", "a report").colormaps[MAGNITUDES]
    rows, columns, row_name, column_name, cells = result.cells(prompt)
    lines = []
    for label, line in list(zip(rows, cells, strict=True))[:GRID_ROWS]:
        tokens = []
        for n, p in line:
            chance = float(result.logprobs[n, p, 0].exp())
            red, green, blue, _ = colour = colours(chance)
            others = ", ".join(show(result.token(n, p, r)) for r in range(result.logprobs.shape[-1]))
            style = f"background:rgb({255 * red:.0f},{255 * green:.0f},{255 * blue:.0f});color:{ink(colour)}"
            tokens.append(
                f'<td style="{style}" title="{html.escape(f"{100 * chance:.0f} %: {others}")}">{html.escape(show(result.token(n, p)))}</td>'
            )
        lines.append(f"<tr><th scope=row>{html.escape(show(label))}</th>{''.join(tokens)}</tr>")
    head = "".join(f"<th scope=col>{html.escape(column)}</th>" for column in ("", *columns))
    words = f"{row_name} down, {column_name} across; dark is unlikely, bright is likely"
    words += f"; rows after the first {GRID_ROWS} are left out" if len(rows) > GRID_ROWS else ""
    return box(
        f"<table><caption>{html.escape(words)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>",
        words,
        "grid",
    )


def grid_sections(result: Grid, texts: Sequence[str]) -> list[tuple[str, str, str]]:
    """The likeliest tokens of the first prompts, or of all prompts in one table if it has a row for each, as a section of a report."""
    if result.cells()[2] == "prompt":
        return [("Tokens", "", grid_table(result))]
    more = "" if len(texts) == 1 else f"Of the first {len(texts)} prompts."
    return [("Tokens", more, "".join(f"<h3>{html.escape(show(text[-200:]))}</h3>{grid_table(result, n)}" for n, text in enumerate(texts)))]
