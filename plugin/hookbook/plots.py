"""Pictures that results share."""

from __future__ import annotations

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
