"""Pages that open offline: one HTML file without scripts or addresses."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hookbook.results import need, show

if TYPE_CHECKING:
    from hookbook.recipes.logit_lens import LogitLens
    from hookbook.recipes.patchscopes import Patchscope

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; color: #1a1a1a; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
p { max-width: 50rem } code { background: #f2f2f2; padding: 0 .25em }
.wide { overflow-x: auto } img { max-width: 100%; display: block; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .8rem } caption { text-align: left; padding-bottom: .5rem; color: #555 }
th { font-weight: 600; padding: .2rem .4rem; text-align: left; white-space: nowrap } td { padding: .2rem .4rem; border: 1px solid #fff }
td { max-width: 8rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.text td { max-width: 60rem; white-space: normal; border-bottom: 1px solid #ddd }
footer { margin-top: 3rem; font-size: .8rem; color: #555 }
"""


def grid_table(result: Patchscope | LogitLens, prompt: int = 0) -> str:
    """The likeliest token in each cell of what `result.plot` draws, coloured by probability."""
    need("jinja2", "a report")
    need("matplotlib", "a report")
    import pandas as pd

    rows, columns, row_name, column_name, cells = result.cells(prompt)
    index, header = pd.Index(rows, name=row_name), pd.Index(columns, name=column_name)
    words = pd.DataFrame([[show(result.token(n, p)) for n, p in line] for line in cells], index, header)
    chances = torch.tensor([[float(result.logprobs[n, p, 0].exp()) for n, p in line] for line in cells])
    tips = pd.DataFrame(
        [
            [
                f"{100 * chances[y, x]:.0f} %: {', '.join(show(result.token(n, p, r)) for r in range(result.token_ids.shape[-1]))}"
                for x, (n, p) in enumerate(line)
            ]
            for y, line in enumerate(cells)
        ],
        index,
        header,
    )
    style: Any = words.style.format(escape="html")
    styled = style.background_gradient(cmap="cividis", gmap=chances.numpy(), axis=None, vmin=0, vmax=1, text_color_threshold=0.2)
    return (
        styled.set_tooltips(tips.map(html.escape), as_title_attribute=True)
        .set_caption(f"{row_name} down, {column_name} across; dark is unlikely, bright is likely")
        .to_html()
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """A plain table of texts."""
    head = "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    words = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table class=text>{words}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def picture(png: bytes, alt: str) -> str:
    """A picture that is part of the page; `alt` is for who cannot see it."""
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def page(title: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """A page of sections, each a heading, a sentence or two, and HTML."""
    body = "".join(f"<h2>{html.escape(head)}</h2><p>{html.escape(words)}</p><div class=wide>{content}</div>" for head, words, content in sections)
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<meta name=viewport content='width=device-width'><title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{body}<footer>{html.escape(footer)}</footer></body></html>"
    )


def write(path: str | os.PathLike[str], text: str) -> Path:
    """Write a page; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path
