"""How much each feature of a sparse autoencoder, at each token, adds to an answer: by gradients for all features at once, and by taking
features out one at a time.

An attribution is a feature's activation times the derivative of the answer's log-probability by it: what taking it out would cost if the
model above were linear. It costs one backward pass for all features; how far it can be believed is seen beside the exact effects of the
largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hookbook.asking import above, answers_asked, gradients
from hookbook.errors import DataError, TokenError, check_counts, check_prompt
from hookbook.recipe import ModelCard, later, recipe
from hookbook.recipes.features.decomposition import about, feature_names
from hookbook.recipes.features.effects import CHUNK, features_of
from hookbook.reply import Reply
from hookbook.request import Readout, Request, Row
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.sae import AttachedSAE, checked
from hookbook.show.plots import COLOURS, drawing, token_values
from hookbook.show.tidy import at_tokens, tidy
from hookbook.sites import Site
from hookbook.tokens import Position, Tokens, resolve
from hookbook.travel.features import sized

Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class FeatureAttribution(Result):
    """What `m` active features, each at one token of one of `n` prompts, add to the metric: the answer's log-probability, or by how much
    its logit is above another answer's."""

    card: ModelCard
    prompts: tuple[Tokens, ...]
    """`[n]`"""
    answers: tuple[str, ...]
    """`[n]`"""
    others: tuple[str, ...]
    """`[n]`: the answers to compare with; empty without."""
    metric: Tensor
    """`[n]`: of the plain runs, in nats."""
    sae: str
    site: Site
    """What features write to."""
    rows: Tensor
    """`[m]`: the prompt."""
    positions: Tensor
    """`[m]`: the token."""
    features: Tensor
    """`[m]`: the feature."""
    activations: Tensor
    """`[m]`"""
    gradients: Tensor
    """`[m]`: the metric's derivative by the activation, with what the SAE does not reconstruct held fixed."""
    attributions: Tensor
    """`[m]`: activation times gradient."""
    effects: Tensor
    """`[m]`: the metric of the plain run minus that with the feature at 0 at this token; NaN where it was not measured."""
    error_rows: Tensor
    """`[t]`: of every token that was looked at, the prompt."""
    error_positions: Tensor
    """`[t]`: and the token."""
    errors: Tensor
    """`[t]`: the attribution of what the SAE does not reconstruct there: the gradient with respect to the site times this error."""
    labels: dict[int, str]
    """What features were said to be about."""
    links: dict[int, str]
    """Their pages on Neuronpedia."""
    settings: dict[str, Any]

    def correlation(self) -> float:
        """Pearson's, of attributions and exact effects; NaN of fewer than two."""
        known = ~self.effects.isnan()
        if int(known.sum()) < 2:
            return float("nan")
        return float(torch.corrcoef(torch.stack([self.attributions[known], self.effects[known]]).double())[0, 1])

    def to_frame(self) -> DataFrame:
        """One row for each prompt, token and active feature: `prompt`, `position`, `position_token`, `feature`, `activation`, `gradient`,
        `attribution`, `effect`, `label`, `link`."""
        return tidy(
            {"prompt position position_token": at_tokens(self.prompts, self.rows, self.positions)},
            feature=self.features,
            activation=self.activations,
            gradient=self.gradients,
            attribution=self.attributions,
            effect=self.effects,
            **about(self.features, self.labels, self.links),
        )

    def top(self, n: int = 20, by: Literal["attribution", "effect"] = "attribution") -> DataFrame:
        """The `n` rows of `to_frame()` that add or take away most."""
        if by not in ("attribution", "effect"):
            raise DataError(f"by={by!r}", "", "use 'attribution' or 'effect'")
        return self.to_frame().sort_values(by, key=lambda x: -x.abs(), kind="stable", ignore_index=True).head(n)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Attributions against exact effects, with the line on which they agree; without exact effects, in order of size."""
        known = ~self.effects.isnan()
        correlation = f", correlation {self.correlation():.2f}" if known.any() else ""
        with drawing(ax, (5, 4.5), f"Attribution to features, {self.card.model_id}{correlation}") as ax:
            if known.any():
                ax.axline((0, 0), slope=1, color="0.5", linewidth=1, linestyle="--")
                ax.scatter(self.effects[known].tolist(), self.attributions[known].tolist(), s=12, color=COLOURS[0])
                ax.set_xlabel("exact effect (nats)")
            else:
                ax.plot(self.attributions.sort(descending=True).values.tolist(), color=COLOURS[0])
                ax.set_xlabel("features at tokens, by attribution")
            ax.set_ylabel("attribution (nats)")
        return ax

    def view(self, *, prompt: int = 0, k: int = 20) -> View:
        """An interactive picture (circuitsvis): choose one of the `k` features that matter most in a prompt, see its attributions to the
        tokens. Below, `top(50)`."""
        prompt = check_prompt(prompt, len(self.prompts))
        mine = self.rows == prompt
        tokens, (chosen, where) = self.prompts[prompt].strings, self.features[mine].unique(return_inverse=True)
        values = torch.zeros(len(tokens), len(chosen), dtype=torch.float64)
        values[self.positions[mine], where] = self.attributions[mine].double()
        best = values.abs().sum(0).argsort(descending=True)[:k]
        table = View.table(self.top(50), "The largest attributions")
        return token_values(tokens, values[:, best], feature_names(chosen[best].tolist(), self.labels)) + table if len(best) else table


@recipe
def feature_attribution(
    sae: AttachedSAE,
    prompts: Any,
    *,
    answer: str | int | Sequence[str | int],
    other: str | int | Sequence[str | int] | None = None,
    features: Literal["all", "active"] | Sequence[int] | Sequence[Sequence[int]] = "active",
    position: Position | None = None,
    exact: bool = True,
    top: int = 50,
    progress: bool | None = None,
) -> FeatureAttribution:
    """Attribute an answer to features.

    Args:
        sae: What `hookbook.sae.attach` gave.
        prompts: A prompt, or a list of prompts.
        answer: The next token, as a text that follows the prompt (usually with a leading space) or an id; or one for each prompt.
        other: Another one. The metric is then how much the answer's logit is above its; without it, the answer's log-probability.
        features: `"active"` and `"all"`: every feature that is active; a list, or a list for each prompt: these, where they are active.
        position: The tokens to look at; None: all but special ones, on which activations mean nothing.
        exact: Also measure the effect of taking features out.
        top: Of how many in each prompt, those with the largest attributions; of listed features, all.
        progress: Show a progress bar; None: for long work only.

    Returns:
        A `FeatureAttribution`. At each token the attributions, the error's, and the gradient times the decoder's bias add up to the
        gradient times the state (for an SAE that does not normalise its input).

    Raises:
        ModelError: `sae` is not attached to a model.
        DataError: Numbers of answers or lists that are not the prompts'; no feature is active.
        TokenError: An answer is not one token; no token is left.
        Refused: Exact effects of the largest in a remote model, which is not known before its job is done: list features, or leave `exact`
            out; no gradients; an SAE whose features cannot be changed inside the model.

    Source: Marks et al. 2024, arXiv:2403.19647, section 3.1, attribution patching with a baseline of zero; the SAE's error is held fixed
    and has an attribution of its own, as there.

    Differs: one site is looked at, not a circuit of several, and the exact effect of the largest features is measured beside.

    Example:
        found = hb.feature_attribution(sae, "The capital of France is", answer=" Paris", other=" Rome")
        found.top(10)
    """
    sae = checked(sae)
    adapter = sae.model
    code = sae.weights
    coded = sae.encode_prompts(prompts)
    check_counts(top=top)
    wanted, said = answers_asked(adapter, coded, answer, other)
    where = [_where(sae, prompt, position) for prompt in coded]
    everything = isinstance(features, str)
    listed = None if everything and not (exact and adapter.remote) else features_of(sae, "active" if everything else features, len(coded))

    metric, (old, seen), (slopes,) = gradients(
        adapter, coded, where, [sae.out], lambda some: Readout(tokens=wanted[some]), _metric, beside=[sae.site], progress=progress
    )
    found = later(_found, sae, code, seen, slopes, where, listed)
    pairs: list[tuple[int, int, int]] = []
    if exact:
        pairs = _pairs(found, where, listed, top, sae.n_features)
        edits = {pair[1:]: sae.edit(pair[2], to=0.0, position=pair[1]) for pair in pairs}
        rows = [Row(pair[0], (edits[pair[1:]],)) for pair in pairs]
        without = adapter.run(Request(coded, rows, (), Readout(tokens=wanted[[pair[0] for pair in pairs]])), progress=progress)
        effects = metric[[pair[0] for pair in pairs]] - _metric(without)
    else:
        effects = metric[:0]
    at = [(i, position) for i, some in enumerate(where) for position in some]
    active_features = later(_column, found, 2)
    return FeatureAttribution(
        card=adapter.card,
        prompts=tuple(coded),
        answers=said[0],
        others=said[1] if len(said) > 1 else (),
        metric=metric,
        sae=sae.name,
        site=sae.out,
        rows=later(_column, found, 0),
        positions=later(_column, found, 1),
        features=active_features,
        activations=later(_column, found, 3),
        gradients=later(_column, found, 4),
        attributions=later(_attributions, found),
        effects=later(_placed, found, pairs, effects),
        error_rows=torch.tensor([i for i, _ in at]),
        error_positions=torch.tensor([position for _, position in at]),
        errors=later(_errors, sae, seen, old, slopes),
        labels=later(AttachedSAE.labels_of, sae, active_features),
        links=later(AttachedSAE.links_of, sae, active_features),
        settings={"metric": "logit difference" if other is not None else "log-probability"},
    )


def _where(sae: AttachedSAE, prompt: Tokens, position: Position | None) -> list[int]:
    if position is not None:
        return sorted(set(resolve(position, prompt)))
    found = [i for i, token in enumerate(prompt.ids) if token not in sae.special]
    if not found:
        raise TokenError(
            f"only special tokens in {prompt.text!r}", "activations on them mean nothing", "give a longer prompt, or position="
        )
    return found


def _metric(reply: Reply) -> Tensor:
    """`[row]`: the first wanted token's log-probability, less the second's if there is one."""
    return above(reply.said.token_logprobs)


def _found(sae: AttachedSAE, code: dict[str, Any], seen: Tensor, slopes: Tensor, where: Sequence[Sequence[int]], listed: Any) -> Found:
    """Prompt, token and feature wherever one is active, its activation, and the metric's derivative by it."""
    at = torch.tensor([(i, position) for i, some in enumerate(where) for position in some])
    columns: list[tuple[Tensor, ...]] = []
    for start in range(0, len(at), CHUNK):
        here, states, slope = at[start : start + CHUNK], seen[start : start + CHUNK], slopes[start : start + CHUNK]
        acts = sae.encode(states).to(slope).cpu()
        if listed is not None:
            kept = torch.zeros_like(acts, dtype=torch.bool)
            for line, (i, _) in zip(kept, here.tolist(), strict=True):
                line[list(listed[i])] = True
            acts = acts * kept
        tokens, features = acts.nonzero().unbind(1)
        size = torch.as_tensor(sized(states, code["norm"])[1], dtype=slope.dtype).expand(len(states), 1)
        by = (slope * size) @ code["writes"].to(slope).mT
        columns.append((*here[tokens].unbind(1), features, acts[tokens, features], by[tokens, features]))
    rows, positions, features, acts, by = (torch.cat(column) for column in zip(*columns, strict=True))
    if not len(rows):
        raise DataError("no feature is active at these tokens", "there is nothing to attribute to", "use other tokens or features")
    return rows, positions, features, acts, by


