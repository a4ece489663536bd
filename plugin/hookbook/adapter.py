"""The seam between recipes and backends.

A backend says what its model is, takes a `Climb` through one forward pass, and maps the stream to logits. Everything
else (requests, forks, readouts, decoding) is written once, here and in `hookbook.engine.runs`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hookbook.card import ModelCard as ModelCard, versions as versions
from hookbook.deferred import Tape, here, hold
from hookbook.engine import cost, planning, runs as engine, selfcheck
from hookbook.errors import ModelError, Refused
from hookbook.request import LensReadout, Reply, Request, TokenReadout
from hookbook.sites import SITES, Site
from hookbook.tokens import Tokens, encode
from hookbook.travel.climb import Climb
from hookbook.travel.decoding import decode
from hookbook.travel.readout import lens, readout
from hookbook.travel.vjps import vjps


class Adapter(ABC):
    """A model under hookbook's interface. It holds the model and changes nothing in it."""

    remote = False
    """Whether the model is elsewhere, so that what it gives are promises (`hookbook.deferred`)."""
    card: ModelCard
    tokenizer: Any
    model: Any
    """The model that was wrapped."""

    @abstractmethod
    def forward(self, tokens: Tensor, mask: Tensor | None, climb: Climb, *, kept: Any = None, keep: int = 0) -> Any:
        """One forward pass that shows `climb` the stream and the sites it wants, and ends at `climb.last`.

        Args:
            tokens: `[prompt, pos]` the new tokens.
            mask: `[prompt, kept + pos]`, 0 where a token is left padding; None if nothing is padded.
            climb: What to do on the way.
            kept: Keys and values of the tokens before, as `keep` returned them: for each layer a `hookbook.travel.kept.Kept`, which is
                consumed.
            keep: Return keys and values of all tokens, for each layer below `climb.last`, with room for so many tokens more, less one; 0:
                do not.
        """

    @abstractmethod
    def final_norm(self, resid: Tensor) -> Tensor:
        """The final norm of the stream, `[n, d_model]`."""

    @abstractmethod
    def unembed(self, normed: Tensor, words: slice | None = None) -> Tensor:
        """The unembedding and whatever the model does to logits afterwards: `[n, d_model]` after the final norm to `[n, d_vocab]`.

        `words` is a part of the vocabulary, which only an adapter that `splits` is asked for.
        """

    def splits(self) -> int:
        """How many words the vocabulary has, if `unembed` gives parts of it; 0: it gives all alone."""
        return 0

    @abstractmethod
    def writer(self, name: str, layer: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
        """How a site writes to the stream: its output projection, and the norm after it if there is one.

        Args:
            name: `head_z` or `mlp_act`.
            layer: The block.
        """

    @abstractmethod
    def plain_logits(self, tokens: Tensor) -> Tensor:
        """The model's own logits `[1, pos, d_vocab]` of `tokens` `[1, pos]`, without hookbook."""

    @property
    @abstractmethod
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a generation."""

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

    def ready(self) -> None:  # noqa: B027  most adapters have nothing to look for
        """Raise if something was done to the model since it was wrapped that hookbook would not see. Runs nothing."""

    def refuses(self, site: Site) -> Refused | None:
        """Why this adapter cannot read and edit a site, or None if it can. Runs nothing."""
        return None

    def require(self, site: Site) -> None:
        """Raise `SiteError` or `Refused` unless a site can be read and edited."""
        self.ready()
        refusal = self.refuses(site.check(self.card))
        if refusal is not None:
            raise refusal

    @property
    def packs(self) -> bool:
        """Whether rows of one token may share a row of the batch (`Climb.pack`), if the model turns out to allow it."""
        return False

    @property
    def pad_id(self) -> int:
        """Any token; padding is masked."""
        return 0

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site that can be read and edited, in the order of the pass."""
        every = (Site(name, layer) for name, spec in SITES.items() for layer in (range(self.card.n_layers) if spec.layered else [None]))
        return tuple(sorted((s for s in every if self.refuses(s) is None), key=lambda s: s.order))

    def encode(self, prompt: Any, *, bos: bool | None = None, chat: bool = False) -> Tokens:
        """A prompt as this model sees it; see `hookbook.tokens.encode`."""
        return encode(prompt, self.tokenizer, bos=bos, chat=chat, n_ctx=self.card.n_ctx)

    def run(self, request: Request, *, progress: bool | None = None, checkpoint: str | os.PathLike[str] | None = None) -> Reply:
        """Run a request; see `hookbook.engine.runs.run`."""
        return engine.run(self, request, progress=progress, checkpoint=checkpoint)

    def readout(
        self, resid: Tensor, *, k: int = 0, tokens: Tensor | None = None, logits: bool = False, normed: bool = False
    ) -> TokenReadout:
        """What the stream before the final norm says about the next token.

        Args:
            resid: `[n, d_model]`.
            normed: It went through the final norm already.
            k: How many of the likeliest tokens.
            tokens: Token ids `[n, m]` whose log-probabilities are wanted.
            logits: Return all logits, too.
        """
        if (account := planning.account()) is not None:
            if not normed:
                account.add([], unembedded=len(resid))
            if not self.remote:
                return engine.blank_readout(len(resid), k, 0 if tokens is None else tokens.shape[1], self.card.d_vocab if logits else 0)
        if not normed:
            selfcheck.check(self)
            cost.spend({"unembedded": len(resid)})
        rows = planning.rows_at_once(self.card)
        if not self.remote:
            resid, tokens = here((resid, tokens))
        with torch.set_grad_enabled(torch.is_grad_enabled() and resid.requires_grad):
            return self._readout(resid, rows, k, tokens, logits, normed)

    def _readout(self, resid: Tensor, rows: int, k: int, tokens: Tensor | None, logits: bool, normed: bool) -> TokenReadout:
        return TokenReadout(*readout(self, resid, rows, k, tokens, logits, normed))

    def lens(self, states: Tensor, *, k: int = 1, tokens: Tensor | None = None, ranked: int = 0) -> LensReadout:
        """What several states say about the next token, each beside the last of them; see `hookbook.travel.readout.lens`.

        Args:
            states: `[n, site, d_model]` before the final norm; the last is the last block's output.
            k: How many of the likeliest tokens.
            tokens: Token ids `[n, m]` whose log-probabilities are wanted.
            ranked: Of how many of these, the first, the ranks are wanted.
        """
        if (account := planning.account()) is not None:
            n = states.shape[0] * states.shape[1]
            held = 2 * n * self.card.d_model * self.card.itemsize + 3 * min(4 * n * self.card.d_vocab, planning.logits_bytes())
            account.add([], unembedded=n, peak_bytes=held)
            if not self.remote:
                shapes = LensReadout.shapes(states, self.card.d_vocab, k, 0 if tokens is None else tokens.shape[1], ranked)
                return LensReadout(*Tape().note("lens", {}, shapes))
        selfcheck.check(self)
        cost.spend({"unembedded": states.shape[0] * states.shape[1]})
        rows = planning.rows_at_once(self.card)
        if not self.remote:
            states, tokens = here((states, tokens))
        return self._lens(states, rows, k, tokens, ranked)

    @torch.no_grad()
    def _lens(self, states: Tensor, rows: int, k: int, tokens: Tensor | None, ranked: int) -> LensReadout:
        return LensReadout(*lens(self, states, rows, k, tokens, ranked))

    def leaf(self, *shape: int) -> Tensor:
        """Zeros beside the model, for gradients."""
        return torch.zeros(shape, dtype=getattr(torch, self.card.dtype), requires_grad=True)

    def gradient(self, value: Tensor, leaf: Tensor) -> Tensor:
        """The gradient `[1, m]` of one number with respect to a leaf `[1, m]`, through what a request with `grad` gave."""
        if (account := planning.account()) is not None:
            account.add([], vjps=1)
            if not self.remote:
                return Tape().note("vjps", {}, torch.empty_like(leaf, device="meta"))
        cost.spend({"vjps": 1})
        return self._gradient(value, leaf)

    def _gradient(self, value: Tensor, leaf: Tensor) -> Tensor:
        return torch.autograd.grad(value, leaf)[0]

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
        spent = {"vjps": out.shape[0] * out.shape[1]}
        if (account := planning.account()) is not None:
            account.add([], **spent)
            if not self.remote:
                return list(Tape().note("vjps", {}, shapes(out, leaves, mean)))
        cost.spend(spent)
        return self._vjps(out, leaves, states, chunk, mean, tick, into, rows)

    def _vjps(self, out: Tensor, leaves: Any, states: Any, chunk: int, mean: bool, tick: Any, into: Any, rows: Any) -> list[Tensor]:
        return vjps(out, leaves, states, chunk, mean, tick, into, rows)

    def decode(
        self, kept: Any, normed: Tensor, todo: dict[str, Any], tick: Callable[[int], Any] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Let the rows of a climb go on; see `hookbook.travel.decoding.decode`."""
        return decode(self, kept, normed, todo, tick)


def shapes(out: Tensor, leaves: Sequence[Tensor], mean: bool) -> tuple[Tensor, ...]:
    """What `Adapter.vjps` gives, without numbers."""
    lead = [] if mean else [len(out)]
    matrices = (torch.empty(*lead, out.shape[1], leaf.shape[1], dtype=leaf.dtype, device="meta") for leaf in leaves)
    return (*matrices, *(torch.empty(out.shape, dtype=leaf.dtype, device="meta") for leaf in leaves))


def _rms(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt().to(x.dtype)


def check_eval(module: Any, name: str) -> None:
    """Raise if a model is in training mode, where dropout would make every run another."""
    if module.training:
        raise ModelError(f"{name} is in training mode", "dropout would make every run another", "call model.eval() first")
