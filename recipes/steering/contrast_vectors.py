"""Contrast vectors: the difference between the mean states of texts with something and of texts without it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookbook.adapter import Adapter
from hookbook.asking import encode_prompts, mean_states
from hookbook.errors import DataError, SiteError, TokenError
from hookbook.recipe import ModelCard, recipe, wrap
from hookbook.results import Axes, DataFrame, Result
from hookbook.show.plots import heat_map, lines, site_labels
from hookbook.show.tidy import controls, tidy
from hookbook.sites import Site, layers_to_sites
from hookbook.tokens import Position, Tokens, prompts_of
from hookbook.vectors import Vector

SHUFFLES = 20
"""How often the classes are shuffled for the control."""


@dataclass(frozen=True, eq=False)
class ContrastVectors(Result):
    """The difference of two classes' mean states at every position and site, and how well it tells texts apart that it was not made of."""

    card: ModelCard
    sites: tuple[Site, ...]
    positions: tuple[str, ...]
    values: Tensor
    """`[position, site, width]`: the positive mean less the negative one."""
    norms: Tensor
    """`[2, position, site]`: the mean length of a positive and of a negative state."""
    auroc: Tensor
    """`[position, site]`: of the projection of held-out texts, 0.5 by chance; NaN if none are held out."""
    shuffled: Tensor
    """`[position, site]`: the same with shuffled classes, the mean over `SHUFFLES`."""
    template: str
    settings: dict[str, Any]

    def vector(self, layer: Any = None, position: Any = None) -> Vector:
        """The vector of one site and position.

        Args:
            layer: A layer, a site, or its text; may be left out if there is one.
            position: One of those asked for; may be left out if there is one.
        """
        at, p = self._site(layer), self._position(position)
        return Vector(
            self.card, self.sites[at], self.values[p, at], self.positions[p], self.template, "contrast_vector", dict(self.settings)
        )

    def _site(self, layer: Any) -> int:
        if layer is None and len(self.sites) == 1:
            return 0
        if layer is not None:
            (site,) = layers_to_sites(layer, self.card, self.sites[0].name)
            if site in self.sites:
                return self.sites.index(site)
        raise SiteError(f"no vector at layer {layer!r}", f"there are vectors at {', '.join(map(str, self.sites))}", "name one of them")

    def _position(self, position: Any) -> int:
        if position is None and len(self.positions) == 1:
            return 0
        if position is not None and str(position) in self.positions:
            return self.positions.index(str(position))
        raise TokenError(f"no vector at the position {position!r}", f"there are vectors at {', '.join(self.positions)}", "name one of them")

    def to_frame(self) -> DataFrame:
        """One row for each position and site: `place` (the position as it was given), `site`, `layer`, `norm`, `positive_norm`,
        `negative_norm`, `auroc`, `control shuffled` (the same with shuffled classes)."""
        positive, negative = self.norms
        return tidy(
            {"place": self.positions, "site": self.sites},
            norm=self.values.norm(dim=-1),
            positive_norm=positive,
            negative_norm=negative,
            auroc=self.auroc,
            **controls({"shuffled": self.shuffled}),
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """How well held-out texts are told apart, by site, with shuffled classes beside it; of several positions, a heat map."""
        labels = site_labels(self.sites)
        if len(self.positions) == 1:
            return lines(
                ax,
                {"held out": self.auroc[0], "shuffled classes": self.shuffled[0]},
                ("layer", "AUROC"),
                labels=labels,
                title=self._title(),
            )
        words = [[f"{x:.2f}" for x in line] for line in self.auroc.tolist()]
        return heat_map(ax, self.auroc, words, self.positions, labels, ("position", "layer", "AUROC"), title=self._title())

    def _title(self) -> str:
        return f"How well held-out texts are told apart, {self.card.model_id}"


@recipe
def contrast_vector(
    model: Any,
    positive: Sequence[Any],
    negative: Sequence[Any],
    *,
    layers: Any = "all",
    site: str = "resid_post",
    position: Position = -1,
    held_out: float = 0.25,
    seed: int = 0,
    bos: bool | None = None,
    chat: bool = False,
    progress: bool | None = None,
) -> ContrastVectors:
    """The mean state of texts with something less that of texts without it, at every layer.

    Args:
        model: Any model `hookbook.wrap` takes.
        positive: Prompts with it: texts, chat messages, or see `hookbook.tokens.encode`.
        negative: Prompts without it. Prompts at the same place of equally long lists are kept or held out together.
        layers: `"all"`, a layer, a site, or a list of one width.
        site: What a bare layer means: `resid_post` is a block's output, `resid_pre` its input.
        position: The token to read. A list gives a vector for each of its positions (`hookbook.tokens.after_instruction` lists the
            tokens of a chat template that follow the instruction); a span, such as `slice(1, None)`, gives the mean over its
            tokens without the beginning-of-sequence token, every prompt counting alike.
        held_out: Share of each class that the vector is not made of, on which its projection is scored; 0: none.
        seed: Of what is held out, and of the shuffled classes.
        bos, chat: See `hookbook.tokens.encode`; `chat` makes each text a user message of the chat template.
        progress: Show a progress bar; None: for long work only.

    Returns:
        `ContrastVectors`; means are taken in float64 and kept in float32.

    Raises:
        DataError: A class is empty or too small, or the classes share a prompt.
        SiteError, TokenError: A layer or position that is not there.

    Source: Arditi et al. 2024, arXiv:2406.11717 (`site="resid_pre"`, a chat template's last tokens). Contrastive activation addition
    (Rimsky et al. 2023, arXiv:2312.06681) is the same over one question answered in two ways: texts that end in `(A)` and `(B)`,
    `position=-2`.

    Differs: neither holds texts out in making its vectors; `held_out=0` is theirs.

    Example:
        >>> from hookbook.testing import toy
        >>> found = contrast_vector(toy(), ["ab", "ac", "ad"], ["xb", "xc", "xd"], held_out=0)
        >>> found.values.shape, str(found.vector(1).site)
        (torch.Size([1, 3, 16]), 'resid_post.1')
    """
    adapter = wrap(model)
    classes = [encoded_class(adapter, texts, name, bos, chat) for texts, name in ((positive, "positive"), (negative, "negative"))]
    train, test = held_apart(classes, held_out, seed)
    sites = layers_to_sites(layers, adapter.card, site)
    if len({s.width(adapter.card) for s in sites}) > 1 or any(s.name == "attn_pattern" for s in sites):
        raise SiteError(
            f"vectors at {', '.join(map(str, sites))}", "their widths differ, or they are patterns", "ask for sites of one kind"
        )
    prompts = classes[0] + classes[1]
    positions = list(position) if isinstance(position, (list, tuple)) else [position]
    if not positions:
        raise TokenError("no positions", "there is nothing to read", "give a position, or a list of them")
    states = mean_states(adapter, prompts, sites, positions, progress=progress)
    weights = torch.zeros(1 + SHUFFLES, len(prompts), dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)
    held: list[list[Tensor]] = [[], []]
    for i in range(1 + SHUFFLES):
        for some, keep in ((train, False), (test, True)):
            members = torch.tensor(some[0] + some[1], dtype=torch.long)
            members = members if i == 0 else members[torch.randperm(len(members), generator=draw)]
            for sign, part in enumerate((members[: len(some[0])], members[len(some[0]) :])):
                if keep:
                    held[sign].append(part)
                else:
                    weights[i, part] = (1 - 2 * sign) / len(part)
    auroc, shuffled = (torch.full(states.shape[:2], float("nan"), dtype=torch.float64) for _ in range(2))
    if test[0]:
        every = _auroc(states, weights, torch.stack(held[0]), torch.stack(held[1]))
        auroc, shuffled = every[..., 0], every[..., 1:].mean(-1)
    lengths = states.norm(dim=-1)
    return ContrastVectors(
        card=adapter.card,
        sites=sites,
        positions=tuple(map(str, positions)),
        values=(weights[0] @ states).float(),
        norms=torch.stack([lengths[..., part].mean(-1) for part in train]).float(),
        auroc=auroc,
        shuffled=shuffled,
        template="chat" if chat else "",
        settings={"texts": [len(part) for part in (*train, *test)]},
    )


def encoded_class(adapter: Adapter, texts: Any, name: str, bos: bool | None, chat: bool) -> list[Tokens]:
    listed = prompts_of(texts, adapter.tokenizer)
    if not listed or isinstance(texts, (str, Tokens)):
        why = "it is one prompt, not a list" if listed else "there is nothing to contrast"
        raise DataError(f"the {name} class {texts!r}", why, "give a list of prompts for each class")
    return encode_prompts(adapter, listed, bos, chat)


def held_apart(classes: list[list[Tokens]], held_out: float, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Of each class the numbers of the prompts that make the vector, and of those held out; prompts count on through both classes."""
    sets = [{tokens.ids for tokens in some} for some in classes]
    if sets[0] == sets[1]:
        raise DataError(
            "positive and negative prompts that are the same", "their difference is nothing", "give prompts that differ in one thing"
        )
    both = [tokens.text for tokens in classes[0] if tokens.ids in sets[1]]
    if both:
        raise DataError(f"{both[0]!r} in both classes", "it is with and without what is looked for", "leave it out of one")
    if not 0 <= held_out < 1:
        raise DataError(f"held_out={held_out}", "it is a share", "use 0 or more, and less than 1")
    train, test, start = [], [], 0
    for some, unique in zip(classes, sets, strict=True):
        if len(unique) < len(some):
            raise DataError("a prompt that is twice in a class", "it could be held out and not", "leave one out")
        order = list(range(start, start + len(some)))
        random.Random(seed).shuffle(order)  # the same order for classes of one size, so that pairs stay together
        n = max(1, round(held_out * len(some))) if held_out else 0
        if held_out and len(some) < 4:
            raise DataError(f"{len(some)} prompts in a class", "too few to hold some out", "give 4 or more, or held_out=0")
        if n == len(some):
            raise DataError(f"held_out={held_out} of {n} prompts in a class", "none is left", "hold out less")
        test.append(sorted(order[:n]))
        train.append(sorted(order[n:]))
        start += len(some)
    return train, test


def _auroc(states: Tensor, weights: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """How often a held-out positive text projects higher than a negative one, `[position, site, shuffle]`.

    Args:
        states: `[position, site, prompt, width]`.
        weights: `[shuffle, prompt]`: each vector as a sum of states.
        positive, negative: `[shuffle, n]`: the numbers of held-out prompts.
    """
    scores = weights @ (states @ states.transpose(-1, -2))  # [position, site, shuffle, prompt]: no vector of a shuffle is held
    high, low = (scores.gather(-1, part.expand(*scores.shape[:2], -1, -1)) for part in (positive, negative))
    wins = (high[..., :, None] > low[..., None, :]).double() + 0.5 * (high[..., :, None] == low[..., None, :]).double()
    return wins.mean((-1, -2))
