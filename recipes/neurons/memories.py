"""MLPs as memories: what triggers a neuron (its key), what it writes (its value), and whether the two agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookbook.asking import encode_prompts
from hookbook.errors import DataError, TokenError, check_counts
from hookbook.recipe import ModelCard, later, recipe, wrap
from hookbook.recipes.neurons.ablation import counted, held_at_once, neuron_sites
from hookbook.recipes.neurons.activity import through_norms, written
from hookbook.request import Each, Read, Request, Row
from hookbook.results import Axes, DataFrame, Result
from hookbook.show.plots import lines
from hookbook.show.tidy import Over, spelled, tidy
from hookbook.tokens import vocabulary


@dataclass(frozen=True, eq=False)
class MLPMemories(Result):
    """Keys and values of `s` neurons in each of `l` layers.

    A neuron's triggers are the tokens of texts after which it is highest, each with the text before it; its value is its row of the
    output projection, as words by the unembedding."""

    card: ModelCard
    layers: tuple[int, ...]
    """`[l]`"""
    neurons: Tensor
    """`[l, s]`: numbers of neurons in their layers."""
    n_texts: int
    n_tokens: int
    """How many tokens were looked at: all but special ones and the last of each text, after which nothing comes."""
    activations: Tensor
    """`[l, s, trigger]`: at the triggers, the highest first."""
    trigger_texts: Tensor
    """`[l, s, trigger]`: in which text."""
    trigger_positions: Tensor
    """`[l, s, trigger]`: at which token of it."""
    prefixes: Tensor
    """`[l, s, trigger, context]`: token ids that end at the trigger; -1 is none."""
    next_ids: Tensor
    """`[l, s, trigger]`: the token that comes next in the text."""
    value_ids: Tensor
    """`[l, s, k]`: the words that the value promotes most, by the unembedding alone."""
    normed_ids: Tensor
    """`[l, s, k]`: the same through the norms that the model applies."""
    ranks: Tensor
    """`[l, s]`: of the first trigger's next token among all words by the value; 0 is the first."""
    agreement: Tensor
    """`[l]`: the share of neurons whose first word is the first trigger's next token."""
    shuffled: Tensor
    """`[l]`: the same of a neuron's word and another neuron's trigger, over all pairs."""
    random: Tensor
    """`[l]`: of a neuron's word and what comes next at any token of the texts."""
    normed_agreement: Tensor
    """`[l]`: as `agreement`, of words through the norms."""
    vocab: dict[int, str]
    """The text of every token id in this result."""
    settings: dict[str, Any]

    def to_frame(self) -> DataFrame:
        """One row for each neuron: `site`, `layer`, `unit`, `activation` (at its first trigger), `context` (the trigger and what is
        before), `next_token`, `token` (its value's first word), `norm_token` (through the norms), `value_rank` (of the next token)."""
        sites = [("mlp_act", layer, unit) for layer, units in zip(self.layers, self.neurons.tolist(), strict=True) for unit in units]
        lines_ = ["".join(self.vocab.get(i, "") for i in line) for line in self.prefixes[:, :, 0].flatten(0, 1).tolist()]
        return tidy(
            {"site layer unit": sites},
            activation=self.activations[..., 0].flatten(),
            context=lines_,
            next_token=spelled(self.next_ids[..., 0], self.vocab),
            token=spelled(self.value_ids[..., 0], self.vocab),
            norm_token=spelled(self.normed_ids[..., 0], self.vocab),
            value_rank=self.ranks.flatten(),
        )

    def layers_frame(self) -> DataFrame:
        """One row for each layer: `layer`, `agreement`, `control shuffled`, `control random`, `control norms`, `value_rank` (the
        median)."""
        shares = {"shuffled": self.shuffled, "random": self.random, "norms": self.normed_agreement}
        return tidy(
            {"layer": list(self.layers)},
            agreement=self.agreement,
            **{f"control {name}": Over("layer", x) for name, x in shares.items()},
            value_rank=self.ranks.double().median(1).values.long(),
        )

    def triggers(self, layer: int, neuron: int) -> DataFrame:
        """What one neuron is triggered by: `activation`, `context`, `next_token`, the highest first."""
        if layer not in self.layers or neuron not in (units := self.neurons[self.layers.index(layer)].tolist()):
            raise DataError(f"neuron {layer}.{neuron}", "it was not looked at", "give layers= and neurons= to the recipe")
        at = self.layers.index(layer), units.index(neuron)
        return tidy(
            {"example": self.next_ids.shape[2]},
            activation=self.activations[at],
            context=["".join(self.vocab.get(i, "") for i in line) for line in self.prefixes[at].tolist()],
            next_token=spelled(self.next_ids[at], self.vocab),
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Agreement by layer, beside both controls."""
        curves = {"agreement": self.agreement, "through the norms": self.normed_agreement}
        curves |= {"other neurons": self.shuffled, "any next token": self.random}
        title = f"Keys and values that agree, {self.card.model_id}"
        return lines(ax, curves, ("layer", "share of neurons"), title=title, labels=[str(layer) for layer in self.layers])


@recipe
def mlp_memories(
    model: Any,
    texts: Any,
    *,
    layers: Any = "all",
    neurons: int | Sequence[int] = 100,
    triggers: int = 25,
    k: int = 10,
    context: int = 10,
    seed: int = 0,
    progress: bool | None = None,
) -> MLPMemories:
    """Read MLPs as memories: of each neuron the texts that trigger it and the words that it writes, and how often the two agree.

    If a neuron stores what follows its triggers, its value's first word is what comes next after them.

    Args:
        model: Any model `hookbook.wrap` takes.
        texts: A list of texts; every token but special ones and the last of each is looked at.
        layers: `"all"`, or some.
        neurons: How many of each layer, drawn; or which.
        triggers: How many triggers of each are kept.
        k: How many words of each value.
        context: How many tokens of a trigger's text, itself the last.
        seed: Of the draws.
        progress: Show a progress bar; None: for long work only.

    Returns:
        A `MLPMemories`.

    Raises:
        SiteError: A site that is not a whole `mlp_act`, or not in the model.
        DataError: A neuron that is not in a layer.
        TokenError: No texts, or none of two tokens or more; a number that makes no sense.
        Refused: The model has no neurons.

    Source: Geva et al. 2021, arXiv:2012.14913, sections 3 and 4: agreement of a value's first word with the first trigger's next token.

    Differs: of a gated MLP the activation is the gate times the other half, so that it has two keys and may be below 0; triggers are where
        it is highest. The paper's controls are of a random word; here they are exact means over other neurons and over all tokens.

    Example:
        found = hb.mlp_memories(model, texts)
        found.layers_frame(), found.plot()
    """
    adapter = wrap(model)
    card = adapter.card
    sites = neuron_sites(layers, card)
    coded = encode_prompts(adapter, texts)
    check_counts(triggers=triggers, k=k, context=context)
    chosen = _chosen(neurons, len(sites), card.d_mlp, seed)
    for site in sites:
        adapter.require(site)
    where = [[p for p in counted(adapter, tokens) if p + 1 < len(tokens)] for tokens in coded]
    at = torch.tensor([(i, p) for i, some in enumerate(where) for p in some], dtype=torch.long).view(-1, 2)
    if not len(at):
        raise TokenError("texts of one token", "nothing comes next in them", "give longer ones")
    following = torch.tensor([coded[i].ids[p + 1] for i, p in at.tolist()])

    best = _triggers(adapter, coded, where, sites, chosen, min(triggers, len(at)), progress)
    activations, index = torch.stack([x for x, _ in best]), torch.stack([x for _, x in best])  # [l, s, trigger]
    next_ids = following[index]
    words: list[list[Tensor]] = []
    for site, units, nexts in zip(sites, chosen, next_ids.unbind(0), strict=True):
        raw, through = written(adapter, int(site.layer or 0), units)
        with torch.no_grad():
            zero = torch.zeros_like(raw[:1])
            logits = (adapter.unembed(raw) - adapter.unembed(zero)).float()
            normed = (adapter.unembed(through_norms(adapter, through)) - adapter.unembed(zero)).float()
        first = nexts[:, :1].to(logits.device)
        ranks = (logits > logits.gather(1, first)).sum(1)
        words.append([logits.topk(min(k, card.d_vocab)).indices.cpu(), normed.topk(min(k, card.d_vocab)).indices.cpu(), ranks.cpu()])
    value_ids, normed_ids, ranks = (torch.stack(column) for column in zip(*words, strict=True))
    tops, first_next = value_ids[..., 0], next_ids[..., 0]
    counts = torch.zeros(card.d_vocab, dtype=torch.float64).index_add(0, following, torch.ones(len(following), dtype=torch.float64))
    same = (tops[:, :, None] == first_next[:, None]).double()
    own, n = same.diagonal(dim1=1, dim2=2), tops.shape[1]
    table = torch.tensor(
        [[coded[i].ids[q] if (q := p - context + 1 + step) >= 0 else -1 for step in range(context)] for i, p in at.tolist()]
    )
    prefixes = table[index]
    return MLPMemories(
        card=card,
        layers=tuple(int(site.layer or 0) for site in sites),
        neurons=torch.stack(chosen),
        n_texts=len(coded),
        n_tokens=len(at),
        activations=activations,
        trigger_texts=at[:, 0][index],
        trigger_positions=at[:, 1][index],
        prefixes=prefixes,
        next_ids=next_ids,
        value_ids=value_ids,
        normed_ids=normed_ids,
        ranks=ranks,
        agreement=own.mean(1),
        shuffled=(same.sum((1, 2)) - own.sum(1)) / max(1, n * (n - 1)),
        random=(counts[tops] / len(following)).mean(1),
        normed_agreement=(normed_ids[..., 0] == first_next).double().mean(1),
        vocab=later(vocabulary, adapter, prefixes, next_ids, value_ids, normed_ids),
        settings={},
    )


def _chosen(neurons: int | Sequence[int], n_layers: int, width: int, seed: int) -> list[Tensor]:
    """Which neurons of each layer, ascending."""
    if isinstance(neurons, int):
        check_counts(neurons=neurons)
        generator = torch.Generator().manual_seed(seed)
        return [torch.randperm(width, generator=generator)[:neurons].sort().values for _ in range(n_layers)]
    try:
        listed = sorted({int(i) for i in neurons})
    except (TypeError, ValueError) as error:
        raise DataError(f"neurons={neurons!r}", "it is how many of each layer, or which", "give a number or a list") from error
    if not listed or not 0 <= listed[0] <= listed[-1] < width:
        raise DataError(f"neurons={listed}", f"a layer has neurons 0 to {width - 1}", "use some of them")
    return [torch.tensor(listed)] * n_layers


def _triggers(
    adapter: Any, coded: Sequence[Any], where: Sequence[list[int]], sites: Sequence[Any], chosen: Sequence[Tensor], n: int, progress: Any
) -> list[tuple[Tensor, Tensor]]:
    """Of each site the `n` highest activations of its neurons, `[s, n]`, and at which of all tokens they are."""
    best: list[Any] = [None] * len(sites)
    full = [i for i, some in enumerate(where) if some]
    done = 0
    for start, end in held_at_once(adapter, sites, [len(where[i]) for i in full]):
        part = full[start:end]
        held = sum(len(where[i]) for i in part)
        reads = [Read(site, Each(tuple(where[i] for i in part))) for site in sites]
        reply = adapter.run(Request([coded[i] for i in part], [Row(i) for i in range(len(part))], reads), progress=progress)
        for at, (reading, units) in enumerate(zip(reply.readings, chosen, strict=True)):
            values = reading.values.detach()[:, units.to(reading.values.device)].cpu().T
            values = values.to(torch.promote_types(values.dtype, torch.float32))
            index = torch.arange(done, done + held).expand(len(units), -1)
            if best[at] is not None:
                values, index = torch.cat([best[at][0], values], 1), torch.cat([best[at][1], index], 1)
            top = values.topk(min(n, values.shape[1]), dim=1)
            best[at] = top.values, index.gather(1, top.indices)
        done += held
    return best
