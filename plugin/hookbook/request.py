"""What is asked of a model; what comes back is a `hookbook.reply.Reply`.

A `Request` is prompts, rows, reads and readouts. A row is one run of one prompt under edits; rows that share a prompt
are forks of one trunk, and `hookbook.engine.runs` computes what they share only once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hookbook.deferred import hold
from hookbook.errors import EditError, TokenError
from hookbook.sites import Site
from hookbook.tokens import Position, Tokens, resolve

if TYPE_CHECKING:
    from hookbook.card import ModelCard

Op = Literal["set", "add", "scale", "project_out", "clamp", "rotate", "knock_out", "features"]
OPS: tuple[str, ...] = ("set", "add", "scale", "project_out", "clamp", "rotate", "knock_out", "features")
PATTERN_OPS: tuple[str, ...] = ("set", "add", "scale", "knock_out")
DIRECTION_OPS: tuple[str, ...] = ("project_out", "clamp", "rotate")

Scope = Literal["prompt", "generated", "all"] | tuple[int, ...]


@dataclass(frozen=True, eq=False)
class FeatureChange:
    """What becomes of features of a sparse autoencoder: `scale` times the activation, plus `shift`. `hookbook.sae.AttachedSAE.edit` makes
    them."""

    code: dict[str, Any]
    """The SAE's weights, of these features or of all; see `hookbook.travel.features`."""
    features: tuple[int, ...]
    """Which features change."""
    scale: Tensor
    """`[m]` as many as the code has features."""
    shift: Tensor
    """`[m]`"""
    sae: str
    """What the SAE is called, with a fingerprint of its weights."""
    whole: bool
    """Whether the code has all features of the SAE."""
    drop: bool = False
    """Whether what the SAE does not reconstruct is dropped."""
    seen: Site | None = None
    """What a transcoder reads; None: the site itself."""

    @cached_property
    def plain(self) -> dict[str, Any]:
        """As `hookbook.travel.edits.group_edits` takes it."""
        kind = f"{self.sae} {len(self.scale)} {self.whole} {self.drop}"
        seen = None if self.seen is None else (self.seen.name, self.seen.layer)
        return {
            "code": self.code,
            "scale": self.scale,
            "shift": self.shift,
            "drop": self.drop,
            "seen": seen,
            "kind": kind,
            "alike": self.whole,
        }

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.features[:5])) + (", ..." if len(self.features) > 5 else "")
        return f"{shown} of {self.sae}"


