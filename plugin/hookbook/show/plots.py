"""Pictures that results share. Their style holds in them alone: nobody's matplotlib settings are changed."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookbook.show.fonts import FAMILY, families, spelt
from hookbook.show.text import need, show
from hookbook.show.view import View
from hookbook.sites import Site

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cells = tuple[list[str], list[str], str, str, list[list[tuple[int, int]]]]
"""Labels of rows and columns of a picture, names of the axes, and which (first, second) index of a result is in each cell."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, which colour-blind readers can tell apart."""
MAGNITUDES, SIGNED = "cividis", "RdBu"
"""Maps that colour-blind readers can read: from dark to bright, and from red (below 0) over white to blue (above), as in circuitsvis."""
SIZE, SMALLEST = 8.0, 6.0
"""Of letters in cells and at ticks, in points: what is wanted, and what is still read."""
STYLE = {
    "font.family": [FAMILY],
    "font.size": 9,
    "text.usetex": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": SIZE,
    "ytick.labelsize": SIZE,
    "legend.fontsize": SIZE,
    "legend.frameon": False,
}


@contextmanager
def drawing(ax: Axes | None, size: tuple[float, float], title: str = "") -> Iterator[Axes]:
    """Axes to draw on in hookbook's style: those given, or of a new figure of this size in inches. A title that is there stays."""
    plt = need("matplotlib.pyplot", "plot()")
    # made before the context: the first figure loads the backend, and what a notebook's sets then would be undone, so that no later
    # picture were shown
    figure = plt.figure(figsize=size, layout="constrained") if ax is None else None
    try:
        with plt.rc_context(STYLE):
            if figure is not None:
                ax = figure.subplots()
            assert ax is not None
            yield ax
            if title and not any(map(ax.get_title, ("left", "center", "right"))):
                inches = ax.get_window_extent().width / ax.figure.dpi
                text = "\n".join(textwrap.wrap(spelt(show(title)), max(20, int(13 * inches))))
                ax.set_title(text, loc="left", family=families([text]), parse_math=False)
    except BaseException:
        if figure is not None:
            plt.close(figure)
        raise


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
        words.append(
            [[[show(token(n, p, r)) + " " for r in range(logprobs.shape[-1])], *([[texts[n][p]]] if texts else [])] for n, p in line]
        )
        values.append([[logprobs[n, p].exp().tolist(), *([[0.0]] if texts else [])] for n, p in line])
    return View.of(topk_samples(words, values, row_name.capitalize(), column_name.capitalize(), [show(row) for row in rows], columns))


def token_values(tokens: Sequence[str], values: Tensor, labels: Sequence[str]) -> View:
    """An interactive picture (circuitsvis): choose one of several values, see the tokens coloured by it.

    Args:
        tokens: Of one text.
        values: `[token, label]`
        labels: Of the values.
    """
    return View.of(need("circuitsvis.tokens", "view()").colored_tokens_multi([show(token) for token in tokens], values, list(labels)))


