"""What each feature of a sparse autoencoder does to the next token: every feature at every strength, as forks of one pass for each prompt.

Whether a feature is active says what the model sees; what happens when it is changed says what the model does with it. The two differ:
features that are strongly active can be without effect, and the label of a feature, made from the texts on which it is active, need not
say what it makes likelier.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hookbook.adapter import Adapter
from hookbook.asking import wanted_ids, wanted_words
from hookbook.engine import cost
from hookbook.errors import DataError, EditError, Refused, TokenError, check_counts, check_prompt
from hookbook.recipe import ModelCard, later, recipe
from hookbook.recipes.features.decomposition import about
from hookbook.request import Each, Read, Request, Row
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.sae import AttachedSAE, checked
from hookbook.show.plots import bars, lines
from hookbook.show.text import ending, show
from hookbook.show.tidy import Over, each, spelled, tidy
from hookbook.sites import Site
from hookbook.tokens import Position, Tokens, resolve, vocabulary

CHANGES = ("to", "add", "scale", "times_max")
CHUNK = 128
"""How many tokens are encoded at once."""


@dataclass(frozen=True, eq=False)
class FeatureSweep(Result):
    """What `m` features, each of one of `n` prompts, do to the next token at each strength."""

    card: ModelCard
    prompts: tuple[Tokens, ...]
    """`[n]`"""
    positions: tuple[tuple[int, ...], ...]
    """`[n]`: the tokens of each prompt at which features were changed."""
    sae: str
    site: Site
    """What was changed."""
    change: str
    """What a strength means: `to`, `add`, `scale` or `times_max`; see `hookbook.sae.AttachedSAE.edit`."""
    strengths: tuple[float, ...]
    rows: Tensor
    """`[m]`: the prompt."""
    features: Tensor
    """`[m]`: the feature."""
    activations: Tensor
    """`[m]`: its largest activation at these tokens in the plain run."""
    kl: Tensor
    """`[m, strength]`: KL(plain || changed) of the next token's distributions, in nats."""
    token_ids: Tensor
    """`[m, strength, k]`: the likeliest next tokens."""
    logprobs: Tensor
    """`[m, strength, k]`: of these, in nats."""
    plain_ids: Tensor
    """`[n, k]`: the likeliest next tokens of the plain run."""
    plain_logprobs: Tensor
    """`[n, k]`"""
    wanted: tuple[str, ...]
    """The tokens asked for."""
    wanted_logprobs: Tensor
    """`[n, wanted]`: of the plain run, in nats."""
    changes: Tensor
    """`[m, strength, wanted]`: how much these log-probabilities grow."""
    vocab: dict[int, str]
    """The text of every token id in this result."""
    labels: dict[int, str]
    """What features were said to be about."""
    links: dict[int, str]
    """Their pages on Neuronpedia."""
    settings: dict[str, Any]

    def to_frame(self) -> DataFrame:
        """One row for each prompt, feature and strength.

        Columns: `prompt`, `feature`, `strength`, `activation` (before), `kl`, for each wanted token `t` `change t`, `plain_token` and
        `token` (the likeliest next one before and after), `logprob` (of the latter), `label`, `link`.
        """
        prompts = [self.prompts[i] for i in self.rows.tolist()]
        return tidy(
            {"prompt feature": [*zip(prompts, self.features.tolist(), strict=True)], "strength": self.strengths},
            activation=Over("prompt", self.activations),
            kl=self.kl,
            **each("change", self.wanted, "prompt strength", self.changes),
            plain_token=Over("prompt", spelled(self.plain_ids[self.rows, 0], self.vocab)),
            token=spelled(self.token_ids[..., 0], self.vocab),
            logprob=self.logprobs[..., 0],
            **{name: Over("prompt", texts) for name, texts in about(self.features, self.labels, self.links).items()},
        )

    def top(self, n: int = 20, by: str = "kl") -> DataFrame:
        """The `n` rows of `to_frame()` with the most.

        Args:
            n: How many.
            by: `"kl"`, `"activation"`, or a wanted token: how far its log-probability moves, up or down.
        """
        column = by if by in ("kl", "activation") else f"change {by}"
        if column not in ("kl", "activation") and by not in self.wanted:
            raise TokenError(f"by={by!r}", "", f"use one of {', '.join(['kl', 'activation', *self.wanted])}")
        return self.to_frame().sort_values(column, key=lambda x: -x.abs(), kind="stable", ignore_index=True).head(n)

    def plot(self, ax: Axes | None = None, *, prompt: int = 0, n: int = 6, value: str = "kl") -> Axes:
        """The features of a prompt that do most: by strength, or as bars if there is one strength.

        Args:
            ax: Where to draw; None: a new figure.
            prompt: Which prompt.
            n: How many features.
            value: `"kl"`, or a wanted token: the change of its log-probability.
        """
        if value != "kl" and value not in self.wanted:
            raise TokenError(f"value={value!r}", "", f"use one of {', '.join(['kl', *self.wanted])}")
        prompt = check_prompt(prompt, len(self.prompts))
        mine = (self.rows == prompt).nonzero()[:, 0]
        values = self.kl[mine] if value == "kl" else self.changes[mine, :, self.wanted.index(value)]
        best = values.abs().amax(-1).topk(min(n, len(mine))).indices
        names = [self._name(int(self.features[mine[i]])) for i in best.tolist()]
        what = "KL(plain || changed), nats" if value == "kl" else f"change of log p({value!r}), nats"
        title = f"Features that do most, {ending(self.prompts[prompt].text, 60)!r}, {self.card.model_id}"
        if len(self.strengths) > 1:
            curves = dict(zip(names, values[best].unbind(0), strict=True))
            return lines(ax, curves, (self.change, what), labels=[f"{x:g}" for x in self.strengths], title=title)
        return bars(ax, names, values[best, 0], what, title=title)

    def view(self) -> View:
        """The table of `top(50)`, with links to the features' pages."""
        return View.table(self.top(50), "What does most")

    def _name(self, feature: int) -> str:
        return f"{feature} {show(self.labels[feature])[:40]}" if feature in self.labels else str(feature)