@dataclass(frozen=True, eq=False)
class Edit:
    """One change to one site of one row.

    With `x` the site's value at a position and `u` the direction `value / |value|`:

    | op | result | value |
    |---|---|---|
    | `set` | `value` | `[width]`, or `[positions, width]`, or one number for all |
    | `add` | `x + value` | `[width]`, or `[positions, width]`, or one number for all |
    | `scale` | `x * value` | a number |
    | `project_out` | `x - (x . u) u` | `[width]`, any length but 0 |
    | `clamp` | `x + (to - x . u) u`, so that the projection on `u` is `to` | `[width]`, any length but 0 |
    | `rotate` | along `x / |x| + (1 + max(0, -cos(x, u))) value`, as long as `x` | `[width]`, its length says how far |
    | `features` | the site under changed activations of an SAE | what `hookbook.sae.AttachedSAE.edit` gives |
    | `knock_out` | of `attn_pattern` alone: `keys` get no attention, the others share it as the softmax would without them | none |

    `width` is that of the site (`Site.width`): `d_model`, or the width of one head for `head_z.9.3`. A row's edits at the
    same site apply in the order given.

    `attn_pattern` takes numbers, at the tokens that attend (`position`) and, among those they see, the tokens attended to (`keys`; None:
    all), in every head or in one (`attn_pattern.9.3`): `set` and `scale` do not renormalise, `knock_out` equals a score of minus
    infinity before the softmax. Where nothing else is attended to, `knock_out` leaves zeros.

    `scope` says when an edit acts while tokens are decoded: on the `prompt`'s tokens at `position`, as if nothing came
    after; on every `generated` token, once it is fed back; on `all`: both; or on a tuple of absolute positions in the
    row's own prompt and generated tokens. With `generated` and a tuple, `position` is not used and stays at its default.
    """

    site: Site
    value: Tensor | float | FeatureChange = 0.0
    op: Op = "add"
    position: Position = -1
    to: float = 0.0
    scope: Scope = "prompt"
    keys: Position | None = None
    card: ModelCard | None = None
    """The model the value comes from, if it is known; another one refuses it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "site", Site.parse(self.site))
        if self.op not in OPS:
            raise EditError(f"no operation {self.op!r}", "", f"use one of {', '.join(OPS)}")
        self._check_scope()
        if (self.op == "features") != isinstance(self.value, FeatureChange):
            raise EditError(
                f"{self.op} at {self.site} with {type(self.value).__name__}",
                "",
                "make edits of features with hb.sae.attach(model, sae).edit(...)",
            )
        if isinstance(self.value, FeatureChange):
            return
        pattern = self.site.name == "attn_pattern"
        if pattern and self.op not in PATTERN_OPS:
            raise EditError(f"{self.op} at {self.site}", "a pattern has no directions", f"use one of {', '.join(PATTERN_OPS)}")
        if not pattern and (self.op == "knock_out" or self.keys is not None):
            raise EditError(
                f"{self.op} with keys={self.keys!r} at {self.site}",
                "only attn_pattern has keys to knock out or choose",
                "name an attn_pattern site",
            )
        self._check_value_types()
        number = pattern or self.op == "scale" or not isinstance(self.value, Tensor)
        if number and self.op not in DIRECTION_OPS:
            if isinstance(self.value, Tensor) and self.value.numel() != 1:
                raise EditError(
                    f"{self.op} at {self.site} by a tensor of shape {list(self.value.shape)}", "this takes one number", "give a number"
                )
            object.__setattr__(self, "value", float(self.value))
            if self.op == "knock_out" and self.value:
                raise EditError(f"knock_out at {self.site} with a value", "it sets attention to zero", "leave the value out, or use set")
            finite: Any = math.isfinite(self.value)
        else:
            value = torch.as_tensor(self.value)
            if not value.is_floating_point() or value.dim() not in (1, 2):
                raise EditError(
                    f"{self.op} at {self.site} with shape {list(value.shape)} and {value.dtype}",
                    "a vector is [width] or [positions, width], in floating point",
                    "check where the vector comes from",
                )
            finite = torch.isfinite(value).all()
            if self.op in DIRECTION_OPS:
                if value.dim() != 1 or (self.op == "rotate" and len(value) == 1):
                    raise EditError(
                        f"{self.op} at {self.site} with shape {list(value.shape)}",
                        "a direction is one vector, and one number has no directions to turn to"
                        if self.op == "rotate"
                        else "a direction is one vector",
                        "give [width]; use several edits for several directions",
                    )
                hold(
                    value.any(),
                    EditError(f"{self.op} at {self.site} along the zero vector", "it has no direction", "give a vector with a length"),
                )
            object.__setattr__(self, "value", value)
        spread = EditError(
            f"{self.op} at {self.site} with NaN or infinity",
            "it would spread to every later number",
            "look for the step that made it, often half precision",
        )
        hold(finite, spread)
        hold(math.isfinite(self.to), spread)

    def _check_value_types(self) -> None:
        value = self.value
        if isinstance(value, (list, tuple)) or type(value).__module__ == "numpy":
            try:
                value = torch.as_tensor(value)
                value = value if value.is_floating_point() else value.double()
            except (TypeError, ValueError, RuntimeError):
                value = None  # type: ignore[assignment]
            object.__setattr__(self, "value", float(value) if value is not None and not value.dim() else value)
        if not isinstance(self.value, (Tensor, Real)) or not isinstance(self.to, Real):
            raise EditError(f"{self.op} at {self.site} with {self.value!r} and to={self.to!r}", "", "give a tensor or a number")

    def _check_scope(self) -> None:
        scope = self.scope
        if isinstance(scope, list):
            scope = tuple(scope)
            object.__setattr__(self, "scope", scope)
        if isinstance(scope, tuple):
            if not scope or not all(isinstance(p, int) and not isinstance(p, bool) and p >= 0 for p in scope):
                raise EditError(
                    f"scope={scope!r} at {self.site}", "absolute positions count a row's tokens from 0", "give whole numbers of 0 or more"
                )
        elif scope not in ("prompt", "generated", "all"):
            raise EditError(f"scope={scope!r} at {self.site}", "", "use prompt, generated, all, or a tuple of absolute positions")
        if scope not in ("prompt", "all") and not (isinstance(self.position, int) and self.position == -1):
            raise EditError(
                f"scope={scope!r} with position={self.position!r} at {self.site}",
                "this scope names its tokens itself",
                "leave position out, or use the scope 'prompt' or 'all'",
            )

    def __str__(self) -> str:
        value = f"{self.value:g}" if isinstance(self.value, Real) else str(self.value)
        if isinstance(self.value, Tensor):
            value = f"[{'x'.join(map(str, self.value.shape))}] of norm {float(self.value.norm()):.4g}"
        where = f"tokens {self.position}" if self.scope in ("prompt", "all") else ""
        keys = "" if self.keys is None else f"keys {self.keys}"
        words = [
            self.op,
            "" if self.op == "knock_out" else value,
            f"to {self.to:g}" if self.op == "clamp" else "",
            "at",
            str(self.site),
            where,
            keys,
        ]
        return " ".join([word for word in words if word] + ([f"scope {self.scope}"] if self.scope != "prompt" else []))

    @property
    def touches(self) -> tuple[Site, ...]:
        """The site, and what a transcoder reads for it."""
        seen = self.value.seen if isinstance(self.value, FeatureChange) else None
        return (self.site,) if seen is None else (seen, self.site)

    def positions(self, tokens: Tokens) -> list[int]:
        """The tokens of a prompt on which this edit acts."""
        if self.scope == "generated":
            return []
        if isinstance(self.scope, tuple):
            return sorted({p for p in self.scope if p < len(tokens)})
        return list(resolve(self.position, tokens))

    def acts_at(self, position: int) -> bool:
        """Whether this edit acts on a generated token, by its position in prompt and generated tokens."""
        return position in self.scope if isinstance(self.scope, tuple) else self.scope != "prompt"

    def check(self, card: ModelCard, n_positions: int) -> None:
        """Raise unless this edit fits a model and the number of tokens its position names."""
        if self.card is not None and (why := self.card.unlike(card)):
            raise EditError(f"a vector of {self.card.model_id} in {card.model_id}", why, "if you mean it: vector.on(model)")
        self.site.check(card)
        if isinstance(self.value, FeatureChange) and self.value.code["writes"].shape[-1] != self.site.width(card):
            raise EditError(
                f"features of {self.value.sae} at {self.site}",
                f"this model's width there is {self.site.width(card)}",
                "use an SAE of this model",
            )
        if isinstance(self.value, Tensor):
            width = self.site.width(card)
            if self.value.shape[-1] != width:
                raise EditError(
                    f"a vector of width {self.value.shape[-1]} at {self.site}",
                    f"this model's width there is {width}",
                    "use a vector of this model and site, or map it first",
                )
            if self.value.dim() == 2 and self.value.shape[0] != 1 and (self.scope != "prompt" or self.value.shape[0] != n_positions):
                raise EditError(
                    f"{self.value.shape[0]} vectors for {n_positions} tokens at {self.site} in the scope {self.scope!r}",
                    "a span of the prompt takes one vector, or one for each token; other scopes take one",
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
    token_logits: Tensor | None = None
    """Token ids `[row, m]` whose logits are wanted, without the normaliser: of these words' rows of the unembedding alone, which in a wide
    sweep spares most of the time of log-probabilities. Their differences are those of log-probabilities."""

    @property
    def of_all(self) -> bool:
        """Whether anything is asked for that needs the logits of all words."""
        return bool(self.k) or self.tokens is not None or self.logits


@dataclass(frozen=True)
class Sampling:
    """Drawing tokens from the model's distribution. A row's draws depend on the seed and its place in the request alone."""

    seed: int
    temperature: float = 1.0
    top_k: int = 0
    """Draw among this many likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""

    def __post_init__(self) -> None:
        whole = all(isinstance(x, Integral) and not isinstance(x, bool) for x in (self.seed, self.top_k))
        if not whole or not all(isinstance(x, Real) for x in (self.temperature, self.top_p)) or not 0 <= self.seed < 1 << 63:
            raise TokenError(
                f"sampling with seed={self.seed!r}, temperature={self.temperature!r}, top_k={self.top_k!r}, top_p={self.top_p!r}",
                "seed and top_k are whole numbers",
                "give numbers",
            )
        if not (0 < self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise TokenError(
                f"sampling with temperature={self.temperature}, top_k={self.top_k}, top_p={self.top_p}",
                "",
                "use a temperature above 0, top_k of 0 or more, and top_p above 0 and at most 1",
            )


@dataclass(frozen=True, eq=False)
class Request:
    """Prompts, the rows to run on them, what to read, and what to say about the next token."""

    prompts: Sequence[Tokens]
    rows: Sequence[Row]
    reads: Sequence[Read] = ()
    readout: Readout | None = None
    generate: int = 0
    """How many tokens each row decodes after its prompt; it stops at its own end-of-sequence token."""
    sampling: Sampling | None = None
    """How tokens are drawn; None: the likeliest one. Nothing of the checkpoint's generation config is used."""
    grad: bool = False
    """Keep the graph, so that readings and logits can be differentiated with respect to the edits' values."""


def check_one_token(ids: Sequence[int], what: str, tokenizer: object) -> int:
    """The only id, or `TokenError` if there are several."""
    if len(ids) != 1:
        pieces = [tokenizer.decode([i]) for i in ids]  # type: ignore[attr-defined]
        raise TokenError(f"{what} is {len(ids)} tokens {pieces}", "this method needs one", "choose another word, or pass a token id")
    return ids[0]
