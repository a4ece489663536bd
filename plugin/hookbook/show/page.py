"""What a result's report is made of: what it is, its pictures, controls, numbers, texts and settings."""

from __future__ import annotations

import ast
import inspect
import io
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from hookbook.card import ModelCard
from hookbook.errors import HookbookError, ResultError
from hookbook.show.brief import Shown
from hookbook.show.html import frame_table, page, picture, prose, table
from hookbook.show.plots import described
from hookbook.show.text import need, show
from hookbook.show.view import View
from hookbook.sites import Site
from hookbook.tokens import Tokens

LARGEST = 5_000_000
"""Bytes of a report."""
_CONTROL = re.compile(
    r"control|random|shuffled|swapped|shortcut|other|misled|substituted|^base$|zero_shot|few_shot|clean|own_|"
    r"(?<!ex)plain|^loss$|^loss_zero$|wrong"
)
_SHOWN_ELSEWHERE = {"vocab", "labels", "links", "settings"}


def of(result: Shown, view: Callable[[], View] | None = None) -> str:
    """The whole page; of a result that is too large for one, without the view, then with fewer rows, then without the result's own
    sections. It says what is left out.

    Raises:
        ResultError: It is too large all the same.
    """
    first, *others = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]*", type(result).__name__)
    title = " ".join([first, *(word if word.isupper() else word.lower() for word in others)])
    cards = list(dict.fromkeys(card for card in (getattr(result, f.name) for f in fields(result)) if isinstance(card, ModelCard)))
    models = " and ".join(dict.fromkeys(card.model_id for card in cards))
    before = [("What this is", "", _what(result)), ("Pictures", "", "".join(_drawn(result)))]
    own = result.sections()
    drawn = [] if view is None else [("View", "", view().html)]
    after = (
        [("Controls", "What the numbers above are compared with; each is the mean of what was measured.", found)]
        if (found := _controls(result))
        else []
    )
    ends = [*_texts(result), ("Settings", "", _settings(result)), ("Model", "", "".join(map(_model, cards)))]
    made_with = cards[0].versions.get("hookbook", "") if cards else version("hookbook")
    no_own, no_view = ([(head, "Left out: with it this page would be too large.", "") for head, *_ in some] for some in (own, drawn))
    size = 0
    for more, rows in (([*own, *drawn], 200), ([*own, *no_view], 200), ([*own, *no_view], 20), ([*no_own, *no_view], 20)):
        sections = [*before, *more, *after, ("Numbers", "", _numbers(result, rows)), *ends]
        made = page(f"{title}, {models}" if models else title, sections, f"Made with hookbook {made_with}.")
        if (size := len(made.encode())) < LARGEST:
            return made
    raise ResultError(
        f"a report of {size:,} bytes",
        f"at most {LARGEST:,} open quickly everywhere",
        "report on fewer prompts, or use to_frame() and plot()",
    )


def pictures(result: Shown) -> Iterator[tuple[str, str, bytes]]:
    """Of `plot`, and of every other `plot_...` that needs no argument: its name, what is on it in words, and the PNG."""
    plt = need("matplotlib.pyplot", "a report")
    named = [method for name, method in inspect.getmembers(type(result), inspect.isfunction) if name == "plot" or name.startswith("plot_")]
    for plot in named:
        if any(p.default is p.empty for p in [*inspect.signature(plot).parameters.values()][1:]):
            continue
        with plt.style.context("default"):
            try:
                figure: Any = plot(result).figure
            except HookbookError:  # a picture of what this result was not asked for
                if plot.__name__ == "plot":
                    raise
                continue
            try:
                drawn = io.BytesIO()
                figure.savefig(drawn, dpi=110, metadata={"Software": None})
                words = " ".join([_first(plot), *(described(ax) for ax in figure.axes)])
            finally:
                plt.close(figure)
        yield plot.__name__, " ".join(words.split()), drawn.getvalue()


def _drawn(result: Shown) -> Iterator[str]:
    try:
        for name, words, png in pictures(result):
            yield picture(png, f"{name.replace('_', ' ').capitalize()}: {words}")
    except HookbookError as error:  # there is nothing to draw
        yield f"<p>{prose(str(error))}</p>"


def _what(result: Shown) -> str:
    """The recipe's module in a sentence, the recipes that give such results, and the papers."""
    kind = type(result)
    module = sys.modules[kind.__module__]
    made = [value for value in vars(module).values() if hasattr(value, "plan") and value.__annotations__.get("return") == kind.__name__]
    parts = [
        _first(module) if made else "",
        _first(kind),
        f"Made by {getattr(result, 'recipe', '')}." if getattr(result, "recipe", "") else "",
    ]
    for one in made:
        words = inspect.getdoc(one) or ""
        source = re.search(r"^Source: (.*?)(?:\n\s*\n|\Z)", words, re.DOTALL | re.MULTILINE)
        parts.append(f"`{one.__name__}`: {_first(one)} {'Source: ' + ' '.join(source[1].split()) if source else ''}")
    return "".join(f"<p>{prose(part)}</p>" for part in dict.fromkeys(parts) if part)


