"""One neuron: where it is active, what it writes, what the model does without it and with more of it, beside random neurons of its layer
and neurons that add as much."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hookbook.asking import encode_prompts, grouped_texts, wanted_ids, wanted_words
from hookbook.errors import DataError, Refused, SiteError, TokenError, check_counts
from hookbook.recipe import ModelCard, later, recipe, wrap
from hookbook.recipes.neurons.ablation import Ablation, ablated, counted, neuron_sites, set_to
from hookbook.recipes.neurons.activity import beyond, examples, first_half, promoted, quantiles as quantile_table, through_norms, written
from hookbook.recipes.neurons.report import NeuronReport
from hookbook.request import Each, Edit, Read, Request, Row
from hookbook.sites import Site
from hookbook.tokens import Position, resolve, vocabulary

PROMPTS = 20
"""On how many texts effects are measured where no prompts are given."""
LEVELS = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999)
SERVED = 5
"""Of each prompt how many words are listed that lose most without the neuron."""


@recipe
def neuron(
    model: Any,
    site: str | Site,
    texts: Any,
    tokens: Sequence[str | int] = (),
    *,
    prompts: Any = None,
    position: Position | None = None,
    ablate: Ablation = "zero",
    reference: Any = None,
    quantiles: Sequence[float] = LEVELS,
    doses: Sequence[float] | None = None,
    generate: int = 0,
    k: int = 10,
    context: int = 10,
    random: int = 3,
    matched: int = 3,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> NeuronReport:
    """Report on one neuron: what it sees, what it writes, what happens without it and with more of it; all beside other neurons.

    That a neuron goes along with something is no cause. Taken out, most do nothing; whether one does is said beside random neurons of its
    layer, and beside neurons that add as much to the stream.

    Args:
        model: Any model `hookbook.wrap` takes.
        site: The neuron, such as `"mlp_act.25.1120"`.
        texts: A list of texts, whose tokens but special ones say where it is active.
        tokens: Next tokens whose log-probabilities are wanted: texts as they follow the prompts, usually with a leading space, or ids.
        prompts: On which is measured what it does to the next token; None: the first halves of the first 20
            texts, cut between tokens. Give your own where it matters which they are: these are all of one kind if the texts are sorted.
        position: The tokens of each prompt at which it is set; None: all but special ones.
        ablate, reference: What it is set to when it is taken out, see `hookbook.neuron_sweep`.
        quantiles: Which quantiles of its activations, between two of them by a straight line.
        doses: Values that it and the others are set to; None: each neuron to its own quantiles.
        generate: How many tokens to decode with it at each dose, at these tokens of the prompt and each generated one; beside the first
            random and the first matched neuron.
        k: Examples each way, and promoted words.
        context: Tokens shown before and after an example.
        random: How many neurons of the layer are drawn as a control.
        matched: How many are taken whose contribution on the prompts is nearest to its own.
        seed: Of the draws.
        progress, checkpoint: See `hookbook.patchscope`.

    Returns:
        A `NeuronReport`.

    Raises:
        SiteError: No single neuron of `mlp_act`, or not in the model.
        DataError: A quantile that is none, no finite doses; an unknown ablation, or texts that are missing or not used.
        TokenError: No texts; a prompt of special tokens alone; a token or position cannot be used.
        Refused: Matched neurons in a remote model, which are not known before its job is done; the model has no neurons.

    Source: observe, ablate, set to graded values: as in the interpretability lectures' single-neuron protocol; ablation by mean and
        resampled values as in Wang et al. 2023, arXiv:2211.00593, section 2; words by the rows of the output projection as in Geva et al.
        2022, arXiv:2203.14680, section 3.

    Differs: both controls; the words also through the norms, which the model applies before the unembedding.

    Example:
        french, english = hb.tasks.contrast("language_french")
        report = hb.neuron(model, "mlp_act.25.1120", [*french, *english])
        report.to_frame(), report.promotes(), report.serves(), report.monotonicity()
    """
    adapter = wrap(model)
    card, whole, unit = adapter.card, *_parsed(site, adapter.card)
    coded = encode_prompts(adapter, texts)
    asked = [first_half(text) for text in coded[:PROMPTS]] if prompts is None else encode_prompts(adapter, prompts)
    levels = _numbers("quantiles", quantiles)
    if not levels or not all(0 <= level <= 1 for level in levels):
        raise DataError(f"quantiles={list(levels)}", "a quantile is a share", "use numbers from 0 to 1")
    given_doses = None if doses is None else _numbers("doses", doses)
    if given_doses is not None and (not given_doses or not all(map(math.isfinite, given_doses))):
        raise DataError(f"doses={list(given_doses)}", "a neuron is set to each", "give finite numbers, or None for its quantiles")
    check_counts(k=k)
    check_counts(0, context=context, random=random, matched=matched, generate=generate)
    if random + matched >= card.d_mlp:
        raise DataError(f"{random + matched} other neurons", f"a layer has {card.d_mlp}", "ask for fewer")
    if matched and adapter.remote:
        why = "which add as much is known when the job is done"
        raise Refused("matched neurons of a remote model", why, "give matched=0")
    adapter.require(whole)
    wanted = wanted_ids(adapter, asked, tokens)
    where = [counted(adapter, prompt) if position is None else sorted(set(resolve(position, prompt))) for prompt in asked]
    seen = [counted(adapter, text) for text in coded]
    alone = next((prompt.text for prompt, some in zip(asked, where, strict=True) if not some), None)
    if alone is not None or not any(seen):
        what = "texts of special tokens alone" if alone is None else f"the prompt {alone!r} of special tokens alone"
        raise TokenError(what, "activations on them mean nothing", "give longer texts, prompts= of your own, or position=")
    values = ablated(adapter, [whole], ablate, reference, seed, progress)[0]

    layer = int(whole.layer or 0)
    plain = adapter.run(Request(asked, [Row(i) for i in range(len(asked))], [Read(whole, Each(tuple(where)))]), progress=progress)
    sizes = plain.readings[0].values.detach().abs().float().mean(0).cpu()
    others = [i for i in torch.randperm(card.d_mlp, generator=torch.Generator().manual_seed(seed)).tolist() if i != unit]
    drawn, alike = others[:random], others[random : random + matched]  # these in a plan
    if matched:
        lengths = written(adapter, layer, torch.arange(card.d_mlp))[1].float().norm(dim=-1).cpu()
        nearest = later(_nearest, sizes * lengths, unit, drawn, matched)
        alike = nearest if isinstance(nearest, list) else alike
    chosen = [unit, *drawn, *alike]
    kinds = ("neuron", *["random"] * len(drawn), *["matched"] * len(alike))
    raw, through = written(adapter, layer, torch.tensor(chosen))
    most = [promoted(adapter, states[:1], k) for states in (raw, through_norms(adapter, through))]
    ids, logits = (torch.cat(both) for both in zip(*most, strict=True))

    full = [i for i, some in enumerate(seen) if some]
    reads = [Read(Site("mlp_act", layer, i), Each(tuple(seen[text] for text in full))) for i in chosen]
    active = adapter.run(Request([coded[i] for i in full], [Row(i) for i in range(len(full))], reads), progress=progress)
    read = torch.cat([reading.values.detach().cpu() for reading in active.readings], 1)
    known = read.to(torch.promote_types(read.dtype, torch.float32))
    table = quantile_table(known, levels) if given_doses is None else torch.tensor([given_doses] * len(chosen), dtype=torch.float64)

    n, c, steps = len(asked), len(chosen), table.shape[1]
    at = [Site("mlp_act", layer, i) for i in chosen]
    cells = [(i, step) for i in range(c) for step in range(steps)]
    off = set_to([values], [(0, i) for i in chosen])
    given = [*zip(at, off, strict=True), *zip((at[i] for i, _ in cells), set_to(list(table.unbind(0)), cells), strict=True)]
    rows = [row for i in range(n) for row in (Row(i), *(Row(i, (Edit(one, value, "set", where[i]),)) for one, value in given))]
    end = Read(Site("resid_post", card.n_layers - 1))
    reply = adapter.run(Request(asked, rows, [end]), progress=progress, checkpoint=checkpoint)
    states = reply.readings[0].values.unflatten(0, (n, len(given) + 1))
    said = torch.cat([wanted, ids[1, :1, 0].expand(n, 1)], 1)
    found = adapter.lens(torch.cat([states[:, 1:], states[:, :1]], 1), k=1, tokens=said)
    tops, changes = found.topk_ids[..., 0].T, (found.token_logprobs - found.token_logprobs[:, -1:]).transpose(0, 1)
    served = [_served(adapter, states[start : start + 64, :2]) for start in range(0, n, 64)]
    listed = later(examples, known[:, 0], seen, coded, k, context)
    spoken: dict[str, Any] = {"plain_texts": (), "texts": ()}
    if generate:
        beside = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
        rows = [Row(i) for i in range(n)]
        for j in beside:
            for value in set_to(list(table.unbind(0)), [(j, step) for step in range(steps)]):
                rows += [Row(i, (Edit(at[j], value, "set", where[i], scope="all"),)) for i in range(n)]
        tokens_said = adapter.run(Request(asked, rows, generate=generate), progress=progress).tokens
        spoken = {"plain_texts": later(_plain_texts, adapter, tokens_said, n), "texts": later(_texts, adapter, tokens_said, n, steps)}
    fields = ("example_texts", "example_positions", "activations", "contexts", "context_activations")
    return NeuronReport(
        card=card,
        site=at[0],
        neurons=torch.tensor(chosen),
        kinds=kinds,
        contributions=sizes[chosen] * through.float().norm(dim=-1).cpu(),
        n_texts=len(coded),
        n_tokens=sum(map(len, seen)),
        levels=levels,
        quantiles=quantile_table(known, levels),
        beyond=torch.tensor(beyond(levels, sum(map(len, seen)))),
        promoted_ids=ids.cpu(),
        promoted_logits=logits.cpu(),
        prompts=tuple(asked),
        positions=tuple(map(tuple, where)),
        wanted=later(_wanted_words, adapter, wanted_words(adapter, tokens), ids),
        plain_ids=found.topk_ids[:, -1, 0],
        plain_logprobs=found.token_logprobs[:, -1],
        values=values[chosen],
        kl=found.kl[:, :c].T,
        token_ids=tops[:c],
        changes=changes[:c],
        served_ids=torch.cat([some.indices for some in served]),
        served_effects=torch.cat([some.values for some in served]),
        doses=table,
        dose_kl=found.kl[:, c:-1].T.unflatten(0, (c, steps)),
        dose_ids=tops[c:-1].unflatten(0, (c, steps)),
        dose_changes=changes[c:-1].unflatten(0, (c, steps)),
        vocab=later(_vocabulary, adapter, listed, ids, found.topk_ids, [some.indices for some in served]),
        settings={"own_quantiles": doses is None},
        **{name: later(_pick, listed, i) for i, name in enumerate(fields)},
        **spoken,
    )


def _parsed(site: Any, card: ModelCard) -> tuple[Site, int]:
    """The layer's site, and the number of the one neuron that is meant."""
    found = neuron_sites(site, card, single=True)
    if len(found) != 1 or found[0].unit is None:
        raise SiteError(f"a report on {site!r}", "it is on one neuron", "name it as 'mlp_act.25.1120'")
    return found[0].whole, found[0].unit


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{name}={values!r}", "they are numbers", "give a list of numbers") from error