def _pairs(found: Any, where: Sequence[Sequence[int]], listed: Any, top: int, n_features: int) -> list[tuple[int, int, int]]:
    """Whose effects are measured: prompt, token and feature. Before it is known what is active, every listed feature at every token."""
    if isinstance(found, tuple):
        rows, positions, features, *_ = found
        if listed is None:
            size, chosen = _attributions(found).abs(), []
            for i in range(len(where)):
                mine = (rows == i).nonzero()[:, 0]
                chosen.append(mine[size[mine].topk(min(top, len(mine))).indices])
            rows, positions, features = (x[torch.cat(chosen)] for x in (rows, positions, features))
        return list(zip(rows.tolist(), positions.tolist(), features.tolist(), strict=True))
    if listed is None:  # a plan
        return [(i, some[-1], feature) for i, some in enumerate(where) for feature in range(min(top, n_features))]
    return [(i, position, feature) for i, some in enumerate(where) for position in some for feature in listed[i]]


def _column(found: Found, at: int) -> Tensor:
    return found[at]


def _attributions(found: Found) -> Tensor:
    return found[3] * found[4]


def _placed(found: Found, pairs: Sequence[tuple[int, int, int]], effects: Tensor) -> Tensor:
    """The effect of each entry; NaN where none was measured."""
    known = dict(zip(pairs, effects.tolist(), strict=True))
    entries = zip(*(column.tolist() for column in found[:3]), strict=True)
    return torch.tensor([known.get(entry, float("nan")) for entry in entries], dtype=found[3].dtype)


def _errors(sae: AttachedSAE, seen: Tensor, old: Tensor, slopes: Tensor) -> Tensor:
    made = torch.cat([sae.reconstruct(some) for some in seen.split(CHUNK)]).to(old)
    return ((old - made) * slopes).sum(-1)