@recipe
def feature_sweep(
    sae: AttachedSAE,
    prompts: Any,
    *,
    features: Literal["all", "active"] | Sequence[int] | Sequence[Sequence[int]] = "all",
    strengths: Sequence[float] = (0.0,),
    change: Literal["to", "add", "scale", "times_max"] = "to",
    position: Position = -1,
    keep_error: bool = True,
    tokens: Sequence[str | int] = (),
    k: int = 1,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> FeatureSweep:
    """Change one feature at a time, and look at the next token.

    Args:
        sae: What `hookbook.sae.attach` gave.
        prompts: A prompt, or a list of prompts.
        features: `"all"`; `"active"`: in each prompt those which are active at one of the tokens; a list; or a list for each prompt.
        strengths: What each feature becomes, and so on, as `change` says. The default takes it out.
        change: `"to"`, `"add"`, `"scale"` or `"times_max"`; see `hookbook.sae.AttachedSAE.edit`.
        position: The token or tokens of each prompt; `sae.every` is all but the first special one.
        keep_error: Whether what the SAE does not reconstruct stays. Without it every change also replaces the state by its reconstruction.
        tokens: Next tokens whose log-probabilities are wanted: texts as they follow the prompts, usually with a leading space, or ids.
        k: How many of the likeliest next tokens to keep.
        progress, checkpoint: See `hookbook.patchscope`.

    Returns:
        A `FeatureSweep`. The distributions are never in memory all at once.

    Raises:
        ModelError: `sae` is not attached to a model.
        DataError: No strength; no feature is active; lists of features that are not one for each prompt.
        EditError: An unknown feature or change; `times_max` without maxima.
        TokenError: A token or position cannot be used.
        Refused: `"active"` of a remote model, which is not known before its job is done; an SAE whose features cannot be changed inside
            the model.

    Source: clamping as in Templeton et al. 2024, "Scaling Monosemanticity", with the SAE's error kept. A plan with `"active"` counts all
        features.

    Differs: one prompt's next token under every feature, where they write texts under few.

    Example:
        sweep = hb.feature_sweep(sae, "The capital of France is", tokens=[" Paris"])
        sweep.top(10, by=" Paris")
    """
    sae = checked(sae)
    adapter = sae.model
    coded = sae.encode_prompts(prompts)
    strengths = tuple(float(x) for x in strengths)
    if change not in CHANGES:
        raise EditError(f"change={change!r}", "", f"use one of {', '.join(CHANGES)}")
    if not strengths:
        raise DataError("no strengths", "nothing would be changed", "give at least one")
    check_counts(k=k)
    end = Site("resid_post", adapter.card.n_layers - 1)
    listed = features_of(sae, features, len(coded))
    wanted = wanted_ids(adapter, coded, tokens)
    where = [tuple(resolve(position, prompt)) for prompt in coded]

    plain = adapter.run(
        Request(coded, [Row(i) for i in range(len(coded))], [Read(sae.site, Each(tuple(map(list, where)))), Read(end)]), progress=progress
    )
    seen = plain.readings[0].values.split([len(some) for some in where])
    chosen = _active(sae, seen) if listed is None else listed
    edits = {
        (feature, by): sae.edit(feature, position=position, keep_error=keep_error, **{change: by})  # pyright: ignore[reportArgumentType]
        for feature in dict.fromkeys(feature for some in chosen for feature in some)
        for by in strengths
    }
    rows = [Row(i, (edits[feature, strength],)) for i, some in enumerate(chosen) for feature in some for strength in strengths]
    changed = adapter.run(Request(coded, rows, [Read(end)]), progress=progress, checkpoint=checkpoint)
    sizes = [len(some) * len(strengths) for some in chosen]
    kl, ids, logprobs, said = _beside_plain(adapter, changed.readings[0].values.split(sizes), plain.readings[1].values, wanted, k)

    def after(x: list[Tensor]) -> Tensor:
        return torch.cat([some[:-1] for some in x]).unflatten(0, (-1, len(strengths)))

    def before(x: list[Tensor]) -> Tensor:
        return torch.stack([some[-1] for some in x])

    at, token_ids, plain_ids = torch.tensor([i for i, some in enumerate(chosen) for _ in some]), after(ids), before(ids)
    present = sorted({feature for some in chosen for feature in some})
    return FeatureSweep(
        card=adapter.card,
        prompts=tuple(coded),
        positions=tuple(where),
        sae=sae.name,
        site=sae.out,
        change=change,
        strengths=strengths,
        rows=at,
        features=torch.tensor([feature for some in chosen for feature in some]),
        activations=later(_largest, sae, seen, chosen),
        kl=after(kl),
        token_ids=token_ids,
        logprobs=after(logprobs),
        plain_ids=plain_ids,
        plain_logprobs=before(logprobs),
        wanted=wanted_words(adapter, tokens),
        wanted_logprobs=before(said),
        changes=after(said) - before(said)[at][:, None],
        vocab=later(vocabulary, adapter, token_ids, plain_ids),
        labels=sae.labels_of(present),
        links=sae.links_of(present),
        settings={},
    )


def features_of(sae: AttachedSAE, features: Any, n: int) -> list[tuple[int, ...]] | None:
    """The features of each of `n` prompts; None: those which are active."""
    if isinstance(features, str):
        if features not in ("all", "active"):
            raise EditError(f"features={features!r}", "", "use 'all' or 'active', a list, or a list for each prompt")
        if features == "all":
            return [tuple(range(sae.n_features))] * n
        if sae.model.remote:
            raise Refused(
                "features that are active, or matter most, in a remote model",
                "which they are is known when the job is done",
                "list them: features=[...], for each prompt if you like; feature_sweep also takes 'all', and feature_attribution "
                "exact=False says which",
            )
        return None
    if (
        isinstance(features, (list, tuple))
        and features
        and all(isinstance(some, (list, tuple, Tensor)) and getattr(some, "shape", (1,)) for some in features)
    ):
        if len(features) != n:
            raise DataError(
                f"{len(features)} lists of features for {n} prompts", "each prompt has its own", "give one list, or one for each prompt"
            )
        found = [sae.chosen(some) for some in features]
    else:
        found = [sae.chosen(features)] * n
    if not any(found):
        raise DataError("no features", "there is nothing to look at", "give at least one")
    return found


def _most(sae: AttachedSAE, states: Tensor) -> Tensor:
    """The largest activation of each feature in states of one prompt, `[d_sae]`."""
    return torch.stack([sae.encode(some).amax(0) for some in states.split(CHUNK)]).amax(0).cpu()


def _largest(sae: AttachedSAE, seen: Sequence[Tensor], chosen: Sequence[Sequence[int]]) -> Tensor:
    return torch.cat([_most(sae, states)[list(some)] for states, some in zip(seen, chosen, strict=True)])


def _active(sae: AttachedSAE, seen: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """The features that are active in each prompt; in a plan, all."""
    if cost.account() is not None:
        return [tuple(range(sae.n_features))] * len(seen)
    found = [tuple(_most(sae, states).nonzero()[:, 0].tolist()) for states in seen]
    if not any(found):
        raise DataError("no feature is active at these tokens", "there is nothing to change", "use features='all', a list, or other tokens")
    return found


def _beside_plain(adapter: Adapter, changed: Sequence[Tensor], plain: Tensor, wanted: Tensor, k: int) -> tuple[list[Tensor], ...]:
    """Of each prompt the divergence, likeliest tokens, their log-probabilities and those of wanted tokens, of its changed states `[rows,
    d_model]` and, last, of the plain one."""
    alike: dict[int, list[int]] = defaultdict(list)
    for i, states in enumerate(changed):
        alike[len(states)].append(i)
    found: list[Any] = [None] * len(changed)
    for some in alike.values():
        states = torch.stack([torch.cat([changed[i], plain[i : i + 1]]) for i in some])
        said = adapter.lens(states, k=k, tokens=wanted[some])
        for at, i in enumerate(some):
            found[i] = [x[at] for x in (said.kl, said.topk_ids, said.topk_logprobs, said.token_logprobs)]
    return tuple(list(column) for column in zip(*found, strict=True))
