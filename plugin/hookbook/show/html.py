"""Pages that open offline: one HTML file that asks for no other, readable on paper-white and on black, on a telephone, and without a
mouse."""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hookbook.show.circuitsvis import once, policy
from hookbook.show.text import show
from hookbook.storage import whole

if TYPE_CHECKING:
    import pandas as pd

_STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --page: #fff; --soft: #595959; --line: #d0d0d0; --box: #f2f2f2; --link: #0a58a8 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --page: #16181c; --soft: #a8a8a8; --line: #444; --box: #262a30; --link: #8ab8f0 }
}
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 90rem; padding: 1rem;
  color: var(--text); background: var(--page); overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25 } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem } h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
p { max-width: 50rem } a { color: var(--link) } code { background: var(--box); padding: 0 .25em; border-radius: 3px }
.box { overflow-x: auto; max-width: 100%; margin: .75rem 0 } .box:focus-visible { outline: 3px solid var(--link); outline-offset: 2px }
.box > img { display: block; height: auto; max-width: max(100%, 44rem); background: #fff; border-radius: 4px }
table { border-collapse: collapse; font-size: .85rem; overflow-wrap: normal }
caption { text-align: left; padding-bottom: .5rem; color: var(--soft) }
th { font-weight: 600; text-align: left; vertical-align: top; white-space: nowrap }
th[scope=row] { white-space: normal; min-width: 6rem; max-width: 24rem }
th, td { padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line) }
td { vertical-align: top; min-width: 3rem; max-width: 40rem; overflow-wrap: break-word }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.grid th { white-space: nowrap; min-width: 0 } .grid th, .grid td { padding: .2rem .4rem; border: 1px solid var(--page) }
.grid td { max-width: 8rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.box:has(> table) { max-height: 40rem; overflow-y: auto } @media print { .box:has(> table) { max-height: none } }
footer { margin-top: 3rem; font-size: .85rem; color: var(--soft) }
"""


def box(content: str, name: str, kind: str = "") -> str:
    """What may be wider than the page: it scrolls by itself, by keyboard too. Outside our pages, such as in a notebook, as well."""
    return (
        f'<div class="box{kind and " " + kind}" role=region tabindex=0 aria-label="{html.escape(name)}" '
        f'style="overflow-x:auto">{content}</div>'
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", *, headers: int = 1, numbers: Sequence[int] = ()) -> str:
    """A table of texts, in which an address is a link.

    Args:
        header: Names of the columns.
        rows: Texts.
        caption: What is in it.
        headers: How many columns name their row.
        numbers: Columns of numbers.
    """
    head = "".join(f"<th scope=col{' class=number' if at in numbers else ''}>{html.escape(cell)}</th>" for at, cell in enumerate(header))
    body = []
    for row in rows:
        cells = [re.sub(r"^https?://[^\s\"<>]+$", lambda at: f'<a href="{at[0]}">{at[0]}</a>', html.escape(cell)) for cell in row]
        kinds = [("th scope=row" if at < headers else "td") + (" class=number" if at in numbers else "") for at in range(len(cells))]
        body.append("<tr>" + "".join(f"<{kind}>{cell}</{kind[:2]}>" for kind, cell in zip(kinds, cells, strict=True)) + "</tr>")
    name = caption or ", ".join(header)
    words = f"<caption>{html.escape(name)}</caption>"
    return box(f"<table>{words}<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>", name)


def frame_table(frame: pd.DataFrame, caption: str, *, limit: int = 200) -> str:
    """A frame as a table: its index first, if that has a name; of a long one the first rows, which the caption says."""
    import pandas as pd

    total, headers = len(frame), 1
    if any(name is not None for name in frame.index.names):
        headers = frame.index.nlevels
        frame = frame.reset_index()
    if total > limit:
        caption = f"{caption}: the first {limit:,} of {total:,} rows"
        frame = frame.iloc[:limit]
    numbers = [at for at, kind in enumerate(frame.dtypes) if pd.api.types.is_numeric_dtype(kind) and not pd.api.types.is_bool_dtype(kind)]
    rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False, name=None)]
    return table([str(name) for name in frame.columns], rows, caption, headers=headers, numbers=numbers)


def _cell(value: Any) -> str:
    if isinstance(value, str):
        text = value if value.startswith(("http://", "https://")) else show(value) if value else ""
        return text if len(text) <= 500 else text[:499] + "…"
    if value is None or str(value) in ("<NA>", "NaT", "nan"):
        return ""
    if value is True or value is False or type(value).__name__ == "bool_":
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def picture(png: bytes, alt: str) -> str:
    """A picture that is part of the page; `alt` is for who cannot see it."""
    return box(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">', alt.partition(":")[0])


def context_line(title: str, words: Sequence[str], values: Sequence[float], most: float) -> str:
    """A line of tokens, each coloured by a number, which shows under the pointer.

    Args:
        title: What they are.
        words: The tokens' texts, the one that is meant in the middle; an empty one is none.
        values: Of each its number: above 0 it is orange, below it blue.
        most: The size that has the full colour.
    """
    parts = []
    for at, (word, x) in enumerate(zip(words, values, strict=True)):
        if word:
            share = min(1.0, abs(x) / most) if most else 0.0
            colour = "230,159,0" if x > 0 else "86,180,233"
            style = f"background:rgba({colour},{share:.2f})" + (";color:#000" if share > 0.4 else "")
            style += ";font-weight:bold" if at == len(words) // 2 else ""
            parts.append(f'<span style="{style}" title="{x:.4g}">{html.escape(show(word))}</span>')
    return f'<p><small>{html.escape(title)}:</small> <span style="white-space:pre-wrap">{"".join(parts)}</span></p>'


def page(title: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """A page of sections, each a heading, a sentence or two, and HTML. Only the views' own scripts may run in it, and nothing may be
    loaded."""
    parts = []
    for head, words, content in sections:
        parts.append(f"<section>{f'<h2>{prose(head)}</h2>' if head else ''}{f'<p>{prose(words)}</p>' if words else ''}{content}</section>")
    body = once("".join(parts))
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        f'<meta http-equiv=Content-Security-Policy content="{policy(body)}">'
        f"<meta name=viewport content='width=device-width, "
        f"initial-scale=1'><title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main><h1>{html.escape(title)}</h1>{body}</main><footer>{html.escape(footer)}</footer></body></html>"
    )


def prose(text: str) -> str:
    """Words with `names` and arXiv numbers as HTML."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>', text)


def write(path: str | os.PathLike[str], text: str) -> Path:
    """Write a page; the file appears whole or not at all."""
    with whole(path) as scratch:
        Path(scratch).write_text(text, encoding="utf-8")
    return Path(path)
