"""Every state is a sum of few features: how much of a model's states the best few decoder rows of an SAE explain, beside as many random
directions and principal components."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookbook.controls import noise
from hookbook.errors import DataError, check_counts
from hookbook.recipe import ModelCard, later, recipe
from hookbook.recipes.features.reading import readable
from hookbook.request import Each, Read, Request, Row
from hookbook.results import Axes, DataFrame, Result
from hookbook.sae import AttachedSAE, checked
from hookbook.sae.saelens import directions
from hookbook.show.plots import lines
from hookbook.show.tidy import tidy
from hookbook.sites import Site

AT_ONCE = 64
"""Of how many states the products with all directions are held at once."""


@dataclass(frozen=True, eq=False)
class SparseCoding(Result):
    """How much of a state, less the mean state, a sum of `k` directions explains, in the mean over states."""

    card: ModelCard
    sae: str
    """What the SAE is called, with a fingerprint of its weights."""
    site: Site
    """Where the states are, which the decoder makes."""
    ks: tuple[int, ...]
    """How many directions are summed."""
    explained: Tensor
    """`[ks]`: the share of squared length that the best `k` of the SAE's decoder rows explain, chosen for each state."""
    random: Tensor
    """`[ks]`: of as many random directions as the SAE has features, chosen in the same way."""
    principal_axes: Tensor
    """`[ks]`: of the principal axes of other states, chosen in the same way."""
    principal_components: Tensor
    """`[ks]`: of the first `k` of these axes, the same for every state: principal component analysis."""
    n_states: int
    """How many states were explained."""
    n_fit: int
    """How many others gave the mean state and the principal axes."""
    settings: dict[str, Any]

    @property
    def curves(self) -> dict[str, Tensor]:
        """By name of the directions the shares `[ks]`."""
        return {
            "features": self.explained,
            "random directions": self.random,
            "principal axes": self.principal_axes,
            "principal components": self.principal_components,
        }

    def to_frame(self) -> DataFrame:
        """One row for each kind of directions and number of them: `directions`, `k`, `explained`."""
        return tidy({"directions": list(self.curves), "k": list(self.ks)}, explained=torch.stack(list(self.curves.values())))

    def plot(self, ax: Axes | None = None) -> Axes:
        """A curve for each kind of directions, over how many are summed."""
        title = f"States at {self.site} as sums of few directions, {self.card.model_id}"
        names = ("directions summed", "share of a state explained")
        return lines(ax, self.curves, names, title=title, labels=[str(k) for k in self.ks])


