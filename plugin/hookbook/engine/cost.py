"""What a call costs, in one set of words: plans add up what would run, and recipes what ran."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

FIELDS = ("climbs", "passes", "token_layers", "unembedded", "vjps")
"""Forked forward passes with what follows from them; forward passes; tokens times blocks; rows through the unembedding; vector-Jacobian
products."""

_open: ContextVar[list[Any] | None] = ContextVar("costs", default=None)


def total(*costs: Mapping[str, Any]) -> dict[str, int]:
    """Several costs together; what one does not name is 0."""
    return {field: sum(cost.get(field, 0) for cost in costs) for field in FIELDS}


def spend(cost: Any) -> None:
    """Say what ran: a cost, or a promise of one."""
    costs = _open.get()
    if costs is not None:
        costs.append(cost)


@contextmanager
def counting() -> Iterator[list[Any]]:
    """Inside, costs are gathered; those of a block inside this one count here, too."""
    mine: list[Any] = []
    token = _open.set(mine)
    try:
        yield mine
    finally:
        _open.reset(token)
        for cost in mine:
            spend(cost)