def _nearest(sizes: Tensor, unit: int, drawn: Sequence[int], n: int) -> list[int]:
    """The neurons whose contribution `[d_mlp]` is nearest to that of one, by their ratio."""
    far = (sizes.clamp_min(1e-30).log() - sizes[unit].clamp_min(1e-30).log()).abs()
    far[[unit, *drawn]] = math.inf
    return far.argsort(stable=True)[:n].tolist()


def _served(adapter: Any, states: Tensor) -> Any:
    """Of each prompt, `[n, 2, d_model]` plain and without the neuron, the words whose probability falls most, and by how much."""
    logits = adapter.readout(states.flatten(0, 1), logits=True).logits
    plain, without = logits.softmax(-1).unflatten(0, (len(states), 2)).unbind(1)
    return (plain - without).topk(min(SERVED, plain.shape[-1]))


def _pick(values: Sequence[Any], at: int) -> Any:
    return values[at]


def _wanted_words(adapter: Any, given: tuple[str, ...], ids: Tensor) -> tuple[str, ...]:
    word = adapter.tokenizer.decode([int(ids[1, 0, 0])])
    return (*given, f"{word} ({int(ids[1, 0, 0])})" if word in given else word)


def _vocabulary(adapter: Any, listed: Sequence[Tensor], *ids: Any) -> dict[int, str]:
    return vocabulary(adapter, listed[3], *(x for some in ids for x in (some if isinstance(some, list) else [some])))


def _plain_texts(adapter: Any, tokens: Tensor, n: int) -> tuple[str, ...]:
    return grouped_texts(adapter, tokens[:n], n)[0]


def _texts(adapter: Any, tokens: Tensor, n: int, steps: int) -> tuple[tuple[tuple[str, ...], ...], ...]:
    each_dose = grouped_texts(adapter, tokens[n:], n)
    return tuple(each_dose[start : start + steps] for start in range(0, len(each_dose), steps))
