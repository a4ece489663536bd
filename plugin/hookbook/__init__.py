"""A recipe book for hooks: published interpretability methods as one call each, on TransformerLens and nnsight models.

    import hookbook as hb

    model = hb.load("gemma-3-270m")          # or wrap a bridge, a HookedTransformer or an nnsight model: hb.wrap(model)
    grid = hb.patchscope(model, "Diana, Princess of Wales", target=hb.prompts.ENTITY_DESCRIPTION, generate=20)
    grid.to_frame(), grid.plot(), grid.view()

Names are loaded when they are first used, so that importing hookbook imports no model library. `__init__.pyi` is their table.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

_TABLE = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_HOME = {name.name: line.module or "" for line in _TABLE.body if isinstance(line, ast.ImportFrom) for name in line.names}
"""Where each name lives; empty for a module."""

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = import_module("importlib.metadata").version("hookbook")
    elif name not in _HOME:
        raise AttributeError(f"module 'hookbook' has no attribute {name!r}")
    else:
        value = getattr(import_module(f"hookbook.{_HOME[name]}"), name) if _HOME[name] else import_module(f"hookbook.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