def heat_map(
    ax: Axes | None,
    values: Tensor,
    words: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
    names: tuple[str, str, str],
    *,
    title: str = "",
    upwards: bool = False,
    limits: tuple[float, float] | None = (0, 1),
    signed: bool = False,
) -> Axes:
    """A heat map with a word in each cell where it can be read: a longer one is cut, and marked so.

    Args:
        ax: Where to draw; None: a new figure.
        values: `[row, column]`; cells that are NaN are grey.
        words: One text for each cell.
        rows, columns: Labels; as many are written as can be read.
        names: Of the rows, of the columns, and of the values.
        title: What is drawn.
        upwards: Draw the first row at the bottom.
        limits: The values of the darkest and the brightest colour; None: the smallest and the largest.
        signed: Colours are by sign, white at 0, and as strong below as above; `limits` are not used.
    """
    values = values.detach().double()
    known = values[values.isfinite()]
    low, high = limits if limits is not None else (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    if signed:
        high = float(known.abs().max()) if len(known) else 1.0
        low = -high
    size = (min(14.0, max(6.0, 0.62 * len(columns) + 2)), min(10.0, max(2.5, 0.27 * len(rows) + 1.4)))
    with drawing(ax, size, title) as ax:
        matplotlib = need("matplotlib", "plot()")
        colours: Any = matplotlib.colormaps[SIGNED if signed else MAGNITUDES].with_extremes(bad="0.85")
        image: Any = ax.imshow(values.numpy(), aspect="auto", cmap=colours, origin="lower" if upwards else "upper", vmin=low, vmax=high)
        ax.spines[:].set_visible(False)
        _named(ax.set_ylabel, names[0])
        _named(ax.set_xlabel, names[1])
        _named(ax.figure.colorbar(image, ax=ax).set_label, names[2])
        _ticks(ax, "y", rows)
        _ticks(ax, "x", columns)
        ax.figure.canvas.draw()
        width, height = _room(ax, len(columns), "x"), _room(ax, len(rows), "y")
        if (largest := min(SIZE, 0.7 * height)) >= SMALLEST:
            for y, line in enumerate(words):
                for x, word in enumerate(line):
                    text, points = _fitting(word, 0.94 * width, largest)
                    colour = ink(colours(image.norm(float(values[y, x]))))
                    if text:
                        drawn = ax.text(
                            x, y, text, ha="center", va="center", fontsize=points, color=colour, family=families([text]), parse_math=False
                        )
                        drawn.set_in_layout(False)
    return ax


def lines(
    ax: Axes | None,
    curves: dict[str, Tensor],
    names: tuple[str, str],
    *,
    title: str = "",
    labels: Sequence[str] | None = None,
    levels: dict[str, float] | None = None,
    bands: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> Axes:
    """Curves over the same places, and levels to compare them with.

    Args:
        ax: Where to draw; None: a new figure.
        curves: By name the values `[place]`; the first is drawn heavier.
        names: Of the places and of the values.
        title: What is drawn.
        labels: Of the places; None: their numbers.
        levels: By name a value that is drawn across.
        bands: By name of a curve what is shaded around it, from and to `[place]`.
    """
    new = ax is None
    with drawing(ax, (7, 3.5), title) as ax:
        for at, (name, values) in enumerate(curves.items()):
            colour, again = COLOURS[at % len(COLOURS)], at // len(COLOURS) % 2
            mark = None if len(values) >= 60 else "os"[again]
            weight = 2.2 if at == 0 else 1.2
            ax.plot(
                range(len(values)),
                values,
                label=name,
                color=colour,
                linestyle=("-", "--")[again],
                linewidth=weight,
                marker=mark,
                markersize=3,
            )
            if bands and name in bands:
                ax.fill_between(range(len(values)), *bands[name], color=colour, alpha=0.2, linewidth=0)
        for style, (name, value) in zip(cycle(("--", ":", "-.")), (levels or {}).items(), strict=False):
            ax.axhline(value, color="0.5", linestyle=style, linewidth=1, label=name)
        if labels is not None:
            _ticks(ax, "x", labels)
        _named(ax.set_xlabel, names[0])
        _named(ax.set_ylabel, textwrap.fill(names[1], 40))
        if len(curves) + len(levels or {}) > 1:
            legend(ax, outside=new and len(curves) + len(levels or {}) > 4)
    return ax


def legend(ax: Axes, *, outside: bool = False) -> None:
    """Names of what is drawn, as they are written."""
    handles, labels = ax.get_legend_handles_labels()
    labels = [spelt(show(label)) for label in labels]
    where: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if outside else {}
    made = ax.legend(handles, labels, prop={"family": families(labels), "size": SIZE}, frameon=False, **where)
    for text in made.get_texts():
        text.set_parse_math(False)


def bars(ax: Axes | None, names: Sequence[str], values: Tensor, what: str, *, title: str = "") -> Axes:
    """One bar for each name, the first on top, in another colour below 0.

    Args:
        ax: Where to draw; None: a new figure.
        names: Of the bars.
        values: `[bar]`
        what: What the values are.
        title: What is drawn.
    """
    with drawing(ax, (7, min(10.0, max(2.0, 0.28 * len(names) + 1))), title) as ax:
        ax.barh(range(len(names)), values.tolist(), color=[COLOURS[value < 0] for value in values.tolist()])
        ax.set_ylim(max(len(names), 1) - 0.5, -0.5)
        _ticks(ax, "y", names)
        ax.axvline(0, color="0.5", linewidth=0.8)
        _named(ax.set_xlabel, what)
    return ax


def described(ax: Axes) -> str:
    """What is drawn on axes, in words, for who cannot see it."""
    if ax.images:
        np: Any = need("numpy", "a report")
        values: Any = torch.as_tensor(np.ma.filled(ax.images[0].get_array(), float("nan")))
        known = values[values.isfinite()]
        reach = f", values from {float(known.min()):.3g} to {float(known.max()):.3g}" if len(known) else ""
        return (
            f"{ax.get_title('left')}: a heat map of {values.shape[0]} by {values.shape[1]} cells, "
            f"{ax.get_ylabel()} by {ax.get_xlabel()}{reach}."
        )
    if not ax.lines and not ax.collections and not ax.patches:
        return ""
    parts = []
    for line in ax.lines:
        heights = torch.as_tensor(line.get_ydata(), dtype=torch.float64)
        heights = heights[heights.isfinite()]
        if len(heights) > 2 and not str(line.get_label()).startswith("_"):
            parts.append(f"{line.get_label()} from {float(heights.min()):.3g} to {float(heights.max()):.3g}")
    return (
        f"{ax.get_title('left')}: {ax.get_ylabel()} by {ax.get_xlabel()}{'; ' if parts else ''}{', '.join(parts)}."
        if ax.get_xlabel()
        else ""
    )


def ink(background: Sequence[float]) -> str:
    """Black or white, whichever is read better on a colour of red, green and blue from 0 to 1."""
    red, green, blue = (c / 12.92 if c <= 0.04 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3])
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "white"


def _named(write: Callable[..., Any], text: str) -> None:
    """Write the name of an axis, in any script and as it is written."""
    text = spelt(text)
    write(text, family=families([text]), parse_math=False)


def _room(ax: Axes, n: int, axis: str) -> float:
    """Points between two of `n` places."""
    box = ax.get_window_extent()
    return (box.width if axis == "x" else box.height) * 72 / ax.figure.dpi / max(1, n)


def _ticks(ax: Axes, axis: str, labels: Sequence[str]) -> None:
    """Labels at 0, 1, 2, ...: as many as can be read, those that are too wide for their column upright."""
    texts = [spelt(show(label if len(label) <= 40 else label[:39] + "…")) for label in labels]
    ax.figure.canvas.draw()
    room, widest = _room(ax, len(texts), axis), max(map(_width, texts), default=0.0)
    upright = axis == "x" and widest > room and not all(text.lstrip("-").replace(".", "", 1).isdigit() for text in texts)
    step = max(1, int(-(-(widest + 3 if axis == "x" and not upright else 1.25 * SIZE) // max(room, 0.1))))
    places, family = range(0, len(texts), step), families(texts)
    (ax.set_xticks if axis == "x" else ax.set_yticks)(
        places, texts[::step], fontsize=SIZE, family=family, parse_math=False, rotation=90 if upright else 0
    )


@lru_cache(100_000)
def _width(text: str, size: float = SIZE) -> float:
    """Of a text, in points."""
    fonts, paths = need("matplotlib.font_manager", "plot()"), need("matplotlib.textpath", "plot()")
    return paths.text_to_path.get_text_width_height_descent(text, fonts.FontProperties(family=families([text]), size=size), False)[0]


def _fitting(word: str, width: float, size: float) -> tuple[str, float]:
    """What of a word is written in a cell, and how large: smaller letters if it is long, its beginning if it is longer, nothing if there
    is no room for that."""
    whole = show(word.strip() or word)
    text = spelt(whole)
    wide = _width(text, size)
    if wide <= width:
        return text, size
    if wide * SMALLEST / size <= width:
        return text, size * width / wide
    number = whole.lstrip("-").replace(".", "", 1).isdigit()
    ends = (
        []
        if number
        else range(min(len(text) - 1, 12), 2, -1)
        if text == whole
        else [text.find("+", 2)]
        if "+" in text[2:] and text[0] == "U"
        else []
    )
    return next(((cut, SMALLEST) for n in ends if _width(cut := text[:n] + "…", SMALLEST) <= width), ("", size))
