"""How many neurons do one job: the most effective ones taken out together, more and more of them, beside as many random ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hookbook.asking import above, answers_asked, encode_prompts
from hookbook.errors import DataError, Refused, check_counts, check_prompt
from hookbook.recipe import ModelCard, later, recipe, wrap
from hookbook.recipes.neurons.ablation import Ablation, ablated, neuron_sites, set_to
from hookbook.recipes.neurons.attribution import neuron_attribution
from hookbook.recipes.neurons.sweep import neuron_sweep
from hookbook.request import Edit, Readout, Request, Row
from hookbook.results import Axes, DataFrame, Result
from hookbook.show.plots import lines
from hookbook.show.text import ending
from hookbook.show.tidy import Over, spelled, tidy
from hookbook.sites import Site
from hookbook.tokens import Position, Tokens, resolve, vocabulary

KS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
Order = Literal["effect", "attribution"]


@dataclass(frozen=True, eq=False)
class CumulativeAblation(Result):
    """What is left of an answer after `n` prompts when the `k` neurons that are most for it are taken out together, for each of `size`
    numbers, and when as many random ones are, in each of `draw` draws."""

    card: ModelCard
    prompts: tuple[Tokens, ...]
    """`[n]`"""
    answers: tuple[str, ...]
    """`[n]`"""
    others: tuple[str, ...]
    """`[n]`: the answers to compare with; empty without."""
    by: str
    """What ranks neurons: the `effect` of taking out each alone, or its `attribution`."""
    neurons: Tensor
    """`[n, most, 2]`: layer and neuron, those first that are most for the answer."""
    effects: Tensor
    """`[n, most]`: by how much the answer's logit, less the other's, falls without each alone; or by its attribution."""
    ks: Tensor
    """`[size]`: how many are taken out."""
    plain_ids: Tensor
    """`[n]`: the likeliest next token of the plain run."""
    plain_logprobs: Tensor
    """`[n]`: of the answer."""
    logprobs: Tensor
    """`[n, size]`: of the answer without them."""
    token_ids: Tensor
    """`[n, size]`: the likeliest next token without them."""
    random_logprobs: Tensor
    """`[n, draw, size]`: of the answer without random ones."""
    random_ids: Tensor
    """`[n, draw, size]`"""
    vocab: dict[int, str]
    """The text of every token id in this result."""
    settings: dict[str, Any]

    @property
    def flips(self) -> Tensor:
        """`[n]`: the least of these numbers without which the likeliest token is another than in the plain run; 0: none of them."""
        return _first(self.token_ids != self.plain_ids[:, None], self.ks)

    @property
    def random_flips(self) -> Tensor:
        """`[n, draw]`: the same of random ones."""
        return _first(self.random_ids != self.plain_ids[:, None, None], self.ks)

    def to_frame(self) -> DataFrame:
        """One row for each prompt, kind (`control`: `effective`, or `random 0` and so on) and number: `prompt`, `control`, `k`, `answer`,
        `logprob` (of the answer), `plain_token`, `token`."""
        draws = self.random_ids.shape[1]
        ids = torch.cat([self.token_ids[:, None], self.random_ids], 1)
        return tidy(
            {"prompt": self.prompts, "control": ["effective", *(f"random {i}" for i in range(draws))], "k": self.ks.tolist()},
            answer=Over("prompt", list(self.answers)),
            logprob=torch.cat([self.logprobs[:, None], self.random_logprobs], 1),
            plain_token=Over("prompt", spelled(self.plain_ids, self.vocab)),
            token=spelled(ids, self.vocab),
        )

    def top(self, n: int = 20, *, prompt: int = 0) -> DataFrame:
        """The first `n` neurons of a prompt: `site`, `layer`, `unit`, `effect`."""
        check_counts(0, n=n)
        prompt = check_prompt(prompt, len(self.prompts))
        sites = [("mlp_act", *at) for at in self.neurons[prompt, :n].tolist()]
        return tidy({"site layer unit": sites}, effect=self.effects[prompt, :n])

    def plot(self, ax: Axes | None = None, *, prompt: int = 0) -> Axes:
        """The answer's log-probability after a prompt, by how many are taken out."""
        prompt = check_prompt(prompt, len(self.prompts))
        curves, bands = {"most effective": self.logprobs[prompt]}, {}
        if self.random_logprobs.shape[1]:
            drawn = self.random_logprobs[prompt]
            curves["random"], bands["random"] = drawn.mean(0), (drawn.amin(0), drawn.amax(0))
        names = "neurons taken out together", f"log p({self.answers[prompt]!r}), nats"
        flips = int(self.flips[prompt])
        words = f"; the likeliest token changes at {flips:,}" if flips else "; the likeliest token stays"
        title = f"{ending(self.prompts[prompt].text, 60)!r}, {self.card.model_id}{words}"
        labels = [f"{k:,}" for k in self.ks.tolist()]
        return lines(ax, curves, names, title=title, labels=labels, levels={"plain": float(self.plain_logprobs[prompt])}, bands=bands)


