"""What a recipe is written with: `@recipe`, which gives a call its plan, its job, its settings and its cost; and what nearly all begin and
end with, `wrap`, `later`, `fetch`, `hold`, `plain` and the model's card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import Signature, signature
from numbers import Integral, Real
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from torch import Tensor

from hookbook import deferred
from hookbook.card import ModelCard as ModelCard
from hookbook.deferred import Later as Later, fetch as fetch, hold as hold, later as later
from hookbook.engine import cost, state
from hookbook.engine.cost import Plan, accounting
from hookbook.models.loading import wrap as wrap
from hookbook.sites import Site
from hookbook.tokens import At

NO_SETTINGS = ("model", "target_model", "progress", "checkpoint")
"""Arguments which are not kept in results."""
MOST = 100
"""A longer list is data, not a setting."""

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

    A result's `settings` need not be written by hand: what was asked for as plain data is put there, if it is no field of the result and
    the recipe did not say it itself; positions as text. So is the `cost`, of all that ran for the call.
    """
    asked = signature(run)

    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        with cost.counting() as costs, state.one_call():
            result = run(*args, **kwargs)
        facts, spent = settings_of(asked, *args, **kwargs), later(cost.total, *costs)
        return cast("R", Later(_filled, (result, facts, spent))) if isinstance(result, Later) else _filled(result, facts, spent)

    @wraps(run)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        outer = deferred.current()
        if outer is not None:  # a recipe of a recipe, or of a job
            result = made(*args, **kwargs)
            outer.results.append(result)
            return result
        with deferred.recording() as record:
            return deferred.settle(made(*args, **kwargs), record)

    def plan(*args: P.args, **kwargs: P.kwargs) -> Plan:
        with accounting() as account, deferred.recording(dry=True) as record:
            result = made(*args, **kwargs)
            for sizes in record.sent:
                account.send(*sizes)
            for tape in record.tapes.values():
                wanted = [x for x in deferred.waiting(result) if x.tape is tape]
                if tape.model is not None:
                    account.send(tape.model.size(tape, wanted), sum(x.numel() * x.element_size() for x in wanted))
        return account.plan

    def submit(*args: P.args, **kwargs: P.kwargs) -> Any:
        from hookbook.remote import handles

        with deferred.recording() as record:
            return handles.submit(made(*args, **kwargs), record.tapes)

    call.plan, call.submit = plan, submit  # type: ignore[attr-defined]
    return cast("Recipe[P, R]", call)


def settings_of(asked: Signature, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call, with its defaults, that are plain data."""
    call = asked.bind(*args, **kwargs)
    call.apply_defaults()
    named = {name: str(value) if name.endswith("position") else value for name, value in call.arguments.items() if name not in NO_SETTINGS}
    return {name: kept for name, value in named.items() if (kept := _setting(value)) is not _DATA}


_DATA = object()


def _setting(value: Any) -> Any:
    """A value as settings keep it, or `_DATA`."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (Site, At, slice)):
        return str(value)
    if isinstance(value, (Integral, Real)):
        return int(value) if isinstance(value, Integral) else float(value)
    if not isinstance(value, (list, tuple, range)) or len(value) > MOST:
        return _DATA
    items = [_setting(item) for item in value]
    return _DATA if any(item is _DATA for item in items) else tuple(items) if isinstance(value, tuple) else items


def _filled(result: Any, facts: dict[str, Any], spent: Any) -> Any:
    """A result with its settings and its cost; anything else as it is."""
    settings = getattr(result, "settings", None)
    if is_dataclass(result) and isinstance(settings, dict):
        mine = {field.name for field in fields(result)} | settings.keys()
        settings.update({name: value for name, value in facts.items() if name not in mine}, cost=spent)
    return result


def plain(x: Tensor) -> Tensor:
    """Numbers as results keep them: without a graph, in float32, on the CPU."""
    return x.detach().float().cpu()
