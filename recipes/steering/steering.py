"""Steering: a vector added to the stream, over layers and strengths, beside no vector and a random one of the same length."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hookbook.adapter import Adapter
from hookbook.asking import encode_prompts, grouped_texts, wanted_ids
from hookbook.controls import random_like
from hookbook.errors import DataError, EditError, SiteError, TokenError, check_counts
from hookbook.recipe import ModelCard, later, recipe, wrap
from hookbook.recipes.steering.contrast_vectors import ContrastVectors
from hookbook.request import Edit, Readout, Request, Row, Scope
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.show.plots import heat_map, lines
from hookbook.show.tidy import tidy
from hookbook.sites import Site, layers_to_sites
from hookbook.tokens import Position, Tokens
from hookbook.vectors import Vector


@dataclass(frozen=True, eq=False)
class Steering(Result):
    """What a model says under a vector: `n` prompts, by site and strength, beside controls."""

    card: ModelCard
    prompts: tuple[Tokens, ...]
    """`[n]`"""
    sites: tuple[Site, ...]
    strengths: tuple[float, ...]
    metric: str
    """What the scores are."""
    numbers: Tensor
    """`[n, 1 + 2 * site * strength]`: without a vector, with it, with a random one of the same length."""
    said: tuple[tuple[str, ...], ...]
    """`[n][1 + 2 * site * strength]`: what was generated; empty if nothing was."""
    settings: dict[str, Any]

    @property
    def base(self) -> Tensor:
        """`[n]` scores without a vector."""
        return self.numbers[:, 0]

    @property
    def scores(self) -> Tensor:
        """`[n, site, strength]` scores with the vector."""
        return self._both[:, 0]

    @property
    def random(self) -> Tensor:
        """`[n, site, strength]` scores with a random vector of the same length."""
        return self._both[:, 1]

    @property
    def _both(self) -> Tensor:
        return self.numbers[:, 1:].unflatten(1, (2, len(self.sites), len(self.strengths)))

    def to_frame(self) -> DataFrame:
        """One row for each prompt, vector (`none`, `vector` or `random`), site and strength: those, `layer`, `score`, and `text` if one
        was generated. Without a vector there is no site, and the strength is 0."""
        added = [(name, site, strength) for name in ("vector", "random") for site in self.sites for strength in self.strengths]
        axes = {"prompt": self.prompts, "vector site strength": [("none", None, 0.0), *added]}
        return tidy(axes, score=self.numbers, text=self.said or None)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The mean score over prompts: by strength with the controls for one site, a heat map of sites and strengths for several."""
        mean, labels = self.scores.mean(0), [f"{strength:g}" for strength in self.strengths]
        title = f"Steering {self.card.model_id}, {self.sites[0] if len(self.sites) == 1 else f'{len(self.sites)} sites'}"
        if len(self.sites) == 1:
            feature = self.settings.get("feature")
            mine, kind, over = (
                (str(self.sites[0]), "vector", "strength") if feature is None else (f"feature {feature}", "feature", "clamped to")
            )
            curves = {mine: mean[0], f"random {kind}": self.random.mean(0)[0]}
            return lines(ax, curves, (over, self.metric), labels=labels, levels={f"no {kind}": float(self.base.mean())}, title=title)
        sites = [str(site) for site in self.sites]
        words, names, signed = (
            [[f"{x:.2f}" for x in line] for line in mean.tolist()],
            ("site", "strength", self.metric),
            bool(mean.min() < 0),
        )
        return heat_map(ax, mean, words, sites, labels, names, limits=None, signed=signed, title=title)

    def view(self) -> View:
        """The mean score of the vector and of a random one, by site and strength, and without one; with what was generated, if it was."""
        scores = {"vector": self.scores.mean(0), "random": self.random.mean(0), "none": self.base.mean()}
        table = View.table(tidy({"site": self.sites, "strength": self.strengths}, **scores), f"Mean {self.metric}")
        return table + View.table(self.to_frame(), "What was said") if self.said else table


