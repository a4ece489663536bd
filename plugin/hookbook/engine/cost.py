"""What a call costs, in one set of words: plans add up what would run, and recipes what ran."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hookbook.engine.planning import Part

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


@dataclass(frozen=True)
class Plan:
    """What a call costs, counted before it runs; generated rows that end early or say the same as others cost less."""

    climbs: int
    """Forked forward passes, with what follows from them."""
    passes: int
    """Forward passes: of each climb its prefix, its body, and one for each token that is decoded."""
    token_layers: int
    """Tokens times blocks."""
    unembedded: int
    """Rows through the unembedding."""
    vjps: int
    """Vector-Jacobian products."""
    peak_bytes: int
    """About the most memory that is held at once beside the model."""
    jobs: int
    """Jobs on a remote service; 0 where the model is on this machine."""
    bytes_up: int = 0
    """What is sent to it."""
    bytes_down: int = 0
    """The numbers that come back, before they are packed and compressed."""

    def __str__(self) -> str:
        parts = [
            f"{self.climbs} climb{'s' * (self.climbs != 1)}",
            f"{self.passes} passes",
            f"{self.token_layers:,} token-layers",
            f"{self.unembedded:,} rows unembedded",
        ]
        parts += (
            [f"{self.vjps:,} vector-Jacobian products"] * (self.vjps > 0)
            + [f"{self.peak_bytes / 2**20:,.0f} MiB"]
            + [f"{self.jobs} job{'s' * (self.jobs != 1)}, {self.bytes_up / 1000:,.1f} kB up, {self.bytes_down / 1000:,.1f} kB down"]
            * (self.jobs > 0)
        )
        return ", ".join(parts)


class Account:
    """Adds up what would run."""

    def __init__(self) -> None:
        self.plan = Plan(0, 0, 0, 0, 0, 0, 0)

    def add(self, parts: Sequence[Part], *, unembedded: int = 0, vjps: int = 0, peak_bytes: int = 0) -> None:
        """Count climbs, and what comes beside them."""
        old, beside = self.plan, {"unembedded": unembedded, "vjps": vjps}
        each = [{"climbs": 1} | {name: getattr(part, name) for name in ("passes", "token_layers", "unembedded")} for part in parts]
        before = accumulate((part.answer_bytes for part in parts), initial=0)  # what the climbs before gave is held
        peak = max([old.peak_bytes, peak_bytes, *(part.peak_bytes + held for part, held in zip(parts, before, strict=False))])
        self.plan = replace(old, **total(vars(old), beside, *each), peak_bytes=peak)

    def send(self, bytes_up: int, bytes_down: int) -> None:
        """Count a job."""
        old = self.plan
        self.plan = replace(old, jobs=old.jobs + 1, bytes_up=old.bytes_up + bytes_up, bytes_down=old.bytes_down + bytes_down)


_account: ContextVar[Account | None] = ContextVar("account", default=None)


@contextmanager
def accounting() -> Iterator[Account]:
    """Inside, requests are checked and counted but not run, and answered with zeros."""
    account = Account()
    token = _account.set(account)
    try:
        yield account
    finally:
        _account.reset(token)


def account() -> Account | None:
    """Who counts, if nothing is to run."""
    return _account.get()
