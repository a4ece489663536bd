"""Pictures that results share."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from hookbook.results import View, need, show
from hookbook.sites import Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cells = tuple[list[str], list[str], str, str, list[list[tuple[int, int]]]]
"""Labels of rows and columns of a picture, names of the axes, and which (first, second) index of a result is in each cell."""


def site_labels(sites: Sequence[Site]) -> list[str]:
    """Layers, or whole sites if they are of several kinds or have no layer."""
    return [str(site.layer) if len({s.name for s in sites}) == 1 and site.layer is not None else str(site) for site in sites]


def samples(cells: Cells, token: Callable[[int, int, int], str], logprobs: Tensor, texts: Sequence[Sequence[str]] = ()) -> View:
    """An interactive picture (circuitsvis): choose a row and a column, see the likeliest tokens by probability, and a text.

    Args:
        cells: What is where.
        token: The text of a cell's likeliest token, by both indices and rank.
        logprobs: Of these `[first, second, rank]`.
        texts: What was generated, by both indices; empty: nothing.
    """
    topk_samples = need("circuitsvis.topk_samples", "view()").topk_samples
    rows, columns, row_name, column_name, where = cells
    words, values = [], []
    for line in where:
        words.append([[[show(token(n, p, r)) + " " for r in range(logprobs.shape[-1])], *([[texts[n][p]]] if texts else [])] for n, p in line])
        values.append([[logprobs[n, p].exp().tolist(), *([[0.0]] if texts else [])] for n, p in line])
    return View.of(topk_samples(words, values, row_name.capitalize(), column_name.capitalize(), [show(row) for row in rows], columns))


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
    ax: Axes | None,
    curves: dict[str, Tensor],
    names: tuple[str, str],
    *,
    labels: Sequence[str] | None = None,
    levels: dict[str, float] | None = None,
    bands: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> Axes:
    """Curves over the same places, and levels to compare them with.

    Args:
        ax: Where to draw; None: a new figure.
        curves: By name the values `[place]`; the first is drawn heavier.
        names: Of the places and of the values.
        labels: Of the places; None: their numbers.
        levels: By name a value that is drawn across.
        bands: By name of a curve what is shaded around it, from and to `[place]`.
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
            linestyle=("-", "--")[at // len(COLOURS) % 2],
            linewidth=2.2 if at == 0 else 1.2,
            marker=None if len(values) >= 60 else "os"[at // len(COLOURS) % 2],
            markersize=3,
        )
        if bands and name in bands:
            ax.fill_between(range(len(values)), *bands[name], color=COLOURS[at % len(COLOURS)], alpha=0.2, linewidth=0)
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


def bars(ax: Axes | None, names: Sequence[str], values: Tensor, what: str) -> Axes:
    """One bar for each name, the first on top, in another colour below 0.

    Args:
        ax: Where to draw; None: a new figure.
        names: Of the bars.
        values: `[bar]`
        what: What the values are.
    """
    plt = need("matplotlib.pyplot", "plot()")
    if ax is None:
        _, ax = plt.subplots(figsize=(7, max(2.0, 0.28 * len(names) + 1)), layout="constrained")
    assert ax is not None
    ax.barh(range(len(names)), values.tolist(), color=[COLOURS[value < 0] for value in values.tolist()])
    ax.set_yticks(range(len(names)), [show(name) for name in names], parse_math=False)
    ax.invert_yaxis()
    ax.axvline(0, color="0.35", linewidth=0.8)
    ax.set_xlabel(what)
    return ax
