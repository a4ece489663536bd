"""One direction that decides: ablating it from everything the model writes, and choosing it among candidates by what that does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookbook.asking import encode_prompts, wanted_ids
from hookbook.errors import DataError, EditError, SiteError
from hookbook.recipe import ModelCard, later, recipe, wrap
from hookbook.recipes.steering.contrast_vectors import ContrastVectors
from hookbook.request import Edit, Readout, Request, Row
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.show.plots import heat_map
from hookbook.show.tidy import tidy
from hookbook.sites import Site
from hookbook.vectors import Vector

EPS = 1e-8
TOP = 0.8
"""Candidates are in layers below this share of the model, rounded down."""


def directional_ablation(vector: Vector) -> list[Edit]:
    """Edits that take a direction out of all that a model writes: from the stream entering every block, and from what every attention and
    MLP adds.

    At all tokens, read and generated, whatever layer the vector is of; for `hookbook.generate` and requests. All share one value.

    Source: Arditi et al. 2024, arXiv:2406.11717, as the authors' code has it. `hookbook.orthogonalize` writes the same into the weights.

    Differs: from the paper's text, which has the stream in the middle of a block for the outputs of attention and MLP.
    """
    return _ablation(vector.values, vector.card, vector.site)


def _ablation(values: Tensor, card: ModelCard, site: Site) -> list[Edit]:
    if site.name not in ("resid_pre", "attn_out", "mlp_out", "resid_post"):
        raise EditError(
            f"ablation of a vector at {site}",
            "it is no direction of the stream",
            "use a vector of resid_pre, resid_post, attn_out or mlp_out",
        )
    sites = [Site(name, layer) for layer in range(card.n_layers) for name in ("resid_pre", "attn_out", "mlp_out")]
    return [Edit(place, values, "project_out", slice(None), scope="all") for place in sites]


@dataclass(frozen=True, eq=False)
class DirectionChoice(Result):
    """Candidate directions, what ablating and adding each does, and the one chosen."""

    card: ModelCard
    sites: tuple[Site, ...]
    positions: tuple[str, ...]
    values: Tensor
    """`[position, site, width]`"""
    ablation: Tensor
    """`[position, site]`: mean log-odds of the tokens on positive prompts when the candidate is ablated; NaN if it was not tried."""
    addition: Tensor
    """`[position, site]`: mean log-odds on negative prompts when it is added."""
    kl: Tensor
    """`[position, site]`: mean divergence in nats of the next token on negative prompts, from the clean run to the ablated one."""
    discarded: tuple[tuple[str, ...], ...]
    """`[position][site]`: why a candidate is out; empty if it is not."""
    base: tuple[Tensor, Tensor]
    """Log-odds of every positive and of every negative prompt without edits."""
    why: str
    """Why nothing was chosen; empty if a direction was."""
    template: str
    settings: dict[str, Any]

    @property
    def best(self) -> Vector | None:
        """The candidate that leaves the lowest log-odds on positive prompts when ablated, of those not discarded; None if all are."""
        left = [(float(self.ablation[p, s]), p, s) for p, line in enumerate(self.discarded) for s, why in enumerate(line) if not why]
        if not left or self.why:
            return None
        _, p, s = min(left)
        return Vector(
            self.card, self.sites[s], self.values[p, s], self.positions[p], self.template, "select_direction", dict(self.settings)
        )

    def to_frame(self) -> DataFrame:
        """One row for each candidate: `place` (the position as it was given), `site`, `layer`, `ablation`, `addition`, `kl`, `discarded`
        (why, or nothing)."""
        numbers = {"ablation": self.ablation, "addition": self.addition, "kl": self.kl}
        return tidy({"place": self.positions, "site": self.sites}, **numbers, discarded=self.discarded)

    def plot(self, ax: Axes | None = None) -> Axes:
        """A heat map of the log-odds on positive prompts under ablation; crosses are discarded."""
        words = [["x" if why else "" for why in line] for line in self.discarded]
        names = ("position", "layer", "log-odds under ablation")
        return heat_map(
            ax,
            self.ablation,
            words,
            self.positions,
            [str(site.layer) for site in self.sites],
            names,
            signed=True,
            title=f"Refusal without each direction, {self.card.model_id}; x: discarded",
        )

    def view(self) -> View:
        """The table of `to_frame()`."""
        return View.table(self.to_frame(), self.why or "Directions, and how they were chosen")


@recipe
def select_direction(
    model: Any,
    candidates: ContrastVectors,
    positive: Any,
    negative: Any,
    *,
    tokens: Sequence[str | int],
    max_kl: float = 0.1,
    filter: bool = True,
    bos: bool | None = None,
    chat: bool = True,
    progress: bool | None = None,
) -> DirectionChoice:
    """Choose the direction whose ablation takes an answer away where it is given, and whose addition brings it where it is not.

    Args:
        model: Any model `hookbook.wrap` takes.
        candidates: Of `hookbook.contrast_vector(..., site="resid_pre", position=hookbook.tokens.after_instruction(tokenizer))`.
        positive: Validation prompts that get the answer, such as a refusal; none of those that made the candidates.
        negative: Validation prompts that do not.
        tokens: First tokens of the answer, as they follow a prompt (texts or ids), such as `["I"]`. The measure is `log p - log(1 - p)` of
            all of them as the next token, in float64 with 1e-8 in both logarithms.
        max_kl: Candidates whose ablation changes the next token of negative prompts more than this are discarded, in nats.
        filter: Leave out positive prompts of log-odds below 0 and negative ones above, as the paper does.
        bos, chat: See `hookbook.tokens.encode`.
        progress: Show a progress bar; None: for long work only.

    Returns:
        A `DirectionChoice`. That nothing is chosen is an outcome, too: `best` is None, and `why` says so.

    Raises:
        DataError: The candidates are not of the stream entering blocks, or tokens or prompts that cannot be used.

    Source: Arditi et al. 2024, arXiv:2406.11717, as the authors' code has it: discarded are layers from `int(0.8 * n_layers)` on, a
    divergence above `max_kl`, and candidates whose addition (at their own layer, all tokens) leaves mean log-odds below 0; of the rest the
    lowest mean log-odds under ablation.

    Differs: `tokens` are yours to name, and no prompts ship with the authors' numbers; `filter=False` keeps prompts that the paper leaves
    out. The divergence is exact, where theirs has 1e-6 in both logarithms: theirs is 0.1 to 2 % lower on SmolLM2 and 5 to 13 % lower where
    the next token is open, so that a candidate near `max_kl` may be out here and in there. A candidate that is zero or rounding noise is
    discarded, as in the first layer at a template's tokens, where every prompt has the same state; theirs divides by its length + 1e-8, and
    zero does nothing.

    Example:
        >>> from hookbook.recipes.steering.contrast_vectors import contrast_vector
        >>> from hookbook.testing import toy
        >>> candidates = contrast_vector(toy(), ["ab", "ac"], ["xf", "xg"], site="resid_pre", held_out=0)
        >>> found = select_direction(toy(), candidates, ["axe", "oak"], ["ship", "to"], tokens=["e"], filter=False, chat=False)
        >>> found.ablation.shape
        torch.Size([1, 3])
    """
    adapter = wrap(model)
    if not isinstance(candidates, ContrastVectors) or any(site.name != "resid_pre" for site in candidates.sites):
        raise DataError(
            "candidates that are not of resid_pre", "they are added where blocks begin", 'use hb.contrast_vector(..., site="resid_pre")'
        )
    if not candidates.card.same_model(adapter.card) or candidates.card.d_model != adapter.card.d_model:
        raise SiteError(
            f"candidates of {candidates.card.model_id} in {adapter.card.model_id}", "they are different spaces", "make them with this model"
        )
    sides = [encode_prompts(adapter, prompts, bos, chat) for prompts in (positive, negative)]
    if {t.ids for t in sides[0]} & {t.ids for t in sides[1]}:
        raise DataError("a prompt that is positive and negative", "it gets the answer or does not", "leave it out of one")
    if isinstance(tokens, (str, int)) or not len(tokens):
        raise DataError(f"tokens={tokens!r}", "tokens is a list of texts or ids", 'write tokens=["I"]')
    prompts = sides[0] + sides[1]
    asked = wanted_ids(adapter, prompts, tokens)
    n, layers, last = len(sides[0]), [site.layer or 0 for site in candidates.sites], int(TOP * adapter.card.n_layers)
    runs = [(p, s) for p in range(len(candidates.positions)) for s, layer in enumerate(layers) if layer < last]
    if not runs:
        raise DataError("candidates in the last layers only", f"those from layer {last} on are discarded", "give earlier layers")
    noise = _noise(candidates)
    values = torch.where(noise[..., None], 1.0, candidates.values)  # which these are, is not known of promises: they run, and do not count

    def run(rows: list[Row], logits: bool) -> Any:
        reply = adapter.run(
            Request(prompts, rows, (), Readout(tokens=asked[[row.prompt for row in rows]], logits=logits)), progress=progress
        )
        return _log_odds(reply.said.token_logprobs), reply.said.logits

    odds, logits = run([Row(i) for i in range(len(prompts))], True)
    clean = logits[n:].double().log_softmax(-1)
    kept = (odds[:n] > 0, odds[n:] < 0) if filter else (torch.ones(n, dtype=torch.bool), torch.ones(len(prompts) - n, dtype=torch.bool))
    ablated, divergence = [], []
    for p, s in runs:  # one at a time: all of a candidate's logits are compared
        edits = tuple(_ablation(values[p, s], adapter.card, candidates.sites[s]))
        after, logits = run([Row(i, edits) for i in range(len(prompts))], True)
        ablated.append(_mean(after[:n], kept[0]))
        changed = logits[n:].double().log_softmax(-1)
        divergence.append(_mean((clean.exp() * (clean - changed)).sum(-1), kept[1]))
    adds = [(Edit(candidates.sites[s], values[p, s], "add", slice(None), scope="all"),) for p, s in runs]
    added, _ = run([Row(i, edits) for edits in adds for i in range(n, len(prompts))], False)
    added = torch.stack([_mean(line, kept[1]) for line in added.unflatten(0, (len(runs), -1))])
    numbers = torch.stack([torch.stack(ablated), added, torch.stack(divergence)])
    places = torch.tensor([p * len(candidates.sites) + s for p, s in runs])
    shape = candidates.values.shape[:2]
    every = torch.full((3, shape[0] * shape[1]), float("nan"), dtype=torch.float64).index_copy(1, places, numbers).unflatten(1, shape)
    every = torch.where(noise, float("nan"), every)
    counts = torch.stack([some.sum() for some in kept])
    return DirectionChoice(
        card=adapter.card,
        sites=candidates.sites,
        positions=candidates.positions,
        values=candidates.values,
        ablation=every[0],
        addition=every[1],
        kl=every[2],
        discarded=later(_discarded, every, noise, layers, last, max_kl),
        base=(odds[:n], odds[n:]),
        why=later(_why, every, noise, counts, layers, last, max_kl),
        template=candidates.template,
        settings={"tokens": [str(word) for word in tokens], "prompts": [n, len(prompts) - n], "kept": counts},
    )


def _noise(candidates: ContrastVectors) -> Tensor:
    """Which candidates are no longer than what rounding of the states leaves of a difference of means, `[position, site]`."""
    eps = max(torch.finfo(dtype).eps for dtype in (getattr(torch, candidates.card.dtype), torch.float32))
    spread = sum(1 / n for n in candidates.settings["texts"][:2]) ** 0.5
    return candidates.values.norm(dim=-1) <= eps / 2 * spread * candidates.norms.amax(0)


def _log_odds(logprobs: Tensor) -> Tensor:
    """`log p - log(1 - p)` of tokens together, `[n]`, given `[n, token]`."""
    p = logprobs.double().exp().sum(-1)
    return (p + EPS).log() - (1 - p + EPS).log()


def _mean(x: Tensor, kept: Tensor) -> Tensor:
    """The mean of those kept; NaN if none are."""
    return torch.where(kept, x, 0.0).sum() / kept.sum()


def _discarded(every: Tensor, noise: Tensor, layers: Sequence[int], last: int, max_kl: float) -> tuple[tuple[str, ...], ...]:
    def reason(layer: int, ablation: float, addition: float, kl: float, noisy: float) -> str:
        if layer >= last:
            return f"layer {layer} is not below {last}, {TOP:g} of the model"
        if noisy:
            return "zero or rounding noise: all prompts have the same state here"
        if not all(x == x for x in (ablation, addition, kl)):
            return "not a number"
        if kl > max_kl:
            return f"ablation changes negative prompts: KL {kl:.3f} > {max_kl:g}"
        return f"addition does not bring the answer: {addition:.2f} < 0" if addition < 0 else ""

    numbers = torch.cat([every, noise[None].to(every.dtype)]).permute(1, 2, 0).tolist()
    return tuple(tuple(reason(layer, *some) for layer, some in zip(layers, line, strict=True)) for line in numbers)


def _why(every: Tensor, noise: Tensor, counts: Tensor, layers: Sequence[int], last: int, max_kl: float) -> str:
    for n, side, sign in zip(counts.tolist(), ("positive", "negative"), ("above", "below"), strict=True):
        if not n:
            return f"no {side} prompt has log-odds {sign} 0: without edits the model does not do what the direction is to be of"
    if all(why for line in _discarded(every, noise, layers, last, max_kl) for why in line):
        return "every candidate is discarded"
    return ""
