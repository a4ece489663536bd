"""What is installed, what must be, and what is left out where it is not."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest


def lens_version() -> str:
    """The installed TransformerLens, or "" if there is none."""
    try:
        return version("transformer-lens")
    except PackageNotFoundError:
        return ""


HOOKED = not lens_version() or int(lens_version().split(".")[0]) < 4
"""Whether HookedTransformer must be there. By version, not by trying to import it: TransformerLens 3 without it is a failure."""

CANNOT_BE_IMPORTED = ("*/adapters/hooked.py", "*/test_sae*.py", "*/test_feature_*.py")
"""Files, where HookedTransformer is not."""


def marked(names: Iterable[str], whole: Iterable[str] = ()) -> list[Any]:
    """Parameters of a test; those that are or need HookedTransformer marked `hooked`, and those in `whole` so."""
    found, rest = [], set(whole)
    for name in names:
        marks = [pytest.mark.hooked] * ("hooked" in name.lower()) + [pytest.mark.whole] * (name in rest)
        found.append(pytest.param(name, marks=marks) if marks else name)
    return found


def require(module: str) -> None:
    """Skip only what was said may be missing."""
    if importlib.util.find_spec(module) is None:
        if module in os.environ.get("HOOKBOOK_ALLOW_MISSING", "").split(","):
            pytest.skip(f"{module} is not installed")
        pytest.fail(f"{module} is not installed; set HOOKBOOK_ALLOW_MISSING={module} to do without")
