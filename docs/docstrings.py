"""How docstrings are shown: doctests as code, arguments that share a line one by one, where a method comes from and where ours differs in
bold."""

from __future__ import annotations

import re
from typing import Any

import griffe

SHARED = re.compile(r"^    ([a-z]\w*(?:, [a-z]\w*)+): (.*(?:\n {8,}.*)*)", re.M)


class Docstrings(griffe.Extension):
    """What mkdocstrings asks of every object before it is shown."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the object's docstring."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            text = SHARED.sub(lambda m: "\n".join(f"    {name}: {m[2]}" for name in m[1].split(", ")), text)
            obj.docstring.value = re.sub(r"^(Source|Differs): ", r"**\1:** ", text, flags=re.M)
