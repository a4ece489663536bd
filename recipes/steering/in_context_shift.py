"""In-context vectors of Liu et al.: what turns the states of one text of a pair into those of the other, at all layers together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookbook import storage
from hookbook.asking import mean_states
from hookbook.errors import DataError, EditError
from hookbook.recipe import ModelCard, recipe, wrap
from hookbook.request import Edit
from hookbook.results import Axes, DataFrame, Result
from hookbook.show.plots import lines
from hookbook.show.tidy import tidy
from hookbook.sites import Site, layers_to_sites
from hookbook.tokens import is_table
from hookbook.vectors import Vector


@dataclass(frozen=True, eq=False)
class InContextVectors(Result):
    """One direction over all layers, a vector for each."""

    card: ModelCard
    sites: tuple[Site, ...]
    """`[layer]`: the block outputs."""
    values: Tensor
    """`[layer, width]`"""
    means: Tensor
    """`[layer, width]`: the mean difference alone."""
    explained: Tensor
    """The share of the differences' variance that their first principal component has."""
    settings: dict[str, Any]

    def vector(self, layer: int) -> Vector:
        """The vector of a block's output."""
        (site,) = layers_to_sites(layer, self.card)
        return Vector(self.card, site, self.values[self.sites.index(site)], "-1", "", "in_context_vector", dict(self.settings))

    def edits(self, strength: float = 0.1) -> list[Edit]:
        """The published way to use it: `mlp_out` of every layer is turned towards the layer's vector, its length kept, at all tokens, read
        and generated.

        Args:
            strength: The paper's lambda; it differs for each model and task.
        """
        if not strength > 0:
            raise EditError(
                f"strength={strength}", "it says how far a state is turned", "use more than 0; for the other way, swap the pairs' texts"
            )
        units = self.values / self.values.norm(dim=-1, keepdim=True)
        return [
            Edit(Site("mlp_out", site.layer), strength * units[i], "rotate", slice(None), scope="all") for i, site in enumerate(self.sites)
        ]

    def to_frame(self) -> DataFrame:
        """One row for each layer: `site`, `layer`, `norm`, and the mean difference's: `mean_norm`, and `mean_cosine` to the vector."""
        cosine = torch.nn.functional.cosine_similarity(self.values, self.means, dim=-1)
        norm, mean_norm = self.values.norm(dim=-1), self.means.norm(dim=-1)
        return tidy({"site": self.sites}, norm=norm, mean_norm=mean_norm, mean_cosine=cosine)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The length of the vector by layer, with that of the mean difference."""
        return lines(
            ax,
            {"in-context vector": self.values.norm(dim=-1), "mean difference": self.means.norm(dim=-1)},
            ("layer", "length"),
            title=f"In-context vector, {self.card.model_id}",
        )


@recipe
def in_context_vector(
    model: Any, pairs: Any, *, bos: bool | None = None, chat: bool = False, progress: bool | None = None
) -> InContextVectors:
    """One direction over all layers that leads from the first texts of some pairs to the second.

    Args:
        model: Any model `hookbook.wrap` takes.
        pairs: Texts `(x, y)`, of which `y` is as wanted, such as a rude sentence and a polite one; or a frame of two columns.
        bos, chat: See `hookbook.tokens.encode`.
        progress: Show a progress bar; None: for long work only.

    Returns:
        `InContextVectors`, whose `edits()` go into `hookbook.generate`. Computed in float64, kept in float32.

    Raises:
        DataError: Fewer than two pairs, or a pair of the same text.

    Source: Liu et al. 2023, arXiv:2311.06668, as the authors' code has it: states of the last token, of the embedding and of all layers
    end to end; the first principal component of the centred differences, of length 1 over all layers and signed so that the largest of the
    pairs' scores is positive, **plus the mean difference** (the paper's text names the component alone; `to_frame()` says how near the
    mean it is).

    Differs: the stream entering the first block is read for the embedding (with learned positions, they are in it), and, where a norm
    follows the MLP (Gemma 2 and 3), what is turned is after that norm.

    Example:
        >>> from hookbook.testing import toy
        >>> found = in_context_vector(toy(), [("bad", "good"), ("sad", "glad"), ("no", "yes")])
        >>> found.values.shape, str(found.edits()[0].site)
        (torch.Size([3, 16]), 'mlp_out.0')
    """
    adapter = wrap(model)
    pairs = storage.pairs(pairs) if is_table(pairs) else list(pairs)
    if any(isinstance(pair, str) or len(pair) != 2 for pair in pairs) or len(pairs) < 2:
        raise DataError(
            f"{len(pairs)} pairs", "two texts are a pair, and one pair has no principal component", "give two or more pairs of texts"
        )
    first, second = ([adapter.encode(text, bos=bos, chat=chat) for text in some] for some in zip(*pairs, strict=True))
    for x, y in zip(first, second, strict=True):
        if x.ids == y.ids:
            raise DataError(f"a pair of {x.text!r} and the same", "they do not differ", "leave it out")
    sites = layers_to_sites("all", adapter.card)
    states = mean_states(adapter, first + second, [Site("resid_pre", 0), *sites], progress=progress)[0]  # [layer, prompt, width]
    differences = (states[:, len(first) :] - states[:, : len(first)]).transpose(0, 1).flatten(1)
    mean = differences.mean(0)
    u, s, v = torch.linalg.svd(differences - mean, full_matrices=False)
    scores = u[:, 0]
    sign = scores.gather(0, scores.abs().argmax(0, keepdim=True)).sign()
    shape = (1 + len(sites), adapter.card.d_model)
    return InContextVectors(
        card=adapter.card,
        sites=sites,
        values=(sign * v[0] + mean).unflatten(0, shape)[1:].float(),
        means=mean.unflatten(0, shape)[1:].float(),
        explained=s[0] ** 2 / (s**2).sum(),
        settings={"pairs": len(pairs)},
    )
