"""What every neuron does to the next token: each taken out alone, as forks of one pass for each prompt.

A gradient finds neurons that matter and misjudges how much; activations say what a neuron sees, not what the model does with it. Here each
neuron is really taken out, all of a model in one call.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookbook.asking import encode_prompts, wanted_ids, wanted_words
from hookbook.errors import DataError, TokenError, check_counts, check_prompt
from hookbook.recipe import ModelCard, later, recipe, wrap
from hookbook.recipes.neurons.ablation import Ablation, ablated, neuron_sites, set_to
from hookbook.request import Each, Edit, Read, Readout, Request, Row
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.show.plots import bars
from hookbook.show.text import ending
from hookbook.show.tidy import Over, each, spelled, tidy
from hookbook.sites import Site
from hookbook.tokens import Position, Tokens, resolve, vocabulary


@dataclass(frozen=True, eq=False)
class NeuronSweep(Result):
    """What `m` neurons, each taken out alone, do to the next token of `n` prompts."""

    card: ModelCard
    prompts: tuple[Tokens, ...]
    """`[n]`"""
    positions: tuple[tuple[int, ...], ...]
    """`[n]`: the tokens of each prompt at which neurons were taken out."""
    layers: Tensor
    """`[m]`"""
    neurons: Tensor
    """`[m]`: in their layers."""
    values: Tensor
    """`[m]`: what each was set to."""
    activations: Tensor
    """`[n, m]`: what it is in the plain run; of several tokens the one of largest size."""
    wanted: tuple[str, ...]
    """The tokens asked for."""
    wanted_logits: Tensor
    """`[n, wanted]`: of the plain run."""
    changes: Tensor
    """`[n, m, wanted]`: how much these logits grow without the neuron; where they fall, it was for the token."""
    kl: Tensor
    """`[n, m]`: KL(plain || changed) of the next token's distributions, in nats; empty if they were not asked for."""
    token_ids: Tensor
    """`[n, m]`: the likeliest next token; empty like these."""
    plain_ids: Tensor
    """`[n]`: the likeliest next token of the plain run; empty like these."""
    vocab: dict[int, str]
    """The text of every token id in this result."""
    settings: dict[str, Any]

    @property
    def names(self) -> list[str]:
        """Of each neuron, such as `mlp_act.25.1120`."""
        return [f"mlp_act.{layer}.{neuron}" for layer, neuron in zip(self.layers.tolist(), self.neurons.tolist(), strict=True)]

    def to_frame(self) -> DataFrame:
        """One row for each prompt and neuron.

        Columns: `prompt`, `site`, `layer`, `unit`, `activation` (before), for each wanted token `t` `logit_change t`; and of whole
        distributions `kl`, `plain_token` and `token` (the likeliest next one before and after).
        """
        sites = [("mlp_act", *at) for at in zip(self.layers.tolist(), self.neurons.tolist(), strict=True)]
        said: dict[str, Any] = {}
        if self.kl.numel():
            plain = Over("prompt", spelled(self.plain_ids, self.vocab))
            said = {"kl": self.kl, "plain_token": plain, "token": spelled(self.token_ids, self.vocab)}
        return tidy(
            {"prompt": self.prompts, "site layer unit": sites},
            activation=self.activations,
            **each("logit_change", self.wanted, "prompt site", self.changes),
            **said,
        )

    def top(self, n: int = 20, by: str | None = None) -> DataFrame:
        """The `n` rows of `to_frame()` with the most.

        Args:
            n: How many.
            by: `"kl"`, `"activation"`, or a wanted token: how far its logit moves, up or down. None: the first token, or else `kl`.
        """
        check_counts(0, n=n)
        by = self._by(by, ("kl", "activation") if self.kl.numel() else ("activation",))
        column = by if by in ("kl", "activation") else f"logit_change {by}"
        return self.to_frame().sort_values(column, key=lambda x: -x.abs(), kind="stable", ignore_index=True).head(n)

    def plot(self, ax: Axes | None = None, *, prompt: int = 0, n: int = 20, value: str | None = None) -> Axes:
        """The neurons that do most after a prompt, and what half of all neurons stay below.

        Args:
            ax: Where to draw; None: a new figure.
            prompt: Which prompt.
            n: How many neurons.
            value: `"kl"`, or a wanted token: the change of its logit. None: as `top`.
        """
        value = self._by(value, ("kl",) if self.kl.numel() else ())
        prompt = check_prompt(prompt, len(self.prompts))
        values = self.kl[prompt] if value == "kl" else self.changes[prompt, :, self.wanted.index(value)]
        best = values.abs().topk(min(n, len(values))).indices
        what = "KL(plain || changed), nats" if value == "kl" else f"change of the logit of {value!r} without it"
        names = [self.names[i].removeprefix("mlp_act.") for i in best.tolist()]
        title = f"Neurons that do most, {ending(self.prompts[prompt].text, 60)!r}, {self.card.model_id}"
        return bars(
            ax, names, values[best], f"{what}; half of {len(values):,} move it by less than {float(values.abs().median()):.1g}", title=title
        )

    def view(self) -> View:
        """The table of `top(50)`."""
        return View.table(self.top(50), "What does most")

    def _by(self, by: str | None, others: tuple[str, ...]) -> str:
        known = [*self.wanted, *others]
        if by is not None and by not in known:
            raise TokenError(f"by {by!r}", "", f"use one of {', '.join(known)}")
        return known[0] if by is None else by


