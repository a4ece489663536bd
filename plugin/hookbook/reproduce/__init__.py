"""`hookbook reproduce`: published effects on one model, each beside its controls and judged by a rule that was fixed before.

An effect is a function with `@SUITE.effect(...)` above it, in the module of its suite. A suite is a module here with a `SUITE`, and a line
in `SUITES`, which makes it a command.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hookbook.reproduce.suite import Suite

SUITES = {
    "patchscopes": ("The next token out of middle layers, descriptions of entities, an attribute out of a sentence.", "identity"),
    "vectors": ("Task vectors, function vectors, their sums, and steering.", "french"),
    "knowledge": ("Linear relations, edits through them, two hops and backpatching, the language between two others.", "edits"),
    "neurons": (
        "Which neurons tell texts apart, what is lost without one, doses, how many do one job, attribution to neurons.",
        "without",
    ),
    "sae": (
        "Whether a sparse autoencoder fits, what vectors are made of, clamping the language feature, attribution to features.",
        "language",
    ),
}
"""By module: what its effects are, and one of them as an example. The modules import torch; this does not, so that a command can say what
it does at once."""


def get(name: str) -> Suite[Any]:
    """One of `SUITES`."""
    return importlib.import_module(f"{__name__}.{name}").SUITE
