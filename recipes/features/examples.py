"""What a sparse autoencoder's features are active on: the tokens of many texts on which each is most active, and how often and how
strongly it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hookbook.errors import DataError, check_counts, check_feature
from hookbook.recipe import ModelCard, recipe
from hookbook.recipes.features.decomposition import about
from hookbook.recipes.features.reading import Stream, active, batches, place, readable
from hookbook.request import Each, Read, Request, Row
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.sae import AttachedSAE, checked
from hookbook.show.html import context_line
from hookbook.show.plots import COLOURS, drawing
from hookbook.show.tidy import tidy
from hookbook.sites import Site
from hookbook.tokens import Tokens, vocabulary

BINS = 16
"""Of the histogram of activations, for each doubling: what is read off it is wrong by a factor of at most `2 ** (1 / 32)`, 2.2 %."""
ZERO = 1 << 15
"""The bin that begins at 1; those of all floating-point numbers are above 0 and below twice this."""


@dataclass(frozen=True, eq=False)
class FeatureExamples(Result):
    """Examples of features, `m` in all: of each feature those with the largest activations, at most one of each text. Active means above
    0."""

    card: ModelCard
    sae: str
    """What the SAE is called, with a fingerprint of its weights."""
    site: Site
    n_features: int
    n_texts: int
    n_tokens: int
    """How many tokens were read."""
    features: Tensor
    """`[m]`, ascending; one that is never active has no examples."""
    activations: Tensor
    """`[m]`, of each feature the largest first; among equal ones the earliest text."""
    texts: Tensor
    """`[m]` which text, counted from 0."""
    positions: Tensor
    """`[m]` which token of it."""
    contexts: Tensor
    """`[m, 2 * context + 1]` token ids around it, which is in the middle; -1 is none."""
    context_activations: Tensor
    """`[m, 2 * context + 1]` the feature's activations there; 0 where nothing was read."""
    vocab: dict[int, str]
    """The text of every token id in the contexts."""
    maxima: Tensor
    """`[n_features]` the largest activation on all texts; 0 of a feature that is never active."""
    density: Tensor
    """`[n_features]` on which share of the tokens read it is active."""
    quantiles: Tensor
    """`[level, n_features]` of the activations where it is active; NaN of a feature that is never active."""
    levels: tuple[float, ...]
    """Which quantiles."""
    histogram: Tensor
    """`[b, 3]` feature, bin and count, of all activations: bin `i` is from `2 ** (i / 16)` to below `2 ** ((i + 1) / 16)`."""
    labels: dict[int, str]
    page: str
    """Where the SAE is on Neuronpedia."""
    settings: dict[str, Any]

    def text(self, at: int) -> str:
        """The context of an example, with its token «marked»."""
        middle = self.contexts.shape[1] // 2
        words = [self.vocab[i] if i >= 0 else "" for i in self.contexts[at].tolist()]
        return "".join((*words[:middle], f"«{words[middle]}»", *words[middle + 1 :]))

    def _of(self, feature: int) -> list[int]:
        """Which examples are a feature's."""
        return (self.features == check_feature(feature, self.n_features)).nonzero()[:, 0].tolist()

    def to_frame(self, features: Sequence[int] | None = None) -> DataFrame:
        """One row for each example, of some features or of all.

        Columns: `feature`, `example` (0 has the largest activation), `activation`, `context` (with the token marked), `text_index` (which
        text), `position`, `density`, `label`, `link`.
        """
        chosen = range(len(self.features)) if features is None else [at for feature in features for at in self._of(feature)]
        at = torch.tensor(list(chosen), dtype=torch.long)
        mine = self.features[at]
        return tidy(
            {"feature": mine.tolist()},
            example=place(self.features)[at],
            activation=self.activations[at],
            context=[self.text(i) for i in chosen],
            text_index=self.texts[at],
            position=self.positions[at],
            density=self.density[mine],
            **about(mine, self.labels, self.page),
        )

    def plot(self, ax: Axes | None = None, *, feature: int | None = None) -> Axes:
        """The histogram of a feature's activations; or of every feature that is active, the density and the largest activation."""
        if feature is None:
            fired = self.density > 0
            with drawing(ax, (6, 3.5), f"{int(fired.sum())} of {self.n_features} features active, {self.card.model_id}") as ax:
                ax.scatter(self.density[fired].tolist(), self.maxima[fired].tolist(), s=8, alpha=0.5, color=COLOURS[0], linewidths=0)
                ax.set(xscale="log", yscale="log", xlabel="share of tokens where the feature is active", ylabel="largest activation")
            return ax
        self._of(feature)
        _, bins, counts = self.histogram[self.histogram[:, 0] == feature].unbind(1)
        left = torch.exp2(bins.double() / BINS)
        name = f"{feature} {self.labels.get(feature, '')}".strip()
        with drawing(ax, (6, 3.5), f"Feature {name}: active on {float(self.density[feature]):.3%} of {self.n_tokens} tokens") as ax:
            ax.bar(left.tolist(), counts.tolist(), (left * (2 ** (1 / BINS) - 1)).tolist(), align="edge", color=COLOURS[0])
            ax.set(xscale="log", xlabel=f"activation of feature {feature}", ylabel="tokens")
        return ax

    def view(self, feature: int | None = None) -> View:
        """The examples of a feature, or the best one of each of the first hundred, their tokens coloured; a token's activation shows
        under the pointer."""
        chosen = (place(self.features) == 0).nonzero()[:100, 0].tolist() if feature is None else self._of(feature)
        return View("".join(self._shown(at) for at in chosen) or "<p>no examples</p>")

    def _shown(self, at: int) -> str:
        feature = int(self.features[at])
        title = f"{feature} {self.labels.get(feature, '')}".strip()
        words = [self.vocab.get(token, "") for token in self.contexts[at].tolist()]
        return context_line(
            f"{title}, {float(self.activations[at]):.4g}", words, self.context_activations[at].tolist(), float(self.maxima[feature])
        )


