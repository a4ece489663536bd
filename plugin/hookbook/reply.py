"""What comes back of a request: values that were read, what is said about the next token, tokens that were decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hookbook.sites import Site
from hookbook.tokens import lines


@dataclass(frozen=True, eq=False)
class Reading:
    """The values of one read, in long form, so that spans of different lengths need no padding."""

    site: Site
    values: Tensor
    """`[n, width]`, on the model's device. Of `attn_pattern`: `[n, head, key]`, or `[n, key]` of one head, where keys are
    the row's own tokens, filled up with zeros to the longest prompt."""
    rows: Tensor
    """`[n]` the row each value belongs to, ascending."""
    positions: Tensor
    """`[n]` its position in the row's own tokens."""


@dataclass(frozen=True, eq=False)
class TokenReadout:
    """The answer to a `Readout`; log-probabilities are in nats, everything is on the CPU."""

    topk_ids: Tensor
    """`[row, k]`"""
    topk_logprobs: Tensor
    """`[row, k]`"""
    token_logprobs: Tensor
    """`[row, m]` for the tokens asked for."""
    logits: Tensor | None = None
    """`[row, d_vocab]` if asked for."""
    token_logits: Tensor | None = None
    """`[row, m]` if asked for, of the tokens asked for there."""

    def __getitem__(self, rows: Tensor) -> TokenReadout:
        """Rows of a readout."""
        some = [None if x is None else x[rows] for x in (self.logits, self.token_logits)]
        return TokenReadout(self.topk_ids[rows], self.topk_logprobs[rows], self.token_logprobs[rows], *some)

    @staticmethod
    def cat(parts: Sequence[TokenReadout]) -> TokenReadout:
        """Several readouts as one, row after row."""
        if len(parts) == 1:
            return parts[0]
        more = [[x for x in column if x is not None] for column in zip(*((p.logits, p.token_logits) for p in parts), strict=True)]
        return TokenReadout(
            torch.cat([p.topk_ids for p in parts]),
            torch.cat([p.topk_logprobs for p in parts]),
            torch.cat([p.token_logprobs for p in parts]),
            *(torch.cat(column) if column else None for column in more),
        )


@dataclass(frozen=True, eq=False)
class LensReadout:
    """What several states say about the next token, each beside the last of them; on the CPU, in nats."""

    topk_ids: Tensor
    """`[n, site, k]`"""
    topk_logprobs: Tensor
    """`[n, site, k]`"""
    end_logprobs: Tensor
    """`[n, site, k]`: what the last state gives these tokens."""
    token_logprobs: Tensor
    """`[n, site, m]` for the tokens asked for."""
    token_ranks: Tensor
    """`[n, site, ranked]`: how many tokens are likelier than each of the first of these."""
    entropy: Tensor
    """`[n, site]`"""
    kl: Tensor
    """`[n, site]`: the divergence KL(last || site)."""

    @staticmethod
    def shapes(states: Tensor, d_vocab: int, k: int, m: int, ranked: int) -> tuple[Tensor, ...]:
        """Its fields for states `[n, site, d_model]`, without numbers."""
        wide, k = torch.promote_types(states.dtype, torch.float32), min(k, d_vocab)
        widths = ((k,), torch.long), ((k,), wide), ((k,), wide), ((m,), wide), ((ranked,), torch.long), ((), wide), ((), wide)
        return tuple(torch.empty(*states.shape[:2], *width, dtype=dtype, device="meta") for width, dtype in widths)


@dataclass(frozen=True, eq=False)
class Reply:
    """What came back. `readings` follow the request's reads."""

    readings: tuple[Reading, ...] = ()
    readout: TokenReadout | None = None
    tokens: Tensor | None = None
    """`[row, generate]` the decoded token ids of each row, without its end token; -1 from there on."""
    token_logprobs: Tensor | None = None
    """`[row, generate]` the log-probability in nats that the model gave to each of these, whatever the sampling."""
    cost: dict[str, int] = field(default_factory=dict)
    """What was computed, in the words of `hookbook.engine.cost.FIELDS`."""

    @property
    def said(self) -> TokenReadout:
        """The readout, of a request that asked for one."""
        assert self.readout is not None
        return self.readout

    @property
    def generated(self) -> tuple[tuple[int, ...], ...]:
        """`tokens` of each row up to its end."""
        return () if self.tokens is None else lines(self.tokens, self.tokens)

    @property
    def logprobs(self) -> tuple[tuple[float, ...], ...]:
        """`token_logprobs` of each row up to its end."""
        return () if self.tokens is None or self.token_logprobs is None else lines(self.tokens, self.token_logprobs)
