"""Which neurons an answer hangs on, by one gradient for all of them, beside what taking out the largest and random ones really does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hookbook.asking import above, answers_asked, encode_prompts, gradients
from hookbook.errors import DataError, Refused, TokenError, check_counts
from hookbook.recipe import ModelCard, later, recipe, wrap
from hookbook.recipes.neurons.ablation import counted, neuron_sites
from hookbook.reply import Reply
from hookbook.request import Edit, Readout, Request, Row
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.show.plots import COLOURS, drawing
from hookbook.show.tidy import tidy
from hookbook.sites import Site
from hookbook.tokens import Position, Tokens, resolve

Metric = Literal["logit", "logprob", "probability"]


@dataclass(frozen=True, eq=False)
class NeuronAttribution(Result):
    """What every neuron of `l` layers, at each of `t` tokens of `n` prompts, adds to the metric by its gradient; and of `e` of them, the
    largest of each prompt and random ones, what it really adds."""

    card: ModelCard
    prompts: tuple[Tokens, ...]
    """`[n]`"""
    answers: tuple[str, ...]
    """`[n]`"""
    others: tuple[str, ...]
    """`[n]`: the answers to compare with; empty without."""
    of: str
    """What is measured of the answer: `logit`, `logprob` or `probability`, less the other's."""
    metric: Tensor
    """`[n]`: of the plain runs; in logits, nats, or a probability."""
    layers: tuple[int, ...]
    """`[l]`"""
    token_rows: Tensor
    """`[t]`: the prompt of each token that was looked at."""
    token_positions: Tensor
    """`[t]`: and its place there."""
    activations: Tensor
    """`[t, l, neuron]`"""
    gradients: Tensor
    """`[t, l, neuron]`: the metric's derivative by the activation."""
    entries: Tensor
    """`[e, 3]`: token, layer and neuron, as places in these; of each prompt first the largest attributions."""
    drawn: Tensor
    """`[e]`: whether it was drawn at random instead."""
    effects: Tensor
    """`[e]`: the metric of the plain run less that with the neuron at 0 at this token; NaN if it was not measured."""
    settings: dict[str, Any]

    @property
    def attributions(self) -> Tensor:
        """`[t, l, neuron]`: activation times gradient."""
        return self.activations * self.gradients

    def correlation(self, of: Literal["largest", "drawn"] = "largest", *, ranks: bool = False) -> float:
        """Pearson's of attributions and effects, or of their ranks (Spearman's); NaN of fewer than two.

        Args:
            of: The largest attributions, which are where a gradient is least reliable, or those drawn at random.
            ranks: Whether of their ranks.
        """
        if of not in ("largest", "drawn"):
            raise DataError(f"of={of!r}", "", "use 'largest' or 'drawn'")
        frame: Any = self.to_frame()
        mine = frame.loc[(frame.control == "random") == (of == "drawn"), ["attribution", "effect"]].dropna()
        mine = mine.rank() if ranks else mine
        return float(mine.attribution.corr(mine.effect)) if len(mine) > 1 else float("nan")

    def to_frame(self) -> DataFrame:
        """One row for each entry: `prompt`, `position`, `position_token`, `site`, `layer`, `unit`, `activation`, `gradient`, `attribution`,
        `effect`, `control` (`largest` or `random`)."""
        tokens, layers, neurons = self.entries.unbind(1)
        rows, positions = self.token_rows[tokens].tolist(), self.token_positions[tokens].tolist()
        at = (tokens, layers, neurons)
        where = [
            (self.prompts[row], p, self.prompts[row].strings[p], "mlp_act", self.layers[layer], neuron)
            for row, p, layer, neuron in zip(rows, positions, layers.tolist(), neurons.tolist(), strict=True)
        ]
        return tidy(
            {"prompt position position_token site layer unit": where},
            activation=self.activations[at],
            gradient=self.gradients[at],
            attribution=self.attributions[at],
            effect=self.effects,
            control=["random" if drawn else "largest" for drawn in self.drawn.tolist()],
        )

    def top(self, n: int = 20, by: Literal["attribution", "effect"] = "attribution") -> DataFrame:
        """The `n` rows of `to_frame()` that add or take away most."""
        if by not in ("attribution", "effect"):
            raise DataError(f"by={by!r}", "", "use 'attribution' or 'effect'")
        return self.to_frame().sort_values(by, key=lambda x: -x.abs(), kind="stable", ignore_index=True).head(n)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Attributions against exact effects, with the line on which they agree; without exact effects, how much of all attribution lies
        in each layer."""
        known = not bool(self.effects.isnan().all())
        words = f", correlation of the largest {self.correlation():.2f}" if known else ""
        with drawing(ax, (5, 4.5), f"Attribution to neurons, {self.card.model_id}{words}") as ax:
            if known:
                attributed = self.attributions[self.entries.unbind(1)]
                ax.axline((0, 0), slope=1, color="0.5", linewidth=1, linestyle="--")
                for drawn, name in ((False, "largest"), (True, "random")):
                    mine = self.drawn == drawn
                    ax.scatter(self.effects[mine].tolist(), attributed[mine].tolist(), s=12, color=COLOURS[int(drawn)], label=name)
                ax.legend()
                ax.set_xlabel(f"exact effect ({self.of})")
                ax.set_ylabel(f"attribution ({self.of})")
            else:
                sizes = self.attributions.abs().sum((0, 2))
                ax.bar([str(layer) for layer in self.layers], (sizes / sizes.sum()).tolist(), color=COLOURS[0])
                ax.set_xlabel("layer")
                ax.set_ylabel("share of the size of all attributions")
        return ax

    def view(self) -> View:
        """The table of `top(50)`."""
        return View.table(self.top(50), "The largest attributions")


@recipe
def neuron_attribution(
    model: Any,
    prompts: Any,
    answer: str | int | Sequence[str | int],
    other: str | int | Sequence[str | int] | None = None,
    *,
    of: Metric = "logit",
    layers: Any = "all",
    position: Position | None = None,
    exact: bool = True,
    top: int = 50,
    random: int = 50,
    seed: int = 0,
    progress: bool | None = None,
) -> NeuronAttribution:
    """Attribute an answer to every neuron at every token, by one backward pass: activation times gradient.

    A gradient finds the neurons that matter and is unreliable about how much: for sizes, `hookbook.neuron_sweep`.

    Args:
        model: Any model `hookbook.wrap` takes.
        prompts: A prompt, or a list of prompts.
        answer: The next token, as a text that follows the prompt (usually with a leading space) or an id; or one for each prompt.
        other: Another one, which the answer is compared with.
        of: What is measured: the answer's `"logit"`, `"logprob"` or `"probability"`, less the other's. A probability near 1 has hardly a
            gradient left; log-probability ranks neurons as probability does, and is as flat there. A difference of logits is that of
            log-probabilities.
        layers: `"all"`, or some.
        position: The tokens to look at; None: all but special ones, on which activations mean nothing.
        exact: Also measure what taking a neuron out does, of some.
        top: Of how many in each prompt, those with the largest attributions.
        random: And of how many that are drawn.
        seed: Of the draws.
        progress: Show a progress bar; None: for long work only.

    Returns:
        A `NeuronAttribution`.

    Raises:
        DataError: Numbers of answers that are not the prompts'; an unknown metric.
        SiteError: A site that is not a whole `mlp_act`, or not in the model.
        TokenError: An answer is not one token; no token is left.
        Refused: Exact effects of the largest in a remote model, which are not known before its job is done; no gradients; no neurons.

    Source: gradient times activation as in Transluce's Monitor, "Monitor: an AI-driven observability interface" (2024), which takes the
        probability; captum calls it LayerGradientXActivation.

    Differs: logits by default, because of saturation; signed; special tokens are left out; exact effects beside.

    Example:
        found = hb.neuron_attribution(model, "The capital of France is", " Paris", " Rome")
        found.top(10), found.correlation(), found.correlation("drawn")
    """
    adapter = wrap(model)
    coded = encode_prompts(adapter, prompts)
    if of not in get_args(Metric):
        raise DataError(f"of={of!r}", "", f"use {', '.join(get_args(Metric))}")
    check_counts(0, top=top, random=random)
    sites = neuron_sites(layers, adapter.card)
    if exact and top and adapter.remote:
        why = "which are largest is known when the job is done"
        raise Refused(
            "exact effects of neurons in a remote model", why, "give exact=False, or top=0, and hb.neuron_sweep of those that it names"
        )
    for site in sites:
        adapter.require(site)
    wanted, said = answers_asked(adapter, coded, answer, other)
    where = [counted(adapter, tokens) if position is None else sorted(set(resolve(position, tokens))) for tokens in coded]
    if not all(where):
        alone = coded[next(i for i, some in enumerate(where) if not some)].text
        raise TokenError(f"only special tokens in {alone!r}", "activations on them mean nothing", "give a longer prompt, or position=")

    ask, measure = _measures(of, wanted)
    metric, values, slopes = gradients(adapter, coded, where, sites, ask, measure, progress=progress)
    activations, slope = torch.stack(values, 1), torch.stack(slopes, 1)
    tokens = torch.tensor([(i, p) for i, some in enumerate(where) for p in some])
    sizes, shape = [len(some) for some in where], (len(sites), adapter.card.d_mlp)
    chosen = later(_entries, activations * slope, sizes, top, random, seed)
    drawn = torch.tensor([x for size in sizes for x in _kinds(size * shape[0] * shape[1], top, random)])
    effects = torch.full((len(drawn),), float("nan"))
    if exact and len(drawn):
        known = _entries(torch.zeros(len(tokens), *shape), sizes, top, random, seed, first=True)  # in a plan; or if none is largest
        listed = chosen if isinstance(chosen, Tensor) else known
        at = tokens[listed[:, 0]].tolist()
        rows = [
            Row(i, (Edit(Site("mlp_act", sites[layer].layer, neuron), 0.0, "set", p),))
            for (i, p), (_, layer, neuron) in zip(at, listed.tolist(), strict=True)
        ]
        of_row = [i for i, _ in at]
        effects = metric[of_row] - measure(adapter.run(Request(coded, rows, (), ask(of_row)), progress=progress))
    return NeuronAttribution(
        card=adapter.card,
        prompts=tuple(coded),
        answers=said[0],
        others=said[1] if len(said) > 1 else (),
        of=of,
        metric=metric,
        layers=tuple(int(site.layer) for site in sites if site.layer is not None),
        token_rows=tokens[:, 0],
        token_positions=tokens[:, 1],
        activations=activations,
        gradients=slope,
        entries=chosen,
        drawn=drawn,
        effects=effects,
        settings={},
    )


def _measures(of: str, wanted: Tensor) -> tuple[Callable[[list[int]], Readout], Callable[[Reply], Tensor]]:
    """What is asked about the next token of some prompts, and the metric of the answer."""

    def measure(reply: Reply) -> Tensor:
        said = reply.said
        if of != "logit":
            return above(said.token_logprobs if of == "logprob" else said.token_logprobs.exp())
        assert said.token_logits is not None
        return above(said.token_logits)

    return lambda some: Readout(token_logits=wanted[some]) if of == "logit" else Readout(tokens=wanted[some]), measure


def _kinds(n: int, top: int, random: int) -> list[bool]:
    """Of the entries of a prompt with `n` in all, whether each was drawn."""
    largest = min(top, n)
    return [False] * largest + [True] * min(random, n - largest)


def _entries(attributions: Tensor, sizes: Sequence[int], top: int, random: int, seed: int, first: bool = False) -> Tensor:
    """`[e, 3]`: of each prompt the largest attributions, and others that are drawn; `first`: instead of the largest the first ones, which
    cost most."""
    generator, found, start = torch.Generator().manual_seed(seed), [], 0
    for size in sizes:
        values = attributions[start : start + size]
        n = min(top, values.numel())
        largest = torch.arange(n) if first else values.abs().flatten().topk(n).indices
        shuffled = torch.randperm(values.numel(), generator=generator)[: random + len(largest)]
        others = shuffled[~torch.isin(shuffled, largest)][:random]
        at = torch.cat([largest, others])
        found.append(torch.stack(torch.unravel_index(at, values.shape), 1) + torch.tensor([start, 0, 0]))
        start += size
    return torch.cat(found)