@recipe
def sparse_coding(
    sae: AttachedSAE,
    texts: Any,
    *,
    ks: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
    states: int = 256,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> SparseCoding:
    """How much of a state few features explain, `1 - |x - x_k|^2 / |x|^2` with `x` the state less the mean state, over `k`.

    Of each state the best `k` directions are chosen one after the other, each along what is left, and all their coefficients refitted
    (orthogonal matching pursuit); so are random directions and principal axes, so that the choice alone cannot make the difference.

    Args:
        sae: What `hb.sae.attach` gives. Of a transcoder its output is explained.
        texts: At least two prompts, best those that the SAE was not trained on. The states of every second one give the mean and the
            principal axes, the others are explained. Special tokens are left out.
        ks: How many directions are summed, ascending.
        states: How many states are explained at most, drawn with `seed`.
        seed: Also of the random directions.
        progress, checkpoint: See `hookbook.patchscope`.

    Raises:
        ModelError: No attached SAE.
        TokenError: A prompt that cannot be read, or counts that are none.
        DataError: Fewer than two texts, or `ks` that do not ascend or are more than a state has numbers.
        Refused: The model cannot read the site.

    Source: Huben et al. 2023, arXiv:2309.08600, where dictionaries stand beside principal components and random directions; the pursuit is
    Pati, Rezaiifar and Krishnaprasad's (1993). Computed in float64.

    Differs: coefficients may be negative, for all kinds of directions alike; the SAE's own encoder is not asked (`hb.sae_report` does).

    Example:
        found = hb.sparse_coding(sae, texts)
        found.plot()
    """
    adapter = checked(sae).model
    sizes, width = list(ks), sae.out.width(adapter.card)
    for k in sizes:
        check_counts(ks=k)
    check_counts(states=states)
    check_counts(0, seed=seed)
    if not sizes or sizes != sorted(set(sizes)) or sizes[-1] > width:
        raise DataError(f"ks={sizes}", f"a state has {width} numbers", f"give whole numbers that ascend, from 1 to {width}")
    prompts = sae.encode_prompts(texts)
    if len(prompts) < 2:
        raise DataError("one text", "the mean state is to be one of other texts", "give two or more")
    at = tuple(readable(sae, prompt) for prompt in prompts)
    request = Request(prompts, [Row(i) for i in range(len(prompts))], [Read(sae.out, Each(at))])
    reading = adapter.run(request, progress=progress, checkpoint=checkpoint).readings[0].values
    first = torch.tensor([i % 2 == 0 for i, where in enumerate(at) for _ in where])
    (rest,) = (~first).nonzero(as_tuple=True)
    chosen = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:states]].sort().values
    random = noise(sae.n_features, width, seed=seed)
    found = later(_shares, reading, first, chosen, directions(sae.sae).cpu(), random, sizes[-1])
    own, drawn, axes, components = (later(_at, found, i, sizes) for i in range(4))
    return SparseCoding(
        card=adapter.card,
        sae=sae.name,
        site=sae.out,
        ks=tuple(map(int, sizes)),
        explained=own,
        random=drawn,
        principal_axes=axes,
        principal_components=components,
        n_states=len(chosen),
        n_fit=int(first.sum()),
        settings={},
    )


def _at(found: Tensor, i: int, sizes: Sequence[int]) -> Tensor:
    return found[i, [k - 1 for k in sizes]].float()


def _shares(reading: Tensor, first: Tensor, chosen: Tensor, rows: Tensor, random: Tensor, most: int) -> Tensor:
    """`[4, most]`: the mean share that sums of 1, 2, ... of each kind of directions explain."""
    every = reading.detach().double().cpu()
    mean = every[first].mean(0)
    _, sizes, axes = torch.linalg.svd(every[first] - mean, full_matrices=False)
    axes = axes[sizes > sizes[0] * max(every.shape) * torch.finfo(every.dtype).eps]  # of few states, the last are any directions
    x = every[chosen] - mean
    parts = (x @ axes.T).square() / x.square().sum(-1, keepdim=True)
    parts = torch.nn.functional.pad(parts, (0, max(0, most - parts.shape[1])))
    by_axes, by_components = parts.sort(-1, descending=True).values.cumsum(-1), parts.cumsum(-1)  # axes are orthogonal
    return torch.stack([x[:, :most].mean(0) for x in (pursued(rows, x, most), pursued(random, x, most), by_axes, by_components)])


def pursued(rows: Tensor, states: Tensor, most: int) -> Tensor:
    """`[n, most]`: the share of the squared length of states `[n, width]` that the best 1, 2, ... of `rows` `[m, width]` explain, by
    orthogonal matching pursuit: `decomposition.pursue` with coefficients of any sign, of many states at once.

    Of the rows chosen for a state an orthonormal basis is kept, so that what is left needs no refitting.
    """
    unit, found = torch.nn.functional.normalize(rows.double(), dim=-1), []
    for x in states.double().split(AT_ONCE):
        left, basis, shares = x, x.new_zeros(len(x), most, x.shape[1]), []
        for k in range(most):
            new = unit[(left @ unit.T).abs().argmax(-1)]
            for _ in range(2):  # once is not enough for nearly parallel rows
                new = new - ((basis[:, :k] @ new[:, :, None]) * basis[:, :k]).sum(1)
            size = new.norm(dim=-1, keepdim=True)
            basis[:, k] = new = torch.where(size > 1e-10, new / size, 0.0)
            left = left - (left * new).sum(-1, keepdim=True) * new
            shares.append(1 - left.square().sum(-1) / x.square().sum(-1))
        found.append(torch.stack(shares, -1))
    return torch.cat(found)
