"""Which features of a sparse autoencoder are active on which tokens, and where two sets of texts differ.

Features are SAELens' activations of the model's own states. Tokens such as the beginning of a sequence are left out: no SAE was trained on
them, and their activations are huge.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hookbook.asking import auroc
from hookbook.engine import cost
from hookbook.errors import DataError, TokenError, check_counts, check_feature, check_prompt
from hookbook.recipe import ModelCard, later, recipe
from hookbook.recipes.features.decomposition import about
from hookbook.request import Each, Read, Request, Row
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.sae import AttachedSAE, checked
from hookbook.show.plots import heat_map, token_values
from hookbook.show.tidy import at_tokens, tidy
from hookbook.sites import Site
from hookbook.tokens import Position, Tokens, is_table, resolve

CHUNK_BYTES = 64 << 20
"""How many bytes of activations are dense at once."""


@dataclass(frozen=True, eq=False)
class FeatureActivations(Result):
    """Activations of features on tokens: `m` of them, those that are not 0, by prompt, position and descending activation."""

    card: ModelCard
    sae: str
    """What the SAE is called, with a fingerprint of its weights."""
    site: Site
    prompts: tuple[Tokens, ...]
    """`[n]`: the prompts as the model saw them."""
    read: tuple[tuple[int, ...], ...]
    """`[n]`: of each prompt the positions that were read."""
    rows: Tensor
    """`[m]` which prompt."""
    positions: Tensor
    """`[m]` which token of it."""
    features: Tensor
    """`[m]`"""
    values: Tensor
    """`[m]` the activation."""
    n_features: int
    labels: dict[int, str]
    """What these features were said to be about."""
    page: str
    """Where the SAE is on Neuronpedia."""
    settings: dict[str, Any]

    @property
    def n_tokens(self) -> int:
        """How many tokens were read."""
        return sum(map(len, self.read))

    def to_frame(self) -> DataFrame:
        """One row for each active feature of each token: `prompt`, `position`, `position_token`, `feature_rank` (0 the most active),
        `feature`, `activation`, `label`, `link`."""
        return self._frame(torch.arange(len(self.features)))

    def top(self, k: int = 5) -> DataFrame:
        """The same of the `k` most active features of each token."""
        check_counts(k=k)
        return self._frame((self._ranks() < k).nonzero()[:, 0])

    def _ranks(self) -> Tensor:
        """`[m]`: how many features are more active on the token."""
        tokens = self.rows * (1 << 32) + self.positions
        return place(tokens)

    def _frame(self, chosen: Tensor) -> DataFrame:
        features = self.features[chosen]
        return tidy(
            {"prompt position position_token": at_tokens(self.prompts, self.rows[chosen], self.positions[chosen])},
            feature_rank=self._ranks()[chosen],
            feature=features,
            activation=self.values[chosen],
            **about(features, self.labels, self.page),
        )

    def of(self, feature: int) -> list[Tensor]:
        """A feature's activation on every token of each prompt, `[pos]`; 0 where it is not active and where nothing was read."""
        mine = self.features == check_feature(feature, self.n_features)
        rows, positions, values = self.rows[mine], self.positions[mine], self.values[mine]
        found = [torch.zeros(len(prompt), dtype=values.dtype) for prompt in self.prompts]
        for row in rows.unique().tolist():
            found[row][positions[rows == row]] = values[rows == row]
        return found

    def dense(self, prompt: int = 0) -> Tensor:
        """All activations of a prompt, `[pos, n_features]`; 0 where nothing was read."""
        mine = self.rows == check_prompt(prompt, len(self.prompts))
        found = torch.zeros(len(self.prompts[prompt]), self.n_features, dtype=self.values.dtype)
        found[self.positions[mine], self.features[mine]] = self.values[mine]
        return found

    def mean(self) -> Tensor:
        """`[n_features]`: each feature's mean activation over all tokens read."""
        total = torch.zeros(self.n_features, dtype=torch.float64).index_add(0, self.features, self.values.double())
        return (total / self.n_tokens).to(self.values.dtype)

    def largest(self) -> Tensor:
        """`[n_features]`: each feature's largest activation; 0 of one that is never active. As `maxima` of `hb.sae.attach`."""
        return torch.zeros(self.n_features, dtype=self.values.dtype).scatter_reduce(0, self.features, self.values, "amax")

    def share(self) -> Tensor:
        """`[n_features]`: on which share of the tokens read each feature is active."""
        return self.features.bincount(minlength=self.n_features).double() / self.n_tokens

    def by_text(self, features: Tensor) -> Tensor:
        """`[n_texts, m]`: the mean activation of some features over the tokens read of each text."""
        place = torch.full((self.n_features,), -1).index_copy(0, features, torch.arange(len(features)))[self.features]
        mine, found = place >= 0, torch.zeros(len(self.prompts), len(features), dtype=torch.float64)
        found.index_put_((self.rows[mine], place[mine]), self.values[mine].double(), accumulate=True)
        return found / torch.tensor([[max(1, len(read))] for read in self.read])

    def contrast(self, other: FeatureActivations) -> DataFrame:
        """The features that are active here or in other texts, by how much more they are here, the largest difference first.

        Columns: `feature`, `difference` (of mean activations), `mean_activation`, `other_mean_activation`, `density`, `other_density`
        (shares of tokens where it is active), `auroc` (how often its mean activation in a text from here is above that in a text from
        there; 0.5: it tells nothing), `label`, `link`.

        Raises:
            DataError: The other activations are of another SAE.
        """
        if (self.sae, self.site) != (other.sae, other.site):
            raise DataError(
                f"features of {self.sae} beside those of {other.sae}", "the same number is another feature", "read both texts with one SAE"
            )
        sides = [side.double() for side in (self.mean(), other.mean(), self.share(), other.share())]
        difference = sides[0] - sides[1]
        seen = (sides[2] + sides[3]).nonzero()[:, 0]
        chosen = seen[difference[seen].argsort(descending=True, stable=True)]
        names = ("mean_activation", "other_mean_activation", "density", "other_density")
        columns = {"difference": difference[chosen]} | {name: side[chosen] for name, side in zip(names, sides, strict=True)}
        apart = auroc(self.by_text(chosen), other.by_text(chosen))
        return tidy({"feature": chosen.tolist()}, **columns, auroc=apart, **about(chosen, self.labels | other.labels, self.page))

    def _largest(self, prompt: int, k: int) -> tuple[Tensor, list[int]]:
        """A prompt's activations `[pos, k]`, and its `k` features with the largest ones."""
        check_counts(k=k)
        mine = self.rows == check_prompt(prompt, len(self.prompts))
        features, values = self.features[mine], self.values[mine]
        if not len(features):
            raise DataError(f"no feature is active in prompt {prompt}", "there is nothing to show", "use another prompt")
        chosen = list(dict.fromkeys(features[values.argsort(descending=True, stable=True)].tolist()))[:k]
        return self.dense(prompt)[:, chosen], chosen

    def plot(self, ax: Axes | None = None, *, prompt: int = 0, k: int = 12) -> Axes:
        """A heat map: the tokens read of a prompt by its `k` features with the largest activations."""
        values, chosen = self._largest(prompt, k)
        at = list(self.read[prompt])
        words = [[f"{x:.3g}" if x else "" for x in line] for line in values[at].tolist()]
        rows = [f"{p} {self.prompts[prompt].strings[p]}" for p in at]
        return heat_map(
            ax,
            values[at],
            words,
            rows,
            [str(i) for i in chosen],
            ("token", "feature", "activation"),
            limits=(0, float(values.max())),
            title=f"Activations of features, {self.card.model_id}",
        )

    def view(self, *, prompt: int = 0, k: int = 30) -> View:
        """An interactive picture (circuitsvis): choose one of the `k` features with the largest activations, see it on the prompt's
        tokens."""
        values, chosen = self._largest(prompt, k)
        return token_values(self.prompts[prompt].strings, values, [f"{i} {self.labels.get(i, '')}".strip() for i in chosen])


