"""Words that results show: tokens for display, cut texts; and optional libraries, or what to install."""

from __future__ import annotations

import importlib
from typing import Any

from hookbook.errors import Refused


def need(module: str, what: str, install: str = '"hookbook[viz]"') -> Any:
    """An optional library, or `Refused` with how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Refused(what, f"{module.split('.')[0]} is not installed", f"pip install {install}") from error


def ending(text: str, n: int) -> str:
    """The last `n` characters of a text, and a mark where more was before them."""
    return text if len(text) <= n else "…" + text[1 - n :]


def show(token: str) -> str:
    """A token for display: white space and line breaks are made visible, control characters and half letters are marked; joiners of
    letters and signs stay."""
    text = token.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "⏎")
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else "·" for c in text) if text.strip() else "␣" * max(1, len(text))