@recipe
def neuron_sweep(
    model: Any,
    prompts: Any,
    tokens: Sequence[str | int] = (),
    *,
    layers: Any = "all",
    position: Position = -1,
    ablate: Ablation = "zero",
    reference: Any = None,
    distribution: bool = False,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> NeuronSweep:
    """Take out one neuron at a time, and look at the next token: exactly, for every neuron.

    A neuron is one number of an MLP's hidden layer, after its activation function (of a gated MLP, times the gate): `mlp_act`.

    Args:
        model: Any model `hookbook.wrap` takes.
        prompts: A prompt, or a list of prompts.
        tokens: Next tokens whose logits are wanted: texts as they follow the prompts, usually with a leading space, or ids. Only these
            words' rows of the unembedding are computed.
        layers: `"all"`; layers; or single neurons, `"mlp_act.25.1120"`.
        position: The token or tokens of each prompt at which each is taken out.
        ablate: What it is set to: `"zero"`; a number; `"mean"`, over the tokens of `reference`; `"resample"`, its value at one of them,
            drawn for each neuron. The mean leaves less of what a network has never seen than zero does.
        reference: Texts for these, of all whose tokens but special ones count.
        distribution: Also the divergence of the whole distribution and the likeliest token; of a large vocabulary that is most of the time.
        seed: Of the draws.
        progress, checkpoint: See `hookbook.patchscope`.

    Returns:
        A `NeuronSweep`.

    Raises:
        DataError: Nothing is asked about the next token; an unknown ablation, or texts that are missing or not used.
        SiteError: A site that is not `mlp_act`, or not in the model.
        TokenError: A token or position cannot be used.
        Refused: The model has no neurons that can be edited.

    Source: ablation of single units by zero, mean and resampled values as in Chan et al. 2022, "Causal scrubbing", and Wang et al. 2023,
        arXiv:2211.00593, section 2; there of heads.

    Differs: neurons, all of them, at chosen tokens, by logits of chosen words where the papers compare one metric.

    Example:
        sweep = hb.neuron_sweep(model, "The capital of France is", [" Paris", " Rome"])
        sweep.top(10, by=" Paris")
    """
    adapter = wrap(model)
    coded = encode_prompts(adapter, prompts)
    sites = neuron_sites(layers, adapter.card, single=True)
    wanted = wanted_ids(adapter, coded, tokens)
    if not wanted.numel() and not distribution:
        raise DataError(
            "a sweep that asks nothing", "neither tokens nor distribution= is given", "give tokens=[' word'], or distribution=True"
        )
    where = [tuple(resolve(position, prompt)) for prompt in coded]
    whole = [Site("mlp_act", layer) for layer in dict.fromkeys(site.layer for site in sites)]
    places = {site.layer: i for i, site in enumerate(whole)}
    units = [(site.layer, range(adapter.card.d_mlp) if site.unit is None else [site.unit]) for site in sites]
    chosen = list(dict.fromkeys((layer, i) for layer, some in units for i in some))
    for site in whole:
        adapter.require(site)
    values = ablated(adapter, whole, ablate, reference, seed, progress)

    end = [Read(Site("resid_post", adapter.card.n_layers - 1))] if distribution else []
    at = Each(tuple(map(list, where)))
    said = Readout(token_logits=wanted) if wanted.numel() else None
    n, m = len(coded), len(chosen)
    plain = adapter.run(Request(coded, [Row(i) for i in range(n)], [*(Read(site, at) for site in whole), *end], said), progress=progress)
    given = set_to(values, [(places[layer], i) for layer, i in chosen])
    edits = [(Edit(Site("mlp_act", layer, i), value, "set", position),) for (layer, i), value in zip(chosen, given, strict=True)]
    rows = [Row(i, edit) for i in range(n) for edit in edits]
    asked = None if said is None else Readout(token_logits=wanted.repeat_interleave(m, 0))
    changed = adapter.run(Request(coded, rows, end, asked), progress=progress, checkpoint=checkpoint)

    before, after = torch.empty(n, 0), torch.empty(n * m, 0)
    if said is not None:
        before, after = (reply.said.token_logits for reply in (plain, changed))
        assert before is not None and after is not None
    kl = token_ids = plain_ids = torch.empty(0)
    if distribution:
        states = torch.cat([changed.readings[0].values.unflatten(0, (n, m)), plain.readings[-1].values[:, None]], 1)
        found = adapter.lens(states, k=1)
        kl, token_ids, plain_ids = found.kl[:, :-1], found.topk_ids[:, :-1, 0], found.topk_ids[:, -1, 0]
    layer_of, neuron_of = torch.tensor(chosen).unbind(1)
    index = torch.tensor([places[layer] for layer, _ in chosen]), neuron_of
    return NeuronSweep(
        card=adapter.card,
        prompts=tuple(coded),
        positions=tuple(where),
        layers=layer_of,
        neurons=neuron_of,
        values=torch.stack(values)[index].float(),
        activations=later(_largest, [reading.values for reading in plain.readings[: len(whole)]], where, index),
        wanted=wanted_words(adapter, tokens),
        wanted_logits=before,
        changes=after.unflatten(0, (n, m)) - before[:, None],
        kl=kl,
        token_ids=token_ids,
        plain_ids=plain_ids,
        vocab=later(vocabulary, adapter, token_ids, plain_ids) if distribution else {},
        settings={},
    )


def _largest(readings: Sequence[Tensor], where: Sequence[Sequence[int]], index: tuple[Tensor, Tensor]) -> Tensor:
    """`[n, m]`: of each prompt and neuron the activation of largest size."""
    each_prompt = torch.stack([x.cpu().to(torch.promote_types(x.dtype, torch.float32)) for x in readings], 1).split(
        [len(some) for some in where]
    )
    found = torch.stack([x.gather(0, x.abs().argmax(0, keepdim=True))[0] for x in each_prompt])  # [prompt, layer, neuron]
    return found[:, index[0], index[1]]