@recipe
def feature_activations(
    sae: AttachedSAE,
    prompts: Any,
    *,
    position: Position | None = None,
    special: bool = False,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> FeatureActivations:
    """Which features are active on which tokens.

    Args:
        sae: What `hb.sae.attach` gives.
        prompts: A prompt, or a list of prompts.
        position: The tokens to read (see `hookbook.tokens.Position`); None: every one.
        special: Read special tokens, too. No SAE was trained on them.
        progress, checkpoint: See `hookbook.patchscope`.

    Returns:
        `FeatureActivations`: SAELens' own activations, in the SAE's precision. Those that are 0 are not kept.

    Raises:
        ModelError: No attached SAE.
        TokenError: A prompt or position that cannot be read, or nothing but special tokens.
        Refused: The model cannot read the site.

    Source: Huben et al. 2023, arXiv:2309.08600; Bricken et al. 2023, "Towards Monosemanticity". Encoding is SAELens'.

    Differs: special tokens are left out by default.

    Example:
        found = hb.feature_activations(sae, "The weather today is good")
        found.top(3)
    """
    adapter = checked(sae).model
    coded = sae.encode_prompts(prompts)
    read = tuple(readable(sae, prompt, position, special) for prompt in coded)
    reply = adapter.run(
        Request(coded, [Row(i) for i in range(len(coded))], [Read(sae.site, Each(read))]), progress=progress, checkpoint=checkpoint
    )
    (reading,) = reply.readings
    found = Stream(_Active(sae))
    found.add(reading.rows, reading.positions, reading.values)
    return FeatureActivations(
        card=adapter.card,
        sae=sae.name,
        site=sae.site,
        prompts=tuple(coded),
        read=read,
        rows=found.get("rows"),
        positions=found.get("positions"),
        features=found.get("features"),
        values=found.get("values"),
        n_features=sae.n_features,
        labels=found.get("labels"),
        page=sae.page,
        settings={},
    )


class _Active:
    """The fields of `FeatureActivations` that need numbers."""

    def __init__(self, sae: AttachedSAE) -> None:
        self.sae = sae

    def add(self, rows: Tensor, positions: Tensor, states: Tensor) -> None:
        tokens, self.features, self.values = active(self.sae, states)
        self.rows, self.positions = rows[tokens], positions[tokens]

    @property
    def labels(self) -> dict[int, str]:
        return self.sae.labels_of(self.features)


def active(sae: AttachedSAE, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The activations that are not 0 of states `[n, width]`: token, feature and value, each `[m]`, by token and descending value."""
    parts = []
    for start, some in chunks(sae, states):
        found = sae.encode(some)
        tokens, features = found.nonzero().unbind(1)
        values = found[tokens, features]
        order = values.argsort(descending=True, stable=True)
        order = order[tokens[order].argsort(stable=True)]
        parts.append([(tokens + start)[order].cpu(), features[order].cpu(), values[order].cpu()])
    tokens, features, values = (torch.cat(column) for column in zip(*parts, strict=True))
    return tokens, features, values


def chunks(sae: AttachedSAE, states: Tensor) -> Iterator[tuple[int, Tensor]]:
    """States, as many at once as may have dense activations, and which of them is the first."""
    size = max(1, CHUNK_BYTES // (sae.n_features * sae.sae.dtype.itemsize))
    for start in range(0, len(states), size):
        yield start, states[start : start + size]


def place(groups: Tensor) -> Tensor:
    """The place of each in its group, from 0; what belongs together follows each other."""
    _, counts = groups.unique_consecutive(return_counts=True)
    return torch.arange(len(groups)) - (counts.cumsum(0) - counts).repeat_interleave(counts)


def readable(sae: AttachedSAE, prompt: Tokens, position: Position | None = None, special: bool = False) -> tuple[int, ...]:
    """The tokens of a prompt that an SAE is to read, in order."""
    asked = sorted(resolve(slice(None) if position is None else position, prompt))
    found = tuple(p for p in asked if special or prompt.ids[p] not in sae.special)
    if not found:
        raise TokenError(
            f"nothing to read in {prompt.text[:40]!r}", "all its tokens are special, on which no SAE was trained", "give a text"
        )
    return found


def batches(sae: AttachedSAE, texts: Any, size: int, progress: bool | None) -> Iterator[list[Tokens]]:
    """Texts as prompts, so many at once; what is no list is taken as it comes."""
    check_counts(batch=size)
    listed = isinstance(texts, (str, list, tuple, Tokens)) or hasattr(texts, "tolist") or is_table(texts) or not isinstance(texts, Iterable)
    prompts: Any = sae.encode_prompts(texts) if listed else texts
    prompts = iter(prompts)
    hidden = sae.model.remote or cost.account() is not None or progress is False
    empty = True
    with tqdm(desc="texts", unit="text", leave=False, disable=hidden, delay=0 if progress else 5) as bar:
        while some := list(islice(prompts, size)):
            empty = False
            yield some if listed else [one for text in some for one in sae.encode_prompts(text)]
            bar.update(len(some))
    if empty:
        raise TokenError("no texts", "there is nothing to read", "give at least one")


@dataclass
class Stream:
    """What is gathered batch by batch: at once, or of a remote model when the numbers are here."""

    into: Any
    """Takes the numbers of a batch (`add`), and in the end has what is wanted as attributes."""
    steps: list[Any] = field(default_factory=list)

    def add(self, *numbers: Any) -> None:
        """A batch's."""
        self.steps.append(later(_add, self.into, *numbers))

    def get(self, name: str) -> Any:
        """An attribute of `into`, after all batches."""
        return later(_get, self, name)


def _add(into: Any, *numbers: Any) -> None:
    into.add(*numbers)


def _get(stream: Stream, name: str) -> Any:
    return getattr(stream.into, name)
