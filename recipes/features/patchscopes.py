"""Patchscopes of features: an SAE's direction in place of a token's state, and the model says what it is.

What it says is the model's own account of a direction. A description that a random direction of the same length also gets, or
that the prompt gets without any, says nothing about the feature.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hookbook import prompts
from hookbook.asking import check_asked, grouped_texts, wanted_words
from hookbook.controls import noise
from hookbook.errors import EditError, SiteError, TokenError
from hookbook.recipe import ModelCard, later, recipe
from hookbook.recipes.features.decomposition import feature_names
from hookbook.recipes.steering.steering import check_strengths
from hookbook.request import Edit, Read, Readout, Request, Row
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.sae import AttachedSAE, checked
from hookbook.sae.saelens import directions
from hookbook.show.plots import Cells, heat_map, samples
from hookbook.show.tidy import Over, each, spelled, tidy
from hookbook.sites import Site, layers_to_sites
from hookbook.tokens import Position, Tokens, decoded, vocabulary


@dataclass(frozen=True, eq=False)
class FeaturePatchscope(Result):
    """What a model said with features' directions patched in: `m` features, `p` pairs of site and strength, the `k` likeliest tokens."""

    card: ModelCard
    sae: str
    """What the SAE is called, with a fingerprint of its weights."""
    features: tuple[int, ...]
    """`[m]`"""
    labels: dict[int, str]
    """What features were said to be about, where somebody did."""
    links: dict[int, str]
    """Features' pages on Neuronpedia, if the release has them."""
    target: Tokens
    """The target prompt as the model saw it."""
    target_position: int
    op: str
    """`set` or `add`."""
    pairs: tuple[tuple[Site, float], ...]
    """`[p]`: where the direction was written, and how many times as long as the state there."""
    norms: Tensor
    """`[p]`: the length of the target prompt's own state."""
    vocab: dict[int, str]
    """The text of every token id in this result."""
    token_ids: Tensor
    """`[m, p, k]`"""
    logprobs: Tensor
    """`[m, p, k]` in nats."""
    random_ids: Tensor
    """`[p, k]`: with a random direction of the same length."""
    random_logprobs: Tensor
    """`[p, k]`"""
    control_ids: Tensor
    """`[k]`: the target prompt without a patch."""
    control_logprobs: Tensor
    """`[k]`"""
    wanted: tuple[str, ...]
    """`[w]`: the tokens asked for."""
    wanted_logprobs: Tensor
    """`[m, p, w]`"""
    random_wanted_logprobs: Tensor
    """`[p, w]`"""
    control_wanted_logprobs: Tensor
    """`[w]`"""
    texts: tuple[tuple[str, ...], ...]
    """`[m][p]`: what was generated; empty if nothing was."""
    random_texts: tuple[str, ...]
    """`[p]`"""
    control_texts: tuple[str, ...]
    """The one of the target prompt without a patch."""
    settings: dict[str, Any]

    def to_frame(self) -> DataFrame:
        """One row for each feature, site, strength and rank.

        Columns: `feature`, `label`, `site`, `layer`, `strength`, `rank`, `token`, `logprob`, `random_token`, `random_logprob`,
        `control_token`, `control_logprob`; with generation `text`, `random_text`, `control_text`; for each wanted token `t`, `logprob
        t`, `random_logprob t` and `control_logprob t`.
        """
        features = [(feature, self.labels.get(feature, "")) for feature in self.features]
        return tidy(
            {"feature label": features, "site strength": self.pairs, "rank": self.token_ids.shape[-1]},
            token=spelled(self.token_ids, self.vocab),
            logprob=self.logprobs,
            random_token=Over("site rank", spelled(self.random_ids, self.vocab)),
            random_logprob=Over("site rank", self.random_logprobs),
            control_token=Over("rank", spelled(self.control_ids, self.vocab)),
            control_logprob=Over("rank", self.control_logprobs),
            text=Over("feature site", self.texts or None),
            random_text=Over("site", self.random_texts or None),
            control_text=Over("", self.control_texts or None),
            **each("logprob", self.wanted, "feature site", self.wanted_logprobs),
            **each("random_logprob", self.wanted, "site", self.random_wanted_logprobs),
            **each("control_logprob", self.wanted, "", self.control_wanted_logprobs),
        )

    def token(self, m: int, p: int, rank: int = 0) -> str:
        """The text of a token of feature number `m` and pair `p`; with as many as there are features, of the random direction."""
        ids = self.random_ids if m == len(self.features) else self.token_ids[m]
        return self.vocab[int(ids[p, rank])]

    def cells(self) -> Cells:
        """Labels of rows (features, and the random direction) and columns, names of the axes, and which (row, pair) is in each cell."""
        sites = len({site for site, _ in self.pairs}) > 1
        columns = [f"{site} {strength:g}" if sites else f"{strength:g}" for site, strength in self.pairs]
        rows = [*feature_names(list(self.features), self.labels), "random"]
        return (
            rows,
            columns,
            "feature",
            "site and strength" if sites else "strength",
            [[(m, p) for p in range(len(columns))] for m in range(len(rows))],
        )

    def plot(self, ax: Axes | None = None, *, value: str = "probability") -> Axes:
        """A heat map of features by strength, with the random direction below; the likeliest token in each cell where it fits.

        Args:
            ax: Where to draw; None: a new figure.
            value: `probability` (of the likeliest token), or one of the wanted tokens (its probability).
        """
        if value != "probability" and value not in self.wanted:
            raise TokenError(f"no value {value!r} in this result", "", f"use one of {', '.join(['probability', *self.wanted])}")
        rows, columns, row_name, column_name, cells = self.cells()
        if value == "probability":
            values = torch.cat([self.logprobs[..., 0], self.random_logprobs[None, :, 0]]).exp()
        else:
            at = self.wanted.index(value)
            values = torch.cat([self.wanted_logprobs[..., at], self.random_wanted_logprobs[None, :, at]]).exp()
        said = [[self.token(m, p) for m, p in line] for line in cells]
        return heat_map(
            ax,
            values,
            said,
            rows,
            columns,
            (row_name, column_name, value if value == "probability" else f"probability of {value}"),
            title=f"What features say, {self.card.model_id}",
        )

    def view(self) -> View:
        """An interactive picture (circuitsvis): choose a feature and a strength, see the likeliest tokens by probability, and what was
        generated."""
        texts = (*self.texts, self.random_texts) if self.texts else ()
        return samples(self.cells(), self.token, torch.cat([self.logprobs, self.random_logprobs[None]]), texts)


