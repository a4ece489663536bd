"""Knowledge neurons: which neurons an answer is attributed to by integrated gradients, fact by fact, and what the answer loses without them
and gains with twice as much; beside the neurons of another fact, the most active, ones that add as much, and random ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookbook.asking import gradients
from hookbook.errors import DataError, Refused, check_counts
from hookbook.recipe import ModelCard, later, recipe, wrap
from hookbook.recipes.neurons.ablation import neuron_sites
from hookbook.recipes.neurons.activity import written
from hookbook.relations import Relation
from hookbook.request import Edit, Read, Readout, Request, Row
from hookbook.results import Axes, DataFrame, Result
from hookbook.show.plots import lines
from hookbook.show.tidy import Over, spelled, tidy
from hookbook.sites import Site
from hookbook.tokens import Tokens, answer_ids, vocabulary

SETS = ("own", "another fact's", "most active", "as large", "random")
FACTORS = (0.0, 2.0)
STEP = 0.05
"""By how much the share of prompts moves until there are as many neurons as are wanted."""


@dataclass(frozen=True, eq=False)
class KnowledgeNeurons(Result):
    """Neurons of `fact` facts, `k` in all, each asked in `template` sentences; and what the answer becomes without them and with twice as
    much, beside other sets of as many neurons."""

    card: ModelCard
    relation: str
    subjects: tuple[str, ...]
    """`[fact]`"""
    objects: tuple[str, ...]
    """`[fact]`"""
    templates: tuple[str, ...]
    """`[template]`"""
    prompts: tuple[Tokens, ...]
    """`[fact * template]`, those of one fact together."""
    layers: tuple[int, ...]
    """`[l]`"""
    neurons: Tensor
    """`[k, 3]`: fact, layer and number in its layer, the most attributed of a fact first."""
    scores: Tensor
    """`[k]`: their attributions, in the mean over a fact's prompts."""
    share: float
    """In which share of a fact's prompts a neuron passes the threshold, after it was moved."""
    probabilities: Tensor
    """`[fact * template]`: of the answer's first token in the plain run."""
    token_ids: Tensor
    """`[fact * template]`: the likeliest next token of the plain run."""
    sums: Tensor
    """`[fact * template, l]`: the attributions of a layer, summed."""
    ends: Tensor
    """`[fact * template, l]`: by how much the probability falls when the whole layer is at 0, which the sum should be."""
    factors: tuple[float, ...]
    """`[factor]`: by what neurons are multiplied: 0 and 2."""
    sets: tuple[str, ...]
    """`[set]`: the fact's own neurons, and the controls."""
    changed: Tensor
    """`[set, factor, fact * template]`: the answer's probability then."""
    changed_ids: Tensor
    """`[set, factor, fact * template]`: the likeliest next token then."""
    vocab: dict[int, str]
    """The text of every token id in this result."""
    settings: dict[str, Any]

    @property
    def completeness(self) -> Tensor:
        """`[fact * template, l]`: how far the sum is off what it should be, as a share of that."""
        return (self.sums - self.ends).abs() / self.ends.abs().clamp_min(1e-12)

    @property
    def effects(self) -> Tensor:
        """`[set, factor, fact]`: by which share the answer's probability changes, in the mean over a fact's sentences."""
        shares = self.changed / self.probabilities - 1
        return shares.unflatten(2, (len(self.subjects), -1)).mean(3)

    def of(self, subject: str) -> DataFrame:
        """The neurons of one fact: `site`, `layer`, `unit`, `attribution`, `n` (of how many facts it is one)."""
        if subject not in self.subjects:
            raise DataError(f"no fact about {subject!r}", "", f"use one of {', '.join(self.subjects)}")
        mine = self.neurons[:, 0] == self.subjects.index(subject)
        sites = [("mlp_act", *at) for at in self.neurons[mine, 1:].tolist()]
        shared = [int((self.neurons[:, 1:] == at).all(1).sum()) for at in self.neurons[mine, 1:]]
        return tidy({"site layer unit": sites}, attribution=self.scores[mine], n=shared)

    def to_frame(self) -> DataFrame:
        """One row for each set, factor and prompt: `control` (`own` or the set), `strength` (the factor), `prompt`, `answer`,
        `probability`, `clean_probability`, `token`, `plain_token`."""
        answers = [answer for answer in self.objects for _ in self.templates]
        return tidy(
            {"control": list(self.sets), "strength": list(self.factors), "prompt": self.prompts},
            answer=Over("prompt", answers),
            probability=self.changed,
            clean_probability=Over("prompt", self.probabilities),
            token=spelled(self.changed_ids, self.vocab),
            plain_token=Over("prompt", spelled(self.token_ids, self.vocab)),
        )

    def summary(self) -> DataFrame:
        """One row for each set and factor: `control`, `strength`, `effect` (the mean share by which the answer's probability falls),
        `changed` (of how many prompts the likeliest token is another)."""
        other = (self.changed_ids != self.token_ids).double().mean(2)
        return tidy({"control": list(self.sets), "strength": list(self.factors)}, effect=-self.effects.mean(2), changed=other)

    def plot(self, ax: Axes | None = None) -> Axes:
        """How many neurons of each layer are knowledge neurons of some fact."""
        counts = torch.stack([(self.neurons[:, 1] == layer).sum() for layer in self.layers]).double() / len(self.subjects)
        title = f"Knowledge neurons of {self.relation}, {self.card.model_id}"
        return lines(
            ax, {"neurons": counts}, ("layer", "neurons of a fact, in the mean"), title=title, labels=[str(x) for x in self.layers]
        )