@recipe
def feature_examples(
    sae: AttachedSAE,
    texts: Any,
    *,
    features: int | Sequence[int] | None = None,
    k: int = 10,
    context: int = 10,
    quantiles: Sequence[float] = (0.5, 0.9, 0.99),
    batch: int = 32,
    progress: bool | None = None,
) -> FeatureExamples:
    """The texts' tokens on which each feature is most active, in one pass over the texts.

    Memory does not grow with the texts: a batch at a time is run and encoded, and of each feature only its examples and its histogram are
        kept.

    Args:
        sae: What `hb.sae.attach` gives.
        texts: A list of prompts, or anything that gives one after the other, which is read once. Of a remote model all are sent as one
            job, and the states at the site come back.
        features: Of which examples are kept; None: of all. What is counted is counted of all.
        k: Examples of a feature.
        context: How many tokens before and after are kept beside each.
        quantiles: Of the activations where a feature is active.
        batch: How many texts are run at once.
        progress: Show a progress bar; None: for long work only.

    Returns:
        `FeatureExamples`. Special tokens are not read. Quantiles are read off a histogram of 16 bins to the doubling, so that they are
        within 2.2 % of the smallest activation which at least this share does not exceed; everything else is exact.

    Raises:
        ModelError: No attached SAE.
        EditError: No such feature.
        DataError: A number that makes no sense.
        TokenError: No texts, or one that cannot be read.
        Refused: The model cannot read the site.

    Source: Bricken et al. 2023, "Towards Monosemanticity", whose examples of features are those with the largest activations.

    Differs: a text gives a feature one example, its best.

    Example:
        found = hb.feature_examples(sae, texts, k=5)
        found.to_frame([4711])
    """
    adapter = checked(sae).model
    chosen = (
        None if features is None else torch.zeros(sae.n_features, dtype=torch.bool).index_fill(0, torch.tensor(sae.chosen(features)), True)
    )
    levels = tuple(float(level) for level in quantiles)
    check_counts(k=k)
    check_counts(0, context=context)
    if not all(0 <= level <= 1 for level in levels):
        raise DataError(f"quantiles={list(levels)}", "a quantile is a share", "use numbers from 0 to 1")
    found, n = Stream(_Best(sae, chosen, k, context, levels)), 0
    for prompts in batches(sae, texts, batch, progress):
        read = Each(tuple(readable(sae, prompt) for prompt in prompts))
        reply = adapter.run(Request(prompts, [Row(i) for i in range(len(prompts))], [Read(sae.site, read)]), progress=False)
        (reading,) = reply.readings
        found.add(n, tuple(prompts), reading.rows, reading.positions, reading.values)
        n += len(prompts)
    names = ("n_tokens", "features", "activations", "texts", "positions", "contexts", "context_activations", "vocab")
    return FeatureExamples(
        card=adapter.card,
        sae=sae.name,
        site=sae.site,
        n_features=sae.n_features,
        n_texts=n,
        levels=levels,
        labels=dict(sae.labels),
        page=sae.page,
        settings={"features": None if features is None else sae.chosen(features)},
        **{name: found.get(name) for name in (*names, "maxima", "density", "quantiles", "histogram")},
    )