@recipe
def feature_patchscope(
    sae: AttachedSAE,
    features: int | Sequence[int],
    *,
    target: Any = prompts.ENTITY_DESCRIPTION,
    strengths: Sequence[float] = (1.0, 2.0, 4.0),
    target_layers: Any = "same",
    target_position: Position | None = None,
    op: Literal["set", "add"] = "set",
    generate: int = 20,
    k: int = 5,
    tokens: Sequence[str | int] = (),
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> FeaturePatchscope:
    """Patch features' directions into a target prompt, and let the model say what they are; all as forks of one run.

    A direction has no length of its own: it is made `strength` times as long as the state that it replaces, the target prompt's own at
    that site and token. Later blocks add to what is written, and add less beside something long. The default lengths begin with the usual
    one, 1, and end where longer ones
    hardly say anything else: of directions in `resid_post.5` of gemma-3-270m, descriptions at 4 and 8 were mostly the same.

    Args:
        sae: What `hookbook.sae.attach` gave; of a transcoder the directions are of its output.
        features: An index, or a list of indices.
        target: A `hookbook.prompts.Target`, or a prompt.
        strengths: Lengths to try, as multiples; a negative one is the opposite direction.
        target_layers: Where to write: `"same"`, the site where the decoder writes; or layers or sites of the same width, see
            `hookbook.patchscope`.
        target_position: The token; None: the target's placeholder, or the last token.
        op: `set` replaces the state, `add` adds to it.
        generate: How many tokens to decode greedily after the target prompt; the patch acts in the prompt only.
        k: How many of the likeliest next tokens to keep.
        tokens: Tokens whose probability is wanted; see `hookbook.patchscope`.
        seed: Of the random direction, which is one for all sites and strengths.
        progress, checkpoint: See `hookbook.patchscope`.

    Returns:
        A `FeaturePatchscope`, with the unpatched target and a random direction of the same lengths as controls.

    Raises:
        ModelError: What was given is no attached SAE.
        EditError: No such feature, or no strengths.
        SiteError, TokenError: Something asked for is not in the model or the prompt, or a site has another width.

    Source: patchscopes, Ghandeharioun et al. 2024, arXiv:2401.06102, of features as in Kharlapenko et al. 2024, "Self-explaining SAE
    features" (Alignment Forum).

    Differs: the latter give scales as lengths and not as multiples, and ask what a word means.

    Example:
        found = hb.feature_patchscope(sae, [12, 404])
        found.texts, found.random_texts
    """
    sae = checked(sae)
    adapter, chosen, strengths = sae.model, sae.chosen(features), check_strengths(strengths)
    if not chosen:
        raise EditError("no features", "there is nothing to describe", "give one or more")
    if op not in ("set", "add"):
        raise EditError(f"op={op!r}", "a direction takes a state's place, or is added to it", "use set or add")
    coded = sae.encode_prompts(target.text if isinstance(target, prompts.Target) else target)
    if len(coded) != 1:
        raise TokenError(f"{len(coded)} target prompts", "features are described in one", "call feature_patchscope for each")
    at = prompts.locate(target, coded[0], target_position)
    wanted_ids = check_asked(adapter, coded, tokens, k, generate)
    every = directions(sae.sae)
    same = isinstance(target_layers, str) and target_layers == "same"
    sites = [sae.out] if same else layers_to_sites(target_layers, adapter.card, sae.out.name)
    for site in sites:
        adapter.require(site)
        if site.width(adapter.card) != every.shape[1]:
            raise SiteError(
                f"features at {site}",
                f"they are {every.shape[1]} wide, and this site is {site.width(adapter.card)}",
                f"use a site as wide as {sae.out}",
            )

    own = adapter.run(Request(coded, [Row(0)], [Read(site, at) for site in sites]), progress=progress, checkpoint=checkpoint)
    wide = torch.promote_types(own.readings[0].values.dtype, torch.float32)
    norms = torch.stack([reading.values[0].cpu().to(wide).norm() for reading in own.readings])
    along = torch.cat([every[list(chosen)].cpu().to(wide), noise(1, every.shape[1], seed=seed).to(wide)])
    along = along / along.norm(dim=-1, keepdim=True)
    lengths = norms[:, None] * torch.tensor(strengths, dtype=wide)
    values = along[:, None, None] * lengths[None, :, :, None]  # [m + 1, site, strength, width]

    pairs = [(site, strength) for site in sites for strength in strengths]
    m, p = len(chosen), len(pairs)
    places = [site for _ in range(m + 1) for site, _ in pairs]
    edits = [Edit(site, value, op, at, card=adapter.card) for site, value in zip(places, values.flatten(0, 2).unbind(0), strict=True)]
    rows = [Row(0), *(Row(0, (edit,)) for edit in edits)]
    reply = adapter.run(
        Request(coded, rows, (), Readout(k=k, tokens=wanted_ids.expand(len(rows), -1)), generate), progress=progress, checkpoint=checkpoint
    )
    said = reply.readout
    assert said is not None

    def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x[0], x[1 : 1 + m * p].unflatten(0, (m, p)), x[1 + m * p :]

    (control_ids, ids, random_ids), (control_logprobs, logprobs, random_logprobs) = split(said.topk_ids), split(said.topk_logprobs)
    control_wanted, wanted, random_wanted = split(said.token_logprobs)
    written = reply.tokens
    return FeaturePatchscope(
        card=adapter.card,
        sae=sae.name,
        features=chosen,
        labels=sae.labels_of(chosen),
        links=sae.links_of(chosen),
        target=coded[0],
        target_position=at,
        op=op,
        pairs=tuple(pairs),
        norms=norms.repeat_interleave(len(strengths)),
        vocab=later(vocabulary, adapter, ids, random_ids, control_ids),
        token_ids=ids,
        logprobs=logprobs,
        random_ids=random_ids,
        random_logprobs=random_logprobs,
        control_ids=control_ids,
        control_logprobs=control_logprobs,
        wanted=wanted_words(adapter, tokens),
        wanted_logprobs=wanted,
        random_wanted_logprobs=random_wanted,
        control_wanted_logprobs=control_wanted,
        texts=later(grouped_texts, adapter, written[1 : 1 + m * p], p) if written is not None else (),
        random_texts=later(decoded, adapter, written[1 + m * p :]) if written is not None else (),
        control_texts=later(decoded, adapter, written[:1]) if written is not None else (),
        settings={"target_position": str(target_position)},
    )
