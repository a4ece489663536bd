"""What a backend is asked beside requests: what states say about the next token, and slopes. Counted in a plan, promised elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hookbook.deferred import Deferred, Tape, here
from hookbook.engine import cost, planning, selfcheck
from hookbook.engine.seam import Backend, vjp_shapes
from hookbook.engine.state import locked, using
from hookbook.reply import LensReadout, TokenReadout
from hookbook.request import Readout


def readout(backend: Backend, resid: Tensor, ask: Readout, normed: bool) -> TokenReadout:
    """See `hookbook.adapter.Adapter.readout`. The position of what is asked is not looked at."""
    unembedded = len(resid) if ask.of_all else 0
    if (account := cost.account()) is not None:
        if not normed:
            account.add([], unembedded=unembedded)
        if not backend.remote:
            return blank_readout(len(resid), ask, backend.card.d_vocab)
    if not normed:
        cost.spend({"unembedded": unembedded})
    rows = planning.rows_at_once(backend.card)
    if not backend.remote:
        resid, *wanted = here((resid, ask.tokens, ask.token_logits))
        ask = replace(ask, tokens=wanted[0], token_logits=wanted[1])
    with using(backend), torch.set_grad_enabled(torch.is_grad_enabled() and resid.requires_grad):
        if not normed:
            selfcheck.check(backend)
        return backend.token_readout(resid, rows, ask.k, ask.tokens, ask.logits, normed, ask.token_logits)


def blank_readout(n: int, ask: Readout, d_vocab: int) -> TokenReadout:
    """A readout of promises that nobody keeps."""
    tape = Tape()
    m, words = (0 if x is None else x.shape[1] for x in (ask.tokens, ask.token_logits))
    ids, *values = (
        Deferred.of(tape, (n, width), dtype)
        for width, dtype in ((ask.k, torch.long), *((w, torch.float32) for w in (ask.k, m, d_vocab, words)))
    )
    return TokenReadout(ids, values[0], values[1], values[2] if ask.logits else None, None if ask.token_logits is None else values[3])


def lens(backend: Backend, states: Tensor, k: int, tokens: Tensor | None, ranked: int) -> LensReadout:
    """See `hookbook.adapter.Adapter.lens`."""
    card = backend.card
    if (account := cost.account()) is not None:
        n = states.shape[0] * states.shape[1]
        held = 2 * n * card.d_model * card.itemsize + 3 * min(4 * n * card.d_vocab, planning.logits_bytes())
        account.add([], unembedded=n, peak_bytes=held)
        if not backend.remote:
            shapes = LensReadout.shapes(states, card.d_vocab, k, 0 if tokens is None else tokens.shape[1], ranked)
            return LensReadout(*Tape().note("lens", {}, shapes))
    cost.spend({"unembedded": states.shape[0] * states.shape[1]})
    rows = planning.rows_at_once(card)
    if not backend.remote:
        states, tokens = here((states, tokens))
    with using(backend), torch.no_grad():
        selfcheck.check(backend)
        return backend.lens_readout(states, rows, k, tokens, ranked)


def gradient(backend: Backend, value: Tensor, leaf: Tensor) -> Tensor:
    """See `hookbook.adapter.Adapter.gradient`."""
    if (account := cost.account()) is not None:
        account.add([], vjps=1)
        if not backend.remote:
            return Tape().note("vjps", {}, torch.empty_like(leaf, device="meta"))
    cost.spend({"vjps": 1})
    with locked(backend):
        return backend.slope(value, leaf)


def vjps(
    backend: Backend,
    out: Tensor,
    leaves: Sequence[Tensor],
    states: Sequence[Tensor],
    chunk: int,
    mean: bool,
    tick: Callable[[int], Any] | None,
    into: Sequence[Tensor] | None,
    rows: Any,
) -> list[Tensor]:
    """See `hookbook.adapter.Adapter.vjps`."""
    spent = {"vjps": out.shape[0] * out.shape[1]}
    if (account := cost.account()) is not None:
        account.add([], **spent)
        if not backend.remote:
            return list(Tape().note("vjps", {}, vjp_shapes(out, leaves, mean)))
    cost.spend(spent)
    with locked(backend):
        return backend.pull_back(out, leaves, states, chunk, mean, tick, into, rows)