@recipe
def knowledge_neurons(
    model: Any,
    relation: Relation,
    *,
    facts: int | Sequence[str] = 8,
    layers: Any = "all",
    steps: int = 20,
    threshold: float = 0.2,
    share: float = 0.7,
    wanted: tuple[float, float] = (2.0, 5.0),
    seed: int = 0,
    progress: bool | None = None,
) -> KnowledgeNeurons:
    """Find the neurons that a fact's answer is attributed to, in several sentences, and see what the answer becomes without them.

    Args:
        model: Any model `hookbook.wrap` takes.
        relation: Facts, and sentences that ask for them (`hookbook.relations.load`); all its sentences are used.
        facts: How many of its pairs, drawn; or their subjects.
        layers: `"all"`, or some.
        steps: Of the integral, by the trapezoid; every layer's neurons are scaled together from 0 to what they are.
        threshold: In each prompt neurons count that have this share of the largest attribution.
        share: And of a fact those that count in this share of its prompts. It moves by 0.05 until the mean number of a fact is wanted.
        wanted: From how many to how many that is.
        seed: Of facts and neurons that are drawn.
        progress: Show a progress bar; None: for long work only.

    Returns:
        A `KnowledgeNeurons`.

    Raises:
        DataError: No such subject, or fewer pairs than facts; a share that is none.
        SiteError: A site that is not a whole `mlp_act`, or not in the model.
        TokenError: An answer has no token of its own after its sentence; a number that makes no sense.
        Refused: A remote model, of which neurons are not known before its job is done; no gradients; no neurons.

    Source: Dai et al. 2022, arXiv:2104.08696, section 3: integrated gradients of the answer's probability, threshold and refinement;
        section 4.3: suppressed and amplified.

    Differs: at the last token, where a causal model says the answer, instead of a masked one; the answer's first token; the trapezoid,
        since one-sided sums of 20 steps are some per cent off; beside the paper's most active neurons also those of another fact and ones
        that add as much.

    Example:
        found = hb.knowledge_neurons(model, hb.relations.load("country_capital"))
        found.summary(), found.of(found.subjects[0])
    """
    adapter = wrap(model)
    card = adapter.card
    if adapter.remote:
        why = "which neurons they are is known when a job is done"
        raise Refused("knowledge neurons of a remote model", why, "use hb.neuron_attribution there, or a copy of the model here")
    sites = neuron_sites(layers, card)
    check_counts(steps=steps)
    if not 0 < threshold <= 1 or not 0 < share <= 1 or not 0 <= wanted[0] <= wanted[1]:
        what = f"threshold={threshold}, share={share}, wanted={wanted}"
        raise DataError(what, "shares are above 0 and at most 1, and there are at least 0 neurons", "use such numbers")
    pairs = _drawn(relation, facts, seed)
    for site in sites:
        adapter.require(site)
    texts = [template.format(subject) for subject, _ in pairs for template in relation.templates]
    prompts = [adapter.encode(text) for text in texts]
    said = [relation.answer.format(answer) for _, answer in pairs for _ in relation.templates]
    words = torch.tensor([[answer_ids(prompt, word, adapter.tokenizer)[0]] for prompt, word in zip(prompts, said, strict=True)])
    n, each = len(prompts), len(relation.templates)

    reply = adapter.run(
        Request(prompts, [Row(i) for i in range(n)], [Read(site) for site in sites], Readout(k=1, tokens=words)), progress=progress
    )
    activations = [reading.values.detach().cpu() for reading in reply.readings]  # of each site [prompt, neuron]
    attributions, sums, ends = [], [], []
    for site, acts in zip(sites, activations, strict=True):
        slopes, falls = _integrated(adapter, prompts, site, acts, words, steps, progress)
        attributions.append(acts * slopes)
        sums.append(attributions[-1].double().sum(1))
        ends.append(falls)
    scores = torch.stack(attributions, 1)  # [prompt, l, neuron]
    refined = later(_refined, scores, each, threshold, share, wanted)
    known = isinstance(refined, tuple)  # but in a plan
    found, passed = refined if isinstance(refined, tuple) else (_planned(len(pairs), wanted), share)
    sets = _sets(adapter, found, activations, sites, each, seed) if known else [found] * len(SETS)

    rows = []
    for some in sets:
        for factor in FACTORS:
            for i in range(n):
                at = [Site("mlp_act", sites[place].layer, unit) for place, unit in some[i // each]]
                op: Any = "scale" if factor else "set"
                rows.append(Row(i, tuple(Edit(site, factor, op, -1) for site in at)))
    after = adapter.run(Request(prompts, rows, (), Readout(k=1, tokens=words.repeat(len(SETS) * len(FACTORS), 1))), progress=progress).said
    shape = (len(SETS), len(FACTORS), n)
    listed = [(fact, place, unit) for fact, some in enumerate(found) for place, unit in some]
    means = scores.unflatten(0, (len(pairs), each)).mean(1)
    return KnowledgeNeurons(
        card=card,
        relation=relation.name,
        subjects=tuple(subject for subject, _ in pairs),
        objects=tuple(answer for _, answer in pairs),
        templates=tuple(relation.templates),
        prompts=tuple(prompts),
        layers=tuple(int(site.layer or 0) for site in sites),
        neurons=torch.tensor([(fact, int(sites[place].layer or 0), unit) for fact, place, unit in listed], dtype=torch.long).view(-1, 3),
        scores=torch.stack([means[at] for at in listed]) if listed else torch.zeros(0),
        share=passed,
        probabilities=reply.said.token_logprobs[:, 0].exp(),
        token_ids=reply.said.topk_ids[:, 0],
        sums=torch.stack(sums, 1),
        ends=torch.stack(ends, 1),
        factors=FACTORS,
        sets=SETS,
        changed=after.token_logprobs[:, 0].exp().unflatten(0, shape),
        changed_ids=after.topk_ids[:, 0].unflatten(0, shape),
        vocab=later(vocabulary, adapter, after.topk_ids, reply.said.topk_ids),
        settings={"facts": len(pairs)},
    )


def _drawn(relation: Relation, facts: int | Sequence[str], seed: int) -> list[tuple[str, str]]:
    """The pairs that are meant."""
    known = dict(relation.pairs)
    if isinstance(facts, int):
        check_counts(2, facts=facts)
        if facts > len(known):
            raise DataError(f"{facts} facts", f"{relation.name!r} has {len(known)}", "ask for fewer")
        return random.Random(seed).sample(list(relation.pairs), facts)
    if missing := [subject for subject in facts if subject not in known]:
        raise DataError(f"no fact about {missing[0]!r} in {relation.name!r}", "", "use subjects of its pairs")
    if len({*facts}) < max(2, len(facts)):
        raise DataError(f"facts={list(facts)}", "another fact's neurons are a control", "give two different subjects or more")
    return [(subject, known[subject]) for subject in facts]


def _integrated(
    adapter: Any, prompts: Sequence[Tokens], site: Site, acts: Tensor, words: Tensor, steps: int, progress: bool | None
) -> tuple[Tensor, Tensor]:
    """The answer's probability along the way of a layer's neurons at the last token from 0 to what they are: the mean slope by each
    neuron `[prompt, neuron]`, by the trapezoid, and by how much it rises in all `[prompt]`."""
    n, points = len(prompts), steps + 1
    numbers = [i for i in range(n) for _ in range(points)]
    ask: Callable[[list[int]], Readout] = lambda some: Readout(tokens=words[[numbers[at] for at in some]])  # noqa: E731
    edits = [(Edit(site, acts[i] * (step / steps), "set", -1),) for i in range(n) for step in range(points)]
    where = [[len(prompts[i]) - 1] for i in numbers]
    values, _, (slopes,) = gradients(
        adapter,
        [prompts[i] for i in numbers],
        where,
        [site],
        ask,
        lambda reply: reply.said.token_logprobs[:, 0].exp(),
        before=edits,
        progress=progress,
    )
    weights = torch.full((points,), 1 / steps, dtype=slopes.dtype)
    weights[[0, -1]] /= 2
    values = values.detach().cpu().double().unflatten(0, (n, points))
    return (slopes.unflatten(0, (n, points)) * weights[:, None]).sum(1), values[:, -1] - values[:, 0]


Found = list[list[tuple[int, int]]]
"""Of each fact its neurons, as the place of the layer and the number in it."""


def _refined(scores: Tensor, each: int, threshold: float, share: float, wanted: tuple[float, float]) -> tuple[Found, float]:
    """The neurons of each fact, and the share in which they pass.

    Source: the authors' code moves the share up or down until the mean number is wanted; where it would go back and forth, as with few
        sentences, the nearest is taken.
    """
    most = scores.flatten(1).amax(1).clamp_min(0)
    passed = (scores >= threshold * most[:, None, None]) & (scores > 0)
    counts = passed.unflatten(0, (-1, each)).sum(1)  # [fact, l, neuron]

    def number(at: float) -> float:
        return float((counts >= max(1, at * each - 1e-9)).sum((1, 2)).double().mean())

    def off(at: float) -> float:
        """By how much the number is off what is wanted; too few is worse than too many."""
        return max(number(at) - wanted[1], 1000 * (wanted[0] - number(at)), 0.0)

    tried = [share]
    while off(tried[-1]):
        new = round(tried[-1] + (STEP if number(tried[-1]) > wanted[1] else -STEP), 10)
        if not 0 < new <= 1 or new in tried:
            break
        tried.append(new)
    best = min(tried, key=off)
    means = scores.unflatten(0, (-1, each)).mean(1)
    found = []
    for fact, count in enumerate(counts):
        some = [(int(place), int(unit)) for place, unit in (count >= max(1, best * each - 1e-9)).nonzero().tolist()]
        found.append(sorted(some, key=lambda at: -float(means[fact][at])))
    return found, best


def _planned(n: int, wanted: tuple[float, float]) -> Found:
    """Neurons in a plan: as many as may be, in the first layer, where they cost most."""
    return [[(0, unit) for unit in range(int(wanted[1]))]] * n


def _sets(adapter: Any, found: Found, activations: Sequence[Tensor], sites: Sequence[Site], each: int, seed: int) -> list[Found]:
    """The facts' own neurons and the controls, in the order of `SETS`."""
    draw = random.Random(seed)
    acts = torch.stack([x.float() for x in activations], 1).abs().unflatten(0, (-1, each)).mean(1)  # [fact, l, neuron]
    width = acts.shape[2]
    used = sorted({place for some in found for place, _ in some})
    lengths = {i: written(adapter, int(sites[i].layer or 0), torch.arange(width))[1].float().norm(dim=-1).cpu() for i in used}
    active, large, drawn = [], [], []
    for fact, some in enumerate(found):
        taken = set(some)
        order = acts[fact].flatten().argsort(descending=True).tolist()
        active.append([divmod(at, width) for at in order if divmod(at, width) not in taken][: len(some)])
        alike, other = set(taken), []
        for place, unit in some:
            sizes = acts[fact, place] * lengths[place]
            far = (sizes.clamp_min(1e-30).log() - sizes[unit].clamp_min(1e-30).log()).abs().argsort().tolist()
            near = next((place, i) for i in far if (place, i) not in alike)
            alike.add(near)
            other.append(near)
        large.append(other)
        free = [(place, draw.choice([i for i in range(width) if (place, i) not in taken])) for place, _ in some]
        drawn.append(free)
    return [found, found[1:] + found[:1], active, large, drawn]
