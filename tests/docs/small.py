"""Small samples, for code of the documentation that is run to see that it runs: how many prompts it names proves nothing there.

`pytest --whole` runs it as it is written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import hookbook as hb

MOST = {"queries": 8, "n_prompts": 4, "n_trials": 2, "n_train": 2, "changes": 3, "generate": 4, "max_new_tokens": 4}
MOST |= {"facts": 2, "steps": 4}  # of knowledge neurons
MOST |= {"tokens": 256, "n_features": 256, "samples": 640, "batch": 64, "states": 32}  # of an SAE that is trained
"""Of arguments of recipes, the most that is taken; also of what None means."""
FEW = {"questions": 6, "positive": 12, "negative": 12}
"""Of lists, how many stay."""
NEURONS = ("find_neurons", "neuron_sweep", "neuron_attribution", "cumulative_ablation")
"""Recipes that look at all neurons: at those of one layer."""


def small(recipe: Callable[..., Any]) -> Callable[..., Any]:
    """A recipe with small samples."""
    signature = inspect.signature(recipe)
    limits = {name: MOST[name] for name in signature.parameters if name in MOST}
    if "n_train" in limits:
        limits.pop("queries", None)  # a relation's pairs are those that a page then changes
    lists = {name: FEW[name] for name in signature.parameters if name in FEW and recipe.__name__ != "two_hops"}  # which finds what is known

    @wraps(recipe)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name, most in limits.items():
            value = bound.arguments.get(name, signature.parameters[name].default)
            if (isinstance(value, int) and value > most) or (value is None and name == "queries"):
                bound.arguments[name] = most
        for name, few in lists.items():
            bound.arguments[name] = list(bound.arguments[name])[:few]
        if recipe.__name__ in NEURONS:
            bound.arguments.setdefault("layers", [-1])
        return recipe(*bound.args, **bound.kwargs)

    return call


def recipes() -> dict[str, Callable[..., Any]]:
    """The recipes that take samples, made small, by name."""
    found = {name: getattr(hb, name) for name in hb.__all__ if name.islower() and callable(getattr(hb, name))}
    return {name: small(call) for name, call in found.items() if {*MOST, *FEW} & set(inspect.signature(call).parameters) or name in NEURONS}