@recipe
def steer(
    model: Any,
    vectors: Vector | Sequence[Vector] | ContrastVectors,
    prompts: Any,
    *,
    strengths: Sequence[float] = (-2.0, -1.0, 1.0, 2.0),
    layers: Any = None,
    tokens: tuple[Sequence[str | int], Sequence[str | int]] | None = None,
    score: Callable[[Sequence[str]], float] | None = None,
    generate: int = 0,
    position: Position = slice(None),
    scope: Scope = "all",
    seed: int = 0,
    bos: bool | None = None,
    chat: bool = False,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Steering:
    """Add a vector at every layer and strength, and score what the model then says; all in one forked pass.

    Args:
        model: Any model `hookbook.wrap` takes.
        vectors: A `Vector`; several, each for its own site; or `ContrastVectors` of one position.
        prompts: A prompt, or a list of `n` prompts.
        strengths: What vectors are multiplied by. They are not normalised.
        layers: Of `ContrastVectors` those to try, None: all; where to put a single `Vector`, None: where it was read.
        tokens: Two lists of words (texts as they follow a prompt, or ids): the score is `log P(first) - log P(second)` of the next token,
            in nats.
        score: A function of a list of texts, such as those of `hookbook.scores`: the score is what it gives for the list of one
            continuation.
        generate: How many tokens to decode greedily after each prompt.
        position, scope: Where vectors are added, see `Edit`; the default is all tokens, read and generated.
        seed: Of the random vectors: one for each site, of the vector's length.
        bos, chat: See `hookbook.tokens.encode`.
        progress, checkpoint: See `hookbook.generate`.

    Returns:
        `Steering`, in which prompts stay apart and texts are kept.

    Raises:
        DataError: There is not one score, or a word is on both sides.
        EditError, SiteError, TokenError: A vector of another model, no strengths, or words that are not one token.

    Source: activation addition at all tokens as in Arditi et al. 2024, arXiv:2406.11717 (`resid_pre`, strength 1 and -1).

    Differs: Rimsky et al. 2023, arXiv:2312.06681, add after the instruction only: give their tokens as `position`. The random vector
        beside it is ours.

    Example:
        >>> from hookbook.testing import toy
        >>> v = Vector.of(toy(), "resid_post.1", torch.arange(16.0))
        >>> steer(toy(), v, ["ab", "c"], tokens=(["a", "e"], ["b"]), strengths=[1, 2]).scores.shape
        torch.Size([2, 1, 2])
    """
    adapter = wrap(model)
    coded = encode_prompts(adapter, prompts, bos, chat)
    chosen = _chosen(adapter, vectors, layers)
    strengths = check_strengths(strengths)
    noise = [random_like(v.values, seed + i) for i, v in enumerate(chosen)]
    sets = [
        [
            (Edit(v.site, values * strength, "add", position, scope=scope, card=v.card),)
            for v, values in zip(chosen, some, strict=True)
            for strength in strengths
        ]
        for some in ([v.values for v in chosen], noise)
    ]
    sites, settings = tuple(v.site for v in chosen), {"norms": [v.norm for v in chosen]}
    return steered(adapter, coded, sites, strengths, sets[0] + sets[1], tokens, score, generate, settings, progress, checkpoint)


def check_strengths(strengths: Sequence[float]) -> tuple[float, ...]:
    """Strengths, each of them once."""
    strengths = tuple(float(strength) for strength in strengths)
    if not strengths or len(set(strengths)) < len(strengths):
        raise EditError(f"strengths={strengths}", "each is tried once", "give some different numbers")
    return strengths


def steered(
    adapter: Adapter,
    coded: Sequence[Tokens],
    sites: tuple[Site, ...],
    strengths: tuple[float, ...],
    edits: Sequence[tuple[Edit, ...]],
    tokens: tuple[Sequence[str | int], Sequence[str | int]] | None,
    score: Callable[[Sequence[str]], float] | None,
    generate: int,
    settings: dict[str, Any],
    progress: bool | None,
    checkpoint: str | os.PathLike[str] | None,
) -> Steering:
    """What `steer` does once the edits are there: those of every site and strength, then their controls."""
    if (tokens is None) == (score is None):
        raise DataError(
            "tokens and score" if tokens is not None else "no score",
            "one of them says what counts",
            "give either tokens=(words, words) or score=",
        )
    check_counts(0, generate=generate)
    if score is not None and not generate:
        raise TokenError(f"generate={generate}", "the score is of generated texts", "say how many tokens to generate")
    wanted, split = (None, 0) if tokens is None else _wanted_ids(adapter, coded, tokens)
    n = len(coded)
    rows = [Row(i, some) for i in range(n) for some in [(), *edits]]
    readout = None if wanted is None else Readout(tokens=wanted.repeat_interleave(1 + len(edits), 0))
    reply = adapter.run(Request(coded, rows, (), readout, generate), progress=progress, checkpoint=checkpoint)
    said = () if reply.tokens is None else later(grouped_texts, adapter, reply.tokens, 1 + len(edits))
    if reply.readout is not None:
        known = reply.said.token_logprobs.double()
        numbers = (known[:, :split].logsumexp(-1) - known[:, split:].logsumexp(-1)).unflatten(0, (n, -1))
    else:
        numbers = later(_scored, score, said)
    return Steering(
        card=adapter.card,
        prompts=tuple(coded),
        sites=sites,
        strengths=strengths,
        metric=getattr(score, "__name__", "score") if tokens is None else f"log P({_words(tokens[0])}) - log P({_words(tokens[1])})",
        numbers=numbers,
        said=said,
        settings=settings,
    )


def _chosen(adapter: Adapter, vectors: Any, layers: Any) -> list[Vector]:
    """The vectors to add, each at its own site."""
    if isinstance(vectors, ContrastVectors):
        if len(vectors.positions) > 1:
            raise TokenError(
                f"vectors of the positions {', '.join(vectors.positions)}",
                "one is added",
                "choose: [found.vector(layer, position) for layer in ...]",
            )
        sites = vectors.sites if layers is None else layers_to_sites(layers, vectors.card, vectors.sites[0].name)
        chosen = [vectors.vector(site) for site in sites]
    elif isinstance(vectors, Vector):
        sites = [vectors.site] if layers is None else layers_to_sites(layers, adapter.card, vectors.site.name)
        chosen = [replace(vectors, site=site) for site in sites]
    else:
        chosen = list(vectors)
        if layers is not None or not chosen or not all(isinstance(v, Vector) for v in chosen):
            raise EditError(
                f"{len(chosen)} vectors with layers={layers!r}",
                "several vectors have their own sites",
                "give hookbook.Vectors, and leave layers out",
            )
        if len({v.site for v in chosen}) < len(chosen):
            raise SiteError("several vectors at one site", "they would be one place in the result", "call steer for each")
    return chosen


def _wanted_ids(adapter: Adapter, coded: Sequence[Tokens], tokens: Any) -> tuple[Tensor, int]:
    """The ids of both sides for each prompt, and how many are of the first."""
    if not isinstance(tokens, (tuple, list)) or len(tokens) != 2 or any(isinstance(side, (str, int)) or not len(side) for side in tokens):
        raise DataError(f"tokens={tokens!r}", "the score compares two lists of words", 'write tokens=([" good", ...], [" bad", ...])')
    wanted = wanted_ids(adapter, coded, [word for side in tokens for word in side])
    if any(len(set(ids)) < len(ids) for ids in wanted.tolist()):
        raise DataError(f"tokens={tokens!r}", "a token is there twice", "name each once")
    return wanted, len(tokens[0])


def _words(side: Sequence[str | int]) -> str:
    return " ".join(str(word).strip() for word in side[:3]) + (" ..." if len(side) > 3 else "")


def _scored(score: Callable[[Sequence[str]], float], texts: Sequence[Sequence[str]]) -> Tensor:
    return torch.tensor([[float(score([text])) for text in line] for line in texts], dtype=torch.float64)
