"""What is asked of a model, and what comes back.

A `Request` is prompts, rows, reads and readouts. A row is one run of one prompt under edits; rows that share a prompt
are forks of one trunk, and `hookbook.engine` computes what they share only once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from hookbook.errors import EditError, TokenError
from hookbook.sites import Site
from hookbook.tokens import Position, Tokens

Op = Literal["set", "add", "scale", "project_out", "clamp"]
OPS: tuple[str, ...] = ("set", "add", "scale", "project_out", "clamp")


@dataclass(frozen=True, eq=False)
class Edit:
    """One change to one site of one row.

    With `x` the site's value at a position and `u` the direction `value / |value|`:

    | op | result | value |
    |---|---|---|
    | `set` | `value` | `[d_model]`, or `[positions, d_model]` |
    | `add` | `x + value` | `[d_model]`, or `[positions, d_model]` |
    | `scale` | `x * value` | a number |
    | `project_out` | `x - (x . u) u` | `[d_model]`, any length but 0 |
    | `clamp` | `x + (to - x . u) u`, so that the projection on `u` is `to` | `[d_model]`, any length but 0 |

    A row's edits at the same site apply in the order given.
    """

    site: Site
    value: Tensor | float
    op: Op = "add"
    position: Position = -1
    to: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "site", Site.parse(self.site))
        if self.op not in OPS:
            raise EditError(f"no operation {self.op!r}", "", f"use one of {', '.join(OPS)}")
        if self.op == "scale":
            if isinstance(self.value, Tensor) and self.value.numel() != 1:
                raise EditError(f"scale at {self.site} by a tensor of shape {list(self.value.shape)}", "scale takes one number", "give a number")
            object.__setattr__(self, "value", float(self.value))
            finite = math.isfinite(self.value)
        else:
            value = torch.as_tensor(self.value).detach()
            if not value.is_floating_point() or value.dim() not in (1, 2):
                raise EditError(
                    f"{self.op} at {self.site} with shape {list(value.shape)} and {value.dtype}",
                    "a vector is [d_model] or [positions, d_model], in floating point",
                    "check where the vector comes from",
                )
            finite = bool(torch.isfinite(value).all())
            if self.op in ("project_out", "clamp"):
                if value.dim() != 1:
                    raise EditError(
                        f"{self.op} at {self.site} with shape {list(value.shape)}",
                        "a direction is one vector",
                        "give [d_model]; use several edits for several directions",
                    )
                if finite and not bool(value.any()):
                    raise EditError(f"{self.op} at {self.site} along the zero vector", "it has no direction", "give a vector with a length")
            object.__setattr__(self, "value", value)
        if not finite or not math.isfinite(self.to):
            raise EditError(
                f"{self.op} at {self.site} with NaN or infinity",
                "it would spread to every later number",
                "look for the step that made it, often half precision",
            )

    def check(self, d_model: int, n_layers: int, n_positions: int) -> None:
        """Raise unless this edit fits a model and the number of tokens its position names."""
        self.site.check(n_layers)
        if isinstance(self.value, Tensor):
            if self.value.shape[-1] != d_model:
                raise EditError(
                    f"a vector of width {self.value.shape[-1]} at {self.site}",
                    f"this model's width is {d_model}",
                    "use a vector of this model, or map it first",
                )
            if self.value.dim() == 2 and self.value.shape[0] not in (1, n_positions):
                raise EditError(
                    f"{self.value.shape[0]} vectors for {n_positions} tokens at {self.site}",
                    "a span takes one vector, or one for each token",
                    "make the numbers agree",
                )


@dataclass(frozen=True, eq=False)
class Row:
    """One run: a prompt (by its number in the request) under edits."""

    prompt: int
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True)
class Each:
    """A position for each row of a request."""

    positions: tuple[Position, ...]


def position_of(position: Position | Each, row: int) -> Position:
    """The position meant for one row."""
    return position.positions[row] if isinstance(position, Each) else position


@dataclass(frozen=True)
class Read:
    """A site's value at a position, for every row. What a read sees includes the edits at its own site."""

    site: Site
    position: Position | Each = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "site", Site.parse(self.site))


@dataclass(frozen=True, eq=False)
class Readout:
    """What to say about the next token after a position, for every row."""

    position: Position | Each = -1
    """One token of each row."""
    k: int = 0
    """How many of the likeliest tokens."""
    tokens: Tensor | None = None
    """Token ids `[row, m]` whose log-probabilities are wanted."""
    logits: bool = False
    """Whether the logits themselves are wanted, `[row, d_vocab]`."""


@dataclass(frozen=True, eq=False)
class Request:
    """Prompts, the rows to run on them, what to read, and what to say about the next token."""

    prompts: Sequence[Tokens]
    rows: Sequence[Row]
    reads: Sequence[Read] = ()
    readout: Readout | None = None
    generate: int = 0
    """How many tokens each row decodes greedily after its prompt; it stops at its own end-of-sequence token."""


@dataclass(frozen=True, eq=False)
class Reading:
    """The values of one read, in long form, so that spans of different lengths need no padding."""

    site: Site
    values: Tensor
    """`[n, d_model]`, on the model's device."""
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

    @staticmethod
    def cat(parts: Sequence[TokenReadout]) -> TokenReadout:
        """Several readouts as one, row after row."""
        if len(parts) == 1:
            return parts[0]
        logits = [p.logits for p in parts if p.logits is not None]
        return TokenReadout(
            torch.cat([p.topk_ids for p in parts]),
            torch.cat([p.topk_logprobs for p in parts]),
            torch.cat([p.token_logprobs for p in parts]),
            torch.cat(logits) if logits else None,
        )


@dataclass(frozen=True, eq=False)
class Reply:
    """What came back. `readings` follow the request's reads."""

    readings: tuple[Reading, ...] = ()
    readout: TokenReadout | None = None
    generated: tuple[tuple[int, ...], ...] = ()
    """The decoded token ids of each row, without the prompt, up to and without its end token."""
    cost: dict[str, int] = field(default_factory=dict)
    """What was computed: `passes`, `token_layers`, `unembedded`."""


def check_one_token(ids: Sequence[int], what: str, tokenizer: object) -> int:
    """The only id, or `TokenError` if there are several."""
    if len(ids) != 1:
        pieces = [tokenizer.decode([i]) for i in ids]  # type: ignore[attr-defined]
        raise TokenError(f"{what} is {len(ids)} tokens {pieces}", "this method needs one", "choose another word, or pass a token id")
    return ids[0]