@recipe
def cumulative_ablation(
    model: Any,
    prompts: Any,
    answer: str | int | Sequence[str | int],
    other: str | int | Sequence[str | int] | None = None,
    *,
    ks: Sequence[int] | None = None,
    by: Order = "effect",
    layers: Any = "all",
    position: Position = -1,
    ablate: Ablation = "zero",
    reference: Any = None,
    random: int = 3,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> CumulativeAblation:
    """Take out the neurons that are most for an answer, one, two, hundreds together: how many it takes until the model says something else.

    Args:
        model: Any model `hookbook.wrap` takes.
        prompts: A prompt, or a list of prompts.
        answer: The next token, as a text that follows the prompt (usually with a leading space) or an id; or one for each prompt.
        other: Another one; then neurons are for the answer that raise its logit above the other's.
        ks: How many are taken out together; None: 1, 2, 5, 10 and so on to 1,000, as far as there are neurons.
        by: What ranks them: `"effect"`, of taking out each alone (see `hookbook.neuron_sweep`), or `"attribution"`, by one gradient.
        layers: `"all"`, or some.
        position: The token or tokens at which they are taken out.
        ablate, reference: What they are set to, see `hookbook.neuron_sweep`.
        random: How many draws of random neurons stand beside.
        seed: Of these.
        progress, checkpoint: See `hookbook.patchscope`; kept are the effects of single neurons, the long part.

    Returns:
        A `CumulativeAblation`.

    Raises:
        DataError: Numbers that are not whole, ascending and at most that of all neurons; an unknown order; see `hookbook.neuron_sweep`.
        TokenError: An answer is not one token; a position cannot be used.
        Refused: A remote model, of which the order is not known before its job is done.

    Source: that a job is done by more than one part, so that without some the others do it, is in McGrath et al. 2023, arXiv:2307.15771,
        section 3, of whole layers.

    Differs: single neurons, ranked by what each does alone.

    Example:
        found = hb.cumulative_ablation(model, "I like this apple more than", " these", " those")
        found.flips, found.random_flips
    """
    adapter = wrap(model)
    if adapter.remote:
        why = "their order is known when a job is done"
        raise Refused("neurons of a remote model taken out in their order", why, "send hb.neuron_sweep, and take out what it names")
    coded = encode_prompts(adapter, prompts)
    sites = neuron_sites(layers, adapter.card)
    width, total = adapter.card.d_mlp, len(sites) * adapter.card.d_mlp
    ks = [k for k in KS if k <= total] if ks is None else [ks] if isinstance(ks, int) else list(ks)
    for k in ks:
        check_counts(ks=k)
    check_counts(0, random=random)
    if not ks or ks != sorted({*ks}) or ks[-1] > total:
        raise DataError(f"ks={ks}", f"they are ascending numbers of some of {total:,} neurons", "give such numbers, or None")
    if by not in get_args(Order):
        raise DataError(f"by={by!r}", "", f"use {', '.join(get_args(Order))}")
    wanted, said = answers_asked(adapter, coded, answer, other)
    for site in sites:
        adapter.require(site)
    values = ablated(adapter, sites, ablate, reference, seed, progress)

    n, most = len(coded), ks[-1]
    if by == "effect":
        strengths: list[Any] = [None] * n
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, ids in enumerate(wanted.tolist()):
            groups.setdefault(tuple(ids), []).append(i)
        for at, (ids, some) in enumerate(groups.items()):  # prompts of one answer together
            folder = None if checkpoint is None else os.path.join(checkpoint, str(at))
            ask: Any = {"layers": sites, "position": position, "ablate": ablate, "reference": reference, "seed": seed}
            swept = neuron_sweep(adapter, [coded[i] for i in some], list(ids), **ask, progress=progress, checkpoint=folder)
            for i, changes in zip(some, swept.changes.unbind(0), strict=True):
                strengths[i] = -above(changes)
        strength = torch.stack(strengths)
    else:
        other_ids = None if other is None else wanted[:, 1].tolist()
        found = neuron_attribution(
            adapter, coded, wanted[:, 0].tolist(), other_ids, layers=sites, position=position, exact=False, progress=progress
        )
        sizes = [len({*resolve(position, prompt)}) for prompt in coded]
        strength = torch.stack([some.sum(0).flatten() for some in found.attributions.split(sizes)])
    ordered = later(_order, strength, most)
    order = ordered if isinstance(ordered, Tensor) else torch.arange(most).expand(n, most)  # these in a plan
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randperm(total, generator=generator)[:most] for _ in range(random)]

    rows = []
    for i in range(n):
        for some in (order[i], *draws):
            at = [divmod(neuron, width) for neuron in some.tolist()]
            edits = [
                Edit(Site("mlp_act", sites[place].layer, unit), value, "set", position)
                for (place, unit), value in zip(at, set_to(values, at), strict=True)
            ]
            rows += [Row(i, tuple(edits[:k])) for k in ks]
    each, every = (1 + random) * len(ks), [Row(i) for i in range(n)]
    asked = Readout(k=1, tokens=torch.cat([wanted[:, :1], wanted[:, :1].repeat_interleave(each, 0)]))
    reply = adapter.run(Request(coded, every + rows, (), asked), progress=progress).said
    tops = reply.topk_ids[n:, 0].unflatten(0, (n, 1 + random, len(ks)))
    logprobs = reply.token_logprobs[n:, 0].unflatten(0, (n, 1 + random, len(ks)))
    return CumulativeAblation(
        card=adapter.card,
        prompts=tuple(coded),
        answers=said[0],
        others=said[1] if len(said) > 1 else (),
        by=by,
        neurons=torch.stack([torch.tensor([site.layer for site in sites])[order // width], order % width], -1),
        effects=later(_gathered, strength, ordered),
        ks=torch.tensor(ks),
        plain_ids=reply.topk_ids[:n, 0],
        plain_logprobs=reply.token_logprobs[:n, 0],
        logprobs=logprobs[:, 0],
        token_ids=tops[:, 0],
        random_logprobs=logprobs[:, 1:],
        random_ids=tops[:, 1:],
        vocab=later(vocabulary, adapter, reply.topk_ids),
        settings={},
    )


def _order(strength: Tensor, most: int) -> Tensor:
    """`[n, most]`: the neurons of largest numbers `[n, neuron]`, the largest first."""
    return strength.argsort(dim=1, descending=True, stable=True)[:, :most]


def _gathered(strength: Tensor, order: Tensor) -> Tensor:
    return strength.gather(1, order)


def _first(changed: Tensor, ks: Tensor) -> Tensor:
    """The first of numbers `[size]` where something holds, `[..., size]`; 0 where it nowhere does."""
    return ks[changed.int().argmax(-1)] * changed.any(-1)