def _first(thing: Any) -> str:
    """The first paragraph of a docstring."""
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def _numbers(result: Shown, rows: int) -> str:
    frame = result.to_frame()
    more = (
        ""
        if len(frame) <= rows
        else f"<p>Rows after the first {rows} are left out of this page; <code>result.to_frame()</code> has all of them.</p>"
    )
    return more + frame_table(frame, "Numbers", limit=rows)


@cache
def meanings(kind: type) -> dict[str, str]:
    """The docstrings of a class's fields and properties, by name."""
    found: dict[str, str] = {}
    for one in reversed([base for base in kind.__mro__ if is_dataclass(base)]):
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        except (OSError, TypeError, ValueError, SyntaxError):  # defined where no source is kept
            continue
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for field, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(after.value.value).split())
    return found


def _controls(result: Shown) -> str:
    """What a result's fields, properties and parts of them are named after a control."""
    kind = type(result)
    rows, known = [], meanings(kind)
    computed = [name for name, one in inspect.getmembers(kind) if isinstance(one, property) and _CONTROL.search(name)]
    for field in [*(f.name for f in fields(result)), *computed]:
        value = getattr(result, field)
        parts = value.items() if isinstance(value, dict) else enumerate(value, 1) if isinstance(value, tuple) else [("", value)]
        for name, one in [
            part for part in parts if field not in _SHOWN_ELSEWHERE and (_CONTROL.search(field) or _CONTROL.search(str(part[0])))
        ]:
            numbers = one.double() if isinstance(one, Tensor) and (one.is_floating_point() or one.dtype == torch.bool) else None
            if isinstance(one, float):
                numbers = torch.tensor(one, dtype=torch.float64)
            if numbers is not None and (finite := numbers[numbers.isfinite()]).numel():
                words = known.get(field) or _first(getattr(kind, field, None))
                rows.append([f"{field} {name}".strip().replace("_", " "), f"{float(finite.mean()):.4g}", words.replace("`", "")])
    return table(["control", "mean", "what it is"], rows, "Controls", numbers=[1]) if rows else ""


def _texts(result: Shown) -> Iterator[tuple[str, str, str]]:
    """Prompts and other texts, as they were used."""
    rows = []
    for f in fields(result):
        value = getattr(result, f.name)
        for n, one in enumerate(value if isinstance(value, tuple) else [value]):
            if isinstance(one, Tokens) or (f.name == "template" and one):
                text, size = (one.text, str(len(one.ids))) if isinstance(one, Tokens) else (str(one), "")
                rows.append(
                    [f"{f.name} {n}" if isinstance(value, tuple) else f.name, size, show(text if len(text) <= 2000 else f"{text[:1999]}…")]
                )
    if rows:
        more = f"The first 100 of {len(rows):,}." if len(rows) > 100 else ""
        yield "Texts as used", more, table(["text", "tokens", "as it was used"], rows[:100], "Prompts and templates", numbers=[1])


def _settings(result: Shown) -> str:
    """What was asked for, and every plain fact of the result."""
    facts = {f.name: getattr(result, f.name) for f in fields(result) if f.name not in _SHOWN_ELSEWHERE}
    facts = {name: _plain(value) for name, value in facts.items()} | {
        name: repr(value) for name, value in getattr(result, "settings", {}).items()
    }
    rows = [[name, value if len(value) <= 500 else value[:499] + "…"] for name, value in facts.items() if value]
    return table(["setting", "value"], [[name, show(value)] for name, value in rows], "Settings") if rows else "<p>There are none.</p>"


def _plain(value: Any) -> str:
    """Text of what is short and plain; empty of everything else, which is shown elsewhere."""
    if isinstance(value, (str, Site)):
        return str(value)
    if isinstance(value, (bool, int, float)):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    if isinstance(value, Tensor):
        return f"tensor {list(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, tuple) and all(isinstance(one, (str, int, float, Site)) for one in value):
        return ", ".join(map(str, value))
    return ""


def _model(card: ModelCard) -> str:
    facts = card.to_dict()
    packages = ", ".join(f"{name} {number}" for name, number in facts.pop("versions").items())
    rows = [[name.replace("_", " "), str(value)] for name, value in facts.items()]
    return table(["fact", "value"], [*rows, ["versions", packages]], f"Model: {card.model_id}")
