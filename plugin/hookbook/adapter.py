"""A model under hookbook's interface: what recipes ask.

A backend says what its model is, takes a `Climb` through one forward pass, and maps the stream to logits (`hookbook.engine.seam`).
Everything else (requests, forks, readouts, decoding) is written once, in `hookbook.engine`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hookbook.card import ModelCard as ModelCard, versions as versions
from hookbook.deferred import hold
from hookbook.engine import questions, runs
from hookbook.engine.seam import Backend
from hookbook.engine.state import using
from hookbook.errors import Refused
from hookbook.reply import LensReadout, Reply, TokenReadout
from hookbook.request import Readout, Request
from hookbook.sites import SITES, Site
from hookbook.tokens import Tokens, encode


class Adapter(Backend):
    """A model under hookbook's interface. It holds the model and changes nothing in it."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site that can be read and edited, in the order of the pass."""
        every = (Site(name, layer) for name, spec in SITES.items() for layer in (range(self.card.n_layers) if spec.layered else [None]))
        return tuple(sorted((s for s in every if self.refuses(s) is None), key=lambda s: s.order))

    def look(self) -> None:
        """Bring the card up to date; see `hookbook.engine.state.look`."""
        with using(self):
            pass

    def encode(self, prompt: Any, *, bos: bool | None = None, chat: bool = False) -> Tokens:
        """A prompt as this model sees it; see `hookbook.tokens.encode`."""
        return encode(prompt, self.tokenizer, bos=bos, chat=chat, n_ctx=self.card.n_ctx)

    def run(self, request: Request, *, progress: bool | None = None, checkpoint: str | os.PathLike[str] | None = None) -> Reply:
        """Run a request; see `hookbook.engine.runs.run`."""
        return runs.run(self, request, progress=progress, checkpoint=checkpoint)

    def readout(
        self,
        resid: Tensor,
        *,
        k: int = 0,
        tokens: Tensor | None = None,
        logits: bool = False,
        token_logits: Tensor | None = None,
        normed: bool = False,
    ) -> TokenReadout:
        """What the stream before the final norm says about the next token.

        Args:
            resid: `[n, d_model]`.
            normed: It went through the final norm already.
            k: How many of the likeliest tokens.
            tokens: Token ids `[n, m]` whose log-probabilities are wanted.
            logits: Return all logits, too.
            token_logits: Token ids `[n, m]` whose logits are wanted, without the normaliser; see `hookbook.request.Readout`.
        """
        return questions.readout(self, resid, Readout(k=k, tokens=tokens, logits=logits, token_logits=token_logits), normed)

    def lens(self, states: Tensor, *, k: int = 1, tokens: Tensor | None = None, ranked: int = 0) -> LensReadout:
        """What several states say about the next token, each beside the last of them; see `hookbook.travel.readout.lens`.

        Args:
            states: `[n, site, d_model]` before the final norm; the last is the last block's output.
            k: How many of the likeliest tokens.
            tokens: Token ids `[n, m]` whose log-probabilities are wanted.
            ranked: Of how many of these, the first, the ranks are wanted.
        """
        return questions.lens(self, states, k, tokens, ranked)

    def gradient(self, value: Tensor, leaf: Tensor) -> Tensor:
        """The gradient `[1, m]` of one number with respect to a leaf `[1, m]`, through what a request with `grad` gave."""
        return questions.gradient(self, value, leaf)

    def vjps(
        self,
        out: Tensor,
        leaves: Sequence[Tensor],
        states: Sequence[Tensor],
        chunk: int,
        mean: bool = False,
        *,
        tick: Callable[[int], Any] | None = None,
        into: Sequence[Tensor] | None = None,
        rows: Any = None,
    ) -> list[Tensor]:
        """The Jacobians of `out` `[n, d_out]`, which a request with `grad` gave, with respect to leaves, and these times states; see
        `hookbook.travel.vjps.vjps`. Promises are not written `into` anything."""
        return questions.vjps(self, out, leaves, states, chunk, mean, tick, into, rows)

    def head_contributions(self, layer: int, z: Tensor) -> Tensor:
        """What each head adds to the stream, `[n, n_heads, d_model]`, given `head_z` of one block `[n, n_heads * d_head]`.

        Without a norm after attention this is the head's slice of the output projection times its `z`; biases are
        nobody's. With one (Gemma 2 and 3), which is not linear, its scale is frozen at the value it has for this `z`,
        all heads together: the sum over heads is then still what attention adds to the stream.

        Raises:
            Refused: The norm after attention does more than scale by the root mean square.
        """
        self.require(Site("head_z", layer))
        project, norm = self.writer("head_z", layer)
        apart = torch.eye(self.card.n_heads, dtype=z.dtype, device=z.device).repeat_interleave(self.card.d_head, -1)
        with torch.no_grad():
            bias, whole = project(torch.zeros_like(z[:1])), project(z)
            parts = project((z[:, None] * apart).flatten(0, 1)).unflatten(0, (len(z), -1)) - bias
            if norm is None:
                return parts
            eps = getattr(norm, "eps", getattr(norm, "variance_epsilon", 0.0))
            parts = torch.cat([parts, bias.expand(len(z), 1, -1)], 1)
            parts = norm(parts) * _rms(parts, eps) / _rms(whole, eps)[:, None]
            expected = norm(whole)
        close = (parts.sum(1) - expected).abs().max() <= (1e-3 if self.card.itemsize >= 4 else 5e-2) * (1 + expected.abs().max())
        refusal = Refused(
            f"one head's contribution in {self.card.architecture}", "the norm after attention is not a root mean square", "use attn_out"
        )
        hold(close, refusal)
        return parts[:, :-1]


def _rms(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt().to(x.dtype)