class _Best:
    """The fields of `FeatureExamples` that need numbers. Columns are of examples, those of one feature in the order of texts."""

    def __init__(self, sae: AttachedSAE, chosen: Tensor | None, k: int, context: int, levels: tuple[float, ...]) -> None:
        self.sae, self.chosen, self.k, self.context, self.levels = sae, chosen, k, context, levels
        self.n_tokens, width, none = 0, 2 * context + 1, torch.empty(0, dtype=torch.long)
        self.counts = torch.zeros(sae.n_features, dtype=torch.long)
        self.maxima = torch.zeros(sae.n_features, dtype=sae.sae.dtype)
        self.keys, self.sizes = none, none
        self.columns: list[Tensor] = [
            none,
            none.to(sae.sae.dtype),
            none,
            none,
            none.new_empty(0, width),
            torch.empty(0, width, dtype=sae.sae.dtype),
        ]

    def add(self, first: int, prompts: tuple[Tokens, ...], rows: Tensor, positions: Tensor, states: Tensor) -> None:
        """A batch of texts, of which the first is number `first`: `[n]` text of the batch, position and states that were read."""
        tokens, features, values = active(self.sae, states)
        above = values > 0
        tokens, features, values = tokens[above], features[above], values[above]
        self.n_tokens += len(states)
        self.counts += features.bincount(minlength=self.sae.n_features)
        self.maxima = self.maxima.scatter_reduce(0, features, values, "amax")
        bins = (features << 16) + ZERO + (BINS * values.double().log2()).floor().long()
        self.keys, at = torch.cat([self.keys, bins]).unique(return_inverse=True)
        self.sizes = torch.zeros_like(self.keys).index_add(0, at, torch.cat([self.sizes, torch.ones_like(bins)]))
        if self.chosen is not None:
            tokens, features, values = (x[self.chosen[features]] for x in (tokens, features, values))
        self._keep(first, prompts, rows[tokens], positions[tokens], features, values)

    def _keep(self, first: int, prompts: tuple[Tokens, ...], rows: Tensor, positions: Tensor, features: Tensor, values: Tensor) -> None:
        """Keep the best examples of those before and those of a batch."""
        order = values.argsort(descending=True, stable=True)
        order = order[(features * len(prompts) + rows)[order].argsort(stable=True)]  # by feature and text, the best first
        best = order[place((features * len(prompts) + rows)[order]) == 0]
        known, both = len(self.columns[0]), torch.cat([self.columns[0], features[best]])
        order = torch.cat([self.columns[1], values[best]]).argsort(descending=True, stable=True)
        order = order[both[order].argsort(stable=True)]
        kept = order[place(both[order]) < self.k].sort().values
        old, best = kept[kept < known], best[kept[kept >= known] - known]

        longest, width = max(map(len, prompts)), torch.arange(2 * self.context + 1)
        ids = torch.full((len(prompts), longest + 2 * self.context), -1)
        for row, prompt in enumerate(prompts):
            ids[row, self.context : self.context + len(prompt)] = torch.tensor(prompt.ids)
        around = positions[best, None] + width  # in the text with `context` tokens before it
        keys, places = ((features * len(prompts) + rows) * longest + positions).sort()
        asked = around - self.context
        wanted = ((features * len(prompts) + rows)[best, None] * longest + asked).where((asked >= 0) & (asked < longest), -1)
        at = torch.searchsorted(keys, wanted).clamp(max=max(0, len(keys) - 1))
        near = values[places[at]].where(keys[at] == wanted, 0) if len(keys) else torch.empty(wanted.shape, dtype=values.dtype)
        new = [features[best], values[best], rows[best] + first, positions[best], ids[rows[best, None], around], near]
        self.columns = [torch.cat([column[old], more]) for column, more in zip(self.columns, new, strict=True)]

    @cached_property
    def _sorted(self) -> list[Tensor]:
        order = self.columns[1].argsort(descending=True, stable=True)
        order = order[self.columns[0][order].argsort(stable=True)]
        return [column[order] for column in self.columns]

    features = property(lambda self: self._sorted[0])
    activations = property(lambda self: self._sorted[1])
    texts = property(lambda self: self._sorted[2])
    positions = property(lambda self: self._sorted[3])
    contexts = property(lambda self: self._sorted[4])
    context_activations = property(lambda self: self._sorted[5])
    vocab = property(lambda self: vocabulary(self.sae.model, self.contexts))
    density = property(lambda self: self.counts.double() / self.n_tokens)

    @property
    def histogram(self) -> Tensor:
        return torch.stack([self.keys >> 16, (self.keys & 0xFFFF) - ZERO, self.sizes], 1).int()

    @property
    def quantiles(self) -> Tensor:
        features, bins = self.keys >> 16, (self.keys & 0xFFFF) - ZERO
        found = torch.full((len(self.levels), self.sae.n_features), float("nan"), dtype=torch.float64)
        fired = self.counts.nonzero()[:, 0]
        upto = self.sizes.cumsum(0)
        before = self.counts.cumsum(0) - self.counts
        for level, line in zip(self.levels, found, strict=True):
            nth = (level * self.counts[fired].double() - 1e-9).ceil().long().clamp(min=1)
            at = torch.searchsorted(upto, before[fired] + nth)
            assert torch.equal(features[at], fired)
            line[fired] = torch.exp2((bins[at].double() + 0.5) / BINS)
        return torch.minimum(found, self.maxima.double()).to(self.maxima.dtype)
