"""Which neurons tell one kind of text from others: all of a model, by one pass over the texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookbook.asking import auroc, mean_states
from hookbook.errors import DataError, check_counts
from hookbook.recipe import ModelCard, recipe, wrap
from hookbook.recipes.neurons.ablation import held_at_once, neuron_sites
from hookbook.recipes.steering.contrast_vectors import encoded_class, held_apart
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.show.plots import bars
from hookbook.show.tidy import controls, tidy

SHUFFLES = 20
BEST = 50
"""Of how many neurons means are taken."""
TOLD = 0.95
"""From what on a neuron is said to tell texts apart."""


@dataclass(frozen=True, eq=False)
class NeuronSearch(Result):
    """How well each neuron of `l` layers tells positive texts from negative ones, and from other sets.

    All areas are of how often its mean activation in a positive text is above that in another: near 1 it goes up, near 0 it goes down, and
    0.5 says nothing."""

    card: ModelCard
    layers: tuple[int, ...]
    """`[l]`"""
    validation: Tensor
    """`[l, neuron]`: AUROC on the texts that choose."""
    auroc: Tensor
    """`[l, neuron]`: on those held out."""
    others: tuple[str, ...]
    """`[other]`: further sets that positive texts are to be told from."""
    other_validation: Tensor
    """`[other, l, neuron]`: AUROC against these, on texts that choose."""
    other_auroc: Tensor
    """`[other, l, neuron]`: on those held out."""
    positive_means: Tensor
    """`[l, neuron]`: mean activation over positive texts, held out or not."""
    negative_means: Tensor
    """`[l, neuron]`: over negative ones."""
    other_means: Tensor
    """`[other, l, neuron]`: over the others."""
    shuffled: Tensor
    """`[20, 2]`: with shuffled classes the best neuron on texts that choose, and what the 50 best have on those held out, in the mean;
    of max(AUROC, 1 - AUROC)."""
    settings: dict[str, Any]

    @property
    def score(self) -> Tensor:
        """`[l, neuron]` by which neurons are ranked: max(AUROC, 1 - AUROC) on texts that choose; if there are other sets, the least over
        these, in the direction that it has for the negative ones."""
        return _least(self.validation, self.other_validation, self.validation)

    @property
    def held_out(self) -> Tensor:
        """`[l, neuron]`: the same on texts held out, in the direction chosen before."""
        return _least(self.auroc, self.other_auroc, self.validation)

    @property
    def told(self) -> Tensor:
        """`[l, neuron]`: whether both are 0.95 or more."""
        return (self.score >= TOLD) & (self.held_out >= TOLD)

    def best(self, n: int = BEST) -> list[str]:
        """The names of the first `n`, such as `mlp_act.25.1120`."""
        check_counts(0, n=n)
        return [f"mlp_act.{self.layers[layer]}.{neuron}" for layer, neuron in self._order(n).tolist()]

    def best_held_out(self, n: int = BEST) -> float:
        """What the first `n` have on texts held out, in the mean; `shuffled` is its control."""
        return float(self.held_out[self._order(n).unbind(1)].mean())

    def to_frame(self, n: int = 1000) -> DataFrame:
        """One row for each of the first `n` neurons, the best first: `site`, `layer`, `unit`, `validation`, `auroc`, for each other set
        `control NAME` (AUROC on texts held out), `mean_activation`, `other_mean_activation` (over negative texts)."""
        order = self._order(n)
        at = order.unbind(1)
        sites = [("mlp_act", self.layers[layer], neuron) for layer, neuron in order.tolist()]
        return tidy(
            {"site layer unit": sites},
            validation=self.validation[at],
            auroc=self.auroc[at],
            **controls({name: values[at] for name, values in zip(self.others, self.other_auroc, strict=True)}),
            mean_activation=self.positive_means[at],
            other_mean_activation=self.negative_means[at],
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """How many neurons of each layer tell the texts apart, on both halves."""
        what = f"neurons with {TOLD} or more on both halves, of {self.card.d_mlp:,}"
        title = f"Neurons that tell texts apart, {self.card.model_id}"
        return bars(ax, [str(layer) for layer in self.layers], self.told.sum(1).double(), what, title=title)

    def view(self) -> View:
        """The table of the first 50."""
        return View.table(self.to_frame(50), "The best")

    def _order(self, n: int) -> Tensor:
        """`[n, 2]`: layer and neuron, as places, the best first."""
        best = self.score.flatten().argsort(descending=True, stable=True)[:n]
        return torch.stack(torch.unravel_index(best, self.score.shape), 1)


@recipe
def find_neurons(
    model: Any,
    positive: Sequence[Any],
    negative: Sequence[Any],
    *,
    others: Mapping[str, Sequence[Any]] | None = None,
    layers: Any = "all",
    held_out: float = 0.5,
    seed: int = 0,
    progress: bool | None = None,
) -> NeuronSearch:
    """Rank every neuron by how well its mean activation tells two sets of texts apart.

    A concept must be told from its neighbours, not from anything else alone: a neuron that tells French from English perfectly may be one
    for any foreign language, which `others` shows.

    Args:
        model: Any model `hookbook.wrap` takes.
        positive: Texts with the concept.
        negative: Texts without it. Texts at the same place of equally long lists are kept or held out together.
        others: Further sets by name that positive texts must be told from, too, such as other languages.
        layers: `"all"`, or some.
        held_out: The share of every set on which what was chosen is judged.
        seed: Of what is held out, and of the shuffled classes.
        progress: Show a progress bar; None: for long work only.

    Returns:
        A `NeuronSearch`. Of a text the mean is taken over all tokens but the beginning-of-sequence token.

    Raises:
        DataError: A set is empty or too small, or two share a text.
        SiteError: A site that is not a whole `mlp_act`, or not in the model.

    Source: neurons as detectors by the area under the ROC curve as in Suau et al. 2020, arXiv:2005.07647, section 3, which takes average
        precision and the maximum over tokens.

    Differs: the mean over tokens; both directions count, as about half of the best neurons go down; equal activations count half, without
        which many that are always 0 would be perfect; a held-out half; further sets; shuffled classes.

    Example:
        french, english = hb.tasks.contrast("language_french")
        found = hb.find_neurons(model, french, english)
        found.best(10), found.best_held_out(), found.shuffled.mean(0)
    """
    adapter = wrap(model)
    sites = neuron_sites(layers, adapter.card)
    if not 0 < held_out < 1:
        raise DataError(
            f"held_out={held_out}", "with tens of thousands of neurons some tell any texts apart", "hold out a share, such as 0.5"
        )
    more = dict(others or {})
    if not {"positive", "negative"}.isdisjoint(more):
        raise DataError("others called 'positive' or 'negative'", "these are the two sets", "give them other names")
    named = {"positive": positive, "negative": negative} | more
    sets = [encoded_class(adapter, texts, name, None, False) for name, texts in named.items()]
    few = [(name, len(some)) for name, some in zip(named, sets, strict=True) if len(some) < 4]
    if few:
        raise DataError(f"{few[0][1]} texts in the set {few[0][0]!r}", "some choose, and others judge", "give 4 or more")
    halves = [held_apart([sets[0], other], held_out, seed) for other in sets[1:]]
    starts = torch.tensor([0, *map(len, sets)]).cumsum(0).tolist()
    parts: list[list[Tensor]] = []  # of each set the texts that choose, and those held out
    for i in range(len(sets)):
        both = halves[max(0, i - 1)]
        own, shift = (0, 0) if i == 0 else (1, starts[i] - len(sets[0]))
        parts.append([torch.tensor(half[own]) + shift for half in both])

    texts = [tokens for some in sets for tokens in some]
    states = [  # [site, text, neuron]
        mean_states(adapter, texts[start:end], sites, [slice(None)], progress=progress)[0]
        for start, end in held_at_once(adapter, sites, list(map(len, texts)))
    ]
    flat = torch.cat(states, 1).transpose(0, 1).flatten(1)  # [text, layer x neuron]
    shape = (len(sites), adapter.card.d_mlp)

    def told(first: Tensor, second: Tensor) -> Tensor:
        return auroc(flat[first], flat[second])

    measured = [[told(parts[0][half], part[half]).unflatten(0, shape) for part in parts[1:]] for half in (0, 1)]
    draw, shuffled = torch.Generator().manual_seed(seed), []
    for _ in range(SHUFFLES):
        values = []
        for half in (0, 1):
            members = torch.cat([parts[0][half], parts[1][half]])
            members = members[torch.randperm(len(members), generator=draw)]
            values.append(told(*members.split([len(parts[0][half]), len(parts[1][half])])))
        chosen = torch.maximum(values[0], 1 - values[0])
        best = chosen.topk(min(BEST, len(chosen)))
        judged = torch.where(values[0] >= 0.5, values[1], 1 - values[1])
        shuffled.append(torch.stack([best.values[0], judged[best.indices].mean()]))
    means = [flat[torch.cat(part)].mean(0).unflatten(0, shape) for part in parts]
    empty = torch.zeros(0, *shape, dtype=torch.float64)
    return NeuronSearch(
        card=adapter.card,
        layers=tuple(int(site.layer) for site in sites if site.layer is not None),
        validation=measured[0][0],
        auroc=measured[1][0],
        others=tuple(more),
        other_validation=torch.stack(measured[0][1:]) if more else empty,
        other_auroc=torch.stack(measured[1][1:]) if more else empty,
        positive_means=means[0],
        negative_means=means[1],
        other_means=torch.stack(means[2:]) if more else empty,
        shuffled=torch.stack(shuffled),
        settings={"texts": [len(half) for part in parts for half in part]},
    )


def _least(first: Tensor, others: Tensor, chosen: Tensor) -> Tensor:
    """The least area over sets, in the direction that `chosen` says."""
    every = torch.cat([first[None], others])
    return torch.where(chosen >= 0.5, every, 1 - every).amin(0)
