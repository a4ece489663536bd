"""What every recipe has beside its call: `recipe.plan(...)`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from torch import Tensor

from hookbook import deferred
from hookbook.deferred import hold as hold, later as later
from hookbook.engine.planning import Plan, accounting

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

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Send the same call to a remote model as one job without waiting for it; a `hookbook.remote.handles.Handle`."""
        ...


def recipe(run: Callable[P, R]) -> Recipe[P, R]:
    """Give a recipe its `plan` and its `submit`, and make one call one job.

    A recipe asks its models, computes with tensors, and returns a result. Of a remote model, and in a plan, these are
    promises (`hookbook.deferred`): what needs numbers is written as `later(function, ...)`.
    """

    @wraps(run)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        outer = deferred.current()
        if outer is not None:  # a recipe of a recipe, or of a job
            result = run(*args, **kwargs)
            outer.results.append(result)
            return result
        with deferred.recording() as record:
            return deferred.settle(run(*args, **kwargs), record)

    def plan(*args: P.args, **kwargs: P.kwargs) -> Plan:
        with accounting() as account, deferred.recording(dry=True) as record:
            result = run(*args, **kwargs)
            for tape in record.tapes.values():
                wanted = [x for x in deferred.waiting(result) if x.tape is tape]
                if tape.model is not None:
                    account.send(tape.model.size(tape, wanted), sum(x.numel() * x.element_size() for x in wanted))
        return account.plan

    def submit(*args: P.args, **kwargs: P.kwargs) -> Any:
        from hookbook.remote import handles

        with deferred.recording() as record:
            return handles.submit(run(*args, **kwargs), record.tapes)

    call.plan, call.submit = plan, submit  # type: ignore[attr-defined]
    return cast("Recipe[P, R]", call)


def plain(x: Tensor) -> Tensor:
    """Numbers as results keep them: without a graph, in float32, on the CPU."""
    return x.detach().float().cpu()
