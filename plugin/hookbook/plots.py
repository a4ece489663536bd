"""Pictures that results share."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from hookbook.results import need, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def heat_map(
    ax: Axes | None,
    values: Tensor,
    words: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
    names: tuple[str, str, str],
    *,
    upwards: bool = False,
    limits: tuple[float, float] | None = (0, 1),
) -> Axes:
    """A heat map with a word in each cell where it fits.

    Args:
        ax: Where to draw; None: a new figure.
        values: `[row, column]`
        words: One text for each cell.
        rows, columns: Labels.
        names: Of the rows, of the columns, and of the values.
        upwards: Draw the first row at the bottom.
        limits: The values of the darkest and the brightest colour; None: the smallest and the largest.
    """
    plt = need("matplotlib.pyplot", "plot()")
    if ax is None:
        _, ax = plt.subplots(figsize=(max(6, 0.62 * len(columns) + 2), max(2.5, 0.34 * len(rows) + 1.5)), layout="constrained")
    assert ax is not None
    low, high = limits if limits is not None else (float(values.min()), float(values.max()))
    image = ax.imshow(values, aspect="auto", cmap="cividis", origin="lower" if upwards else "upper", vmin=low, vmax=high)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), [show(row) for row in rows], parse_math=False)
    ax.set_ylabel(names[0])
    ax.set_xlabel(names[1])
    ax.figure.colorbar(image, ax=ax).set_label(names[2])
    ax.figure.canvas.draw()
    box, points = ax.get_window_extent(), 72 / ax.figure.dpi
    width, size = box.width / len(columns) * points, min(8.0, box.height / len(rows) * points * 0.7)
    for y, line in enumerate(words):
        for x, word in enumerate(line):
            text = show(word.strip() or word)
            if size >= 4 and len(text) * size * 0.62 <= width:
                color = "white" if values[y, x] < (low + high) / 2 else "black"
                ax.text(x, y, text, ha="center", va="center", fontsize=size, color=color, parse_math=False)
    return ax


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which colour-blind readers can tell apart."""


def lines(
    ax: Axes | None, curves: dict[str, Tensor], names: tuple[str, str], *, labels: Sequence[str] | None = None, levels: dict[str, float] | None = None
) -> Axes:
    """Curves over the same places, and levels to compare them with.

    Args:
        ax: Where to draw; None: a new figure.
        curves: By name the values `[place]`; the first is drawn heavier.
        names: Of the places and of the values.
        labels: Of the places; None: their numbers.
        levels: By name a value that is drawn across.
    """
    plt = need("matplotlib.pyplot", "plot()")
    if ax is None:
        _, ax = plt.subplots(figsize=(7, 3.5), layout="constrained")
    assert ax is not None
    for at, (name, values) in enumerate(curves.items()):
        ax.plot(
            range(len(values)),
            values,
            label=name,
            color=COLOURS[at % len(COLOURS)],
            linewidth=2.2 if at == 0 else 1.2,
            marker="o" if len(values) < 60 else None,
            markersize=3,
        )
    for style, (name, value) in zip(("--", ":", "-."), (levels or {}).items(), strict=False):
        ax.axhline(value, color="0.35", linestyle=style, linewidth=1, label=name)
    if labels is not None:
        step = max(1, -(-len(labels) // 20))
        ax.set_xticks(range(0, len(labels), step), labels[::step])
    ax.set_xlabel(names[0])
    ax.set_ylabel(textwrap.fill(names[1], 40))
    if len(curves) + len(levels or {}) > 1:
        ax.legend(frameon=False, fontsize=8)
    return ax
