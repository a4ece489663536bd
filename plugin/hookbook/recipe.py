"""What every recipe has beside its call: `recipe.plan(...)`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, Protocol, TypeVar, cast

from hookbook.planning import Plan, accounting

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class Recipe(Protocol[P, R]):
    """A published method as one call, which also says beforehand what the call would cost."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it."""
        ...

    def plan(self, *args: P.args, **kwargs: P.kwargs) -> Plan:
        """What the same call would cost. It checks the input as the call does, and runs nothing of the model."""
        ...


def recipe(run: Callable[P, R]) -> Recipe[P, R]:
    """Give a recipe its `plan`.

    The recipe runs as it is, on a model that answers every request with zeros and counts. What a recipe decides from
    numbers (which prompts a model answers, say) is then decided from zeros: the plan of such a recipe is a bound where
    it says so.
    """

    @wraps(run)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return run(*args, **kwargs)

    def plan(*args: P.args, **kwargs: P.kwargs) -> Plan:
        with accounting() as account:
            run(*args, **kwargs)
        return account.plan

    call.plan = plan  # type: ignore[attr-defined]
    return cast("Recipe[P, R]", call)
