"""Text of any script in pictures: with whatever installed fonts have its letters, and spelt out where none has.

matplotlib brings one font, DejaVu Sans, without Chinese, Japanese, Korean, Devanagari and most emoji. Any other font that is installed,
such as those of Debian's fonts-noto-cjk and fonts-noto-core, or was given to matplotlib's `fontManager.addfont`, is found by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from hookbook.show.text import need

FAMILY = "DejaVu Sans"
"""What comes with matplotlib."""
_FIRST = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans")
"""Of several fonts with a letter, one whose name begins so."""
_NO_LETTERS = ("Last Resort", "Adobe Blank", "Color")
"""In names of fonts that have boxes for letters, or colours that matplotlib does not draw."""


def spelt(text: str) -> str:
    """The text as it can be drawn: letters of no installed font by their numbers in Unicode, `U+5317+4EAC` for two of them."""
    parts, missing = [], False
    for letter in text:
        known = _family(ord(letter)) is not None
        parts.append(letter if known else f"{'' if missing else 'U'}+{ord(letter):04X}")
        missing = not known
    return "".join(parts)


def families(texts: Iterable[str]) -> list[str]:
    """The fonts that have the letters of these texts, matplotlib's own first."""
    found = {_family(letter) for letter in {ord(letter) for text in texts for letter in text}}
    return [FAMILY, *sorted(family for family in found if family not in (None, FAMILY))]


def _family(letter: int) -> str | None:
    if letter in _letters(FAMILY):
        return FAMILY
    fonts: Any = need("matplotlib.font_manager", "plot()")
    names = frozenset(
        font.name for font in fonts.fontManager.ttflist if font.style == "normal" and font.weight in (400, "normal", "regular")
    )
    return _other(letter, names)


@cache
def _other(letter: int, names: frozenset[str]) -> str | None:
    order = sorted(names, key=lambda name: ([not name.startswith(first) for first in _FIRST], name))
    return next((name for name in order if not any(word in name for word in _NO_LETTERS) and letter in _letters(name)), None)


@cache
def _letters(family: str) -> frozenset[int]:
    fonts: Any = need("matplotlib.font_manager", "plot()")
    try:
        return frozenset(fonts.get_font(fonts.findfont(family, fallback_to_default=False)).get_charmap())
    except (OSError, RuntimeError, ValueError):  # a file that is gone or damaged
        return frozenset()
