"""Effects of single neurons: which tell kinds of text apart, what is lost without one, doses, how many do one job, and attribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hookbook import prompts, scores, tasks
from hookbook.asking import auroc, encode_prompts, mean_states
from hookbook.recipes.neurons.attribution import NeuronAttribution, neuron_attribution
from hookbook.recipes.neurons.cumulative import CumulativeAblation, cumulative_ablation
from hookbook.recipes.neurons.neuron import neuron
from hookbook.recipes.neurons.report import NeuronReport
from hookbook.recipes.neurons.search import BEST, NeuronSearch, find_neurons
from hookbook.recipes.neurons.sweep import neuron_sweep
from hookbook.reproduce.effect import Expected, Found, Line, least, most
from hookbook.reproduce.suite import Suite
from hookbook.request import Edit, Readout, Request, Row
from hookbook.results import Result
from hookbook.sites import Site
from hookbook.tokens import answer_ids

if TYPE_CHECKING:
    from hookbook.adapter import Adapter

LANGUAGES = ("language_french", "language_german", "language_spanish", "language_italian")
CONCEPTS = ("code", "digits", "plural", "person_name")
DRAWS = ("first", "second")
"""Two halves of every set of texts, and of every list of prompts."""
WORDS = (" de", " la", " les", " dans", " pour")
"""French words whose log-probability is to follow a dose."""
TIMES = (1.0, 4.0, 16.0)
"""Multiples of the neuron's 0.99 quantile under which texts are generated."""
JOINT = 20
"""How many entries, or neurons, are taken out together."""
FACTS = 10
"""Prompts of each draw whose answer is attributed."""


@dataclass(frozen=True)
class Setup(Expected):
    """The French neuron of a model, one that tells French from English but is for other languages, too, and how much is lost at least."""

    neuron: str = ""
    """None known: the best that is found on the other draw."""
    other: str = ""
    kl: float = 0.03


EXPECTED = frozenset({("search", "language_french"), ("neuron", ""), ("without", "zero")})
EXPECTED |= {("attribution", what) for what in ("gradient", "metrics", "joint")}
SETUPS = {
    "smollm2-135m-instruct": Setup(counted=EXPECTED, neuron="mlp_act.25.1120", other="mlp_act.29.1026", kl=0.1),
    "gemma-3-270m": Setup(counted=EXPECTED, neuron="mlp_act.15.249", kl=0.03),
}
SUITE = Suite(
    "Neurons",
    SETUPS,
    Setup(),
    "Sets of texts and prompts are our own, in two halves, which are two draws; a neuron that was known before was found on other texts.",
)


def half(name: str, draw: str, which: Literal["positive", "negative"] = "positive") -> list[str]:
    """Half of the texts of a contrast."""
    texts = getattr(tasks.contrast(name), which)
    middle = len(texts) // 2
    return list(texts[:middle] if draw == DRAWS[0] else texts[middle:])


@SUITE.effect("Which neurons tell texts apart", minutes=2)
def search(model: Adapter, setup: Setup) -> Found:
    """Every neuron ranked by how well its mean activation tells texts apart, judged on texts held out: each of four languages from English
    and from the three others; code, digits, plurals and names of persons from the same said otherwise.

    The controls are the 50 best with shuffled classes, on texts held out, and all neurons.
    """
    results: dict[str, Result] = {}
    lines = []
    for name in (*LANGUAGES, *CONCEPTS):
        for draw in DRAWS:
            others = {one.removeprefix("language_"): half(one, draw) for one in LANGUAGES if name in LANGUAGES and one != name}
            found = find_neurons(model, half(name, draw), half(name, draw, "negative"), others=others)
            results[f"{name}_{draw}"] = found
            lines.append(search_line(name, draw, found, setup))
    return results, lines


def search_line(name: str, draw: str, found: NeuronSearch, setup: Setup) -> Line:
    """The 50 best, beside shuffled classes."""
    measured, shuffled = found.best_held_out(), found.shuffled.mean(0)
    every = torch.maximum(found.auroc, 1 - found.auroc).mean()
    controls = {"shuffled": float(shuffled[1]), "all neurons": float(every)}
    rule = [least("the 50 best on texts held out", measured, 0.95 if name in LANGUAGES else controls["shuffled"] + 0.15)]
    rule += most(controls, {"shuffled": 0.65})
    both = int(found.told.sum())
    alone, judged = found.validation.flatten(), found.auroc.flatten()
    chosen = torch.maximum(alone, 1 - alone).argsort(descending=True, stable=True)[:BEST]
    apart = float(torch.where(alone >= 0.5, judged, 1 - judged)[chosen].mean())
    note = (
        f"{name}, {draw} draw: {both:,} of {found.told.numel():,} neurons have 0.95 or more on both halves; with shuffled classes "
        f"the best has {float(shuffled[0]):.2f} on the half that chooses. The best: {', '.join(found.best(5))}."
        + (f" From English alone the {BEST} best are told by {apart:.3f}." if found.others else "")
    )
    what = f"{name.removeprefix('language_')}, {draw} draw"
    return Line("neurons that tell texts apart", what, measured, controls, "", tuple(rule), setup.expects("search", name), note)


def known(model: Adapter, setup: Setup, draw: str) -> str:
    """The French neuron: the one that was known before, or the best on the other draw."""
    if setup.neuron:
        return setup.neuron
    other = DRAWS[1 - DRAWS.index(draw)]
    others = {one: half(one, other) for one in LANGUAGES[1:]}
    return find_neurons(model, half(LANGUAGES[0], other), half(LANGUAGES[0], other, "negative"), others=others).best(1)[0]


@SUITE.effect("Whether one is for French", minutes=0.3, key="neuron")
def one(model: Adapter, setup: Setup) -> Found:
    """One neuron's mean activation on French texts against English ones and against three other languages. A neuron that tells French from
    English may be one for foreign languages: that is why the others are there."""
    lines = []
    for draw in DRAWS:
        sets = {"English": half(LANGUAGES[0], draw, "negative")}
        sets |= {name.removeprefix("language_").title(): half(name, draw) for name in LANGUAGES}
        for site in filter(None, (known(model, setup, draw), setup.other)):
            values = {name: _means(model, site, texts) for name, texts in sets.items()}
            areas = {name: float(auroc(values["French"], some)) for name, some in values.items() if name != "French"}
            measured, own = min(areas.values()), site != setup.other
            rule = (least("the least area", measured, 0.95), ("French is higher", _above(values)))
            means = ", ".join(f"{name} {float(some.mean()):.2f}" for name, some in values.items())
            what = f"{site}, {draw} draw{'' if own else ' (for other languages, too)'}"
            note = f"{site}, {draw} draw: mean activation {means}."
            lines.append(Line("one neuron for French", what, measured, areas, "", rule, own and setup.expects("neuron"), note))
    return {}, lines


def _means(model: Adapter, site: str, texts: Sequence[str]) -> Tensor:
    """`[text, 1]`"""
    return mean_states(model, encode_prompts(model, texts), [Site.parse(site)], [slice(None)])[0, 0]


def _above(values: dict[str, Tensor]) -> bool:
    return all(float(some.mean()) < float(values["French"].mean()) for name, some in values.items() if name != "French")


@SUITE.effect("What is lost without it", minutes=2)
def without(model: Adapter, setup: Setup) -> Found:
    """The French neuron taken out of French texts at every token: set to zero, to its mean over texts of every kind, and to values drawn
    from these; the divergence of the next token after the first half of each text. Beside it random neurons of its layer, and neurons
    that add as much to the stream."""
    results: dict[str, Result] = {}
    lines = []
    for draw in DRAWS:
        site, texts = known(model, setup, draw), half(LANGUAGES[0], draw)
        corpus = [text for name in (*LANGUAGES, *CONCEPTS) for text in half(name, DRAWS[1 - DRAWS.index(draw)])]
        for ablate in ("zero", "mean", "resample"):
            reference = None if ablate == "zero" else corpus
            found = neuron(model, site, texts, list(WORDS), ablate=ablate, reference=reference, random=3, matched=3)
            results[f"without_{draw}_{ablate}"] = found
            lines.append(without_line(draw, ablate, found, setup))
            if ablate == "zero":
                lines.append(served_line(draw, found))
    return results, lines


def _others(found: NeuronReport, values: Tensor, kind: str) -> float:
    """The most of the control neurons of a kind."""
    return float(values[[other == kind for other in found.kinds]].max())


def without_line(draw: str, ablate: str, found: NeuronReport, setup: Setup) -> Line:
    """The divergence, and how often the likeliest token changes."""
    means = found.kl.mean(1)
    controls = {"random": _others(found, means, "random"), "as large": _others(found, means, "matched")}
    limit = setup.kl if ablate == "zero" else 10 * controls["random"]
    half_of_it = ("as large <= half of it", controls["as large"] <= float(means[0]) / 2)
    rule = (least("KL", float(means[0]), limit), *most(controls, {"random": 0.002}), half_of_it)
    shares = ", ".join(f"{name} {float(x):.2f}" for name, x in zip(found.kinds, found.changed, strict=True))
    sizes = ", ".join(f"{float(x):.1f}" for x in found.contributions)
    note = f"{draw} draw, {ablate} ({float(found.values[0]):.2f}): the likeliest token changes in {shares}. What each adds is {sizes} long."
    what = f"{found.site} set to {ablate}, {draw} draw, KL in nats"
    return Line("without one neuron", what, float(means[0]), controls, "", rule, setup.expects("without", ablate), note)


def served_line(draw: str, found: NeuronReport) -> Line:
    """How many different words it serves."""
    words: Any = found.serves()
    first = ", ".join(f"{word!r} {effect:.2f}" for word, effect in zip(words.token[:8], words.effect[:8], strict=True))
    note = f"{draw} draw, words that lose most probability without it, summed over {len(found.prompts)} prompts: {first}."
    rule = (least("different words", len(words), 10),)
    return Line("one neuron, many jobs", f"{found.site}, {draw} draw, different words", len(words), {}, "", rule, False, note)


@SUITE.effect("Doses", minutes=3)
def dose(model: Adapter, setup: Setup) -> Found:
    """The French neuron set to its own quantiles at every token of English beginnings: whether French words become likelier step by step,
    beside other neurons at theirs; and whether texts that are generated under 1, 4 and 16 times its 0.99 quantile are French."""
    results: dict[str, Result] = {}
    lines = []
    openings = tasks.openings("english")
    for at, draw in enumerate(DRAWS):
        begun, site = list(openings[at::2][:10]), known(model, setup, draw)
        texts = [text for name in LANGUAGES for text in half(name, draw)] + half(LANGUAGES[0], draw, "negative")
        found = results[f"dose_{draw}"] = neuron(model, site, texts, list(WORDS), prompts=begun)
        high = float(found.quantiles[0, found.levels.index(0.99)])
        said = results[f"generated_{draw}"] = neuron(
            model, site, texts, prompts=begun, doses=[times * high for times in TIMES], generate=20, random=1, matched=1
        )
        lines += [dose_line(draw, found), generated_line(draw, said)]
    return results, lines


def dose_line(draw: str, found: NeuronReport) -> Line:
    """Rank correlations and reach of French words' log-probabilities."""
    order = torch.stack([found.monotonicity(word) for word in WORDS]).mean(0)
    reach = (found.dose_changes[:, -1, :, : len(WORDS)] - found.dose_changes[:, 0, :, : len(WORDS)]).mean((1, 2))
    controls = {"reach": float(reach[0]), "reach of random": _others(found, reach.abs(), "random")}
    controls |= {"reach of as large": _others(found, reach.abs(), "matched")}
    far = ("reach >= 5 times random", controls["reach"] >= 5 * controls["reach of random"])
    rule = (least("rank correlation", float(order[0]), 0.8), far)
    note = f"{draw} draw: from the lowest to the highest quantile log-probabilities of French words move by {controls['reach']:+.2f} nats."
    return Line("a dose, a word", f"{found.site}, {draw} draw, rank correlation", float(order[0]), controls, "graded", rule, False, note)


def generated_line(draw: str, found: NeuronReport) -> Line:
    """How many texts are French at each dose; and at the best one how many of all words are different, since one word said again and again
    counts as French."""
    shares = [scores.french_score(texts) for texts in found.texts[0]]
    controls = {f"{times:g}x": share for times, share in zip(TIMES, shares, strict=True)}
    controls["without"] = scores.french_score(found.plain_texts)
    for kind, texts in list(zip(dict.fromkeys(found.kinds), found.texts, strict=True))[1:]:
        controls[kind] = max(map(scores.french_score, texts))
    words = found.texts[0][shares.index(max(shares))]
    controls["different words"] = sum(len({*text.split()}) for text in words) / max(1, sum(len(text.split()) for text in words))
    examples = "; ".join(f"{times:g}x: {texts[0].strip()!r}" for times, texts in zip(TIMES, found.texts[0], strict=True))
    note = f"{draw} draw, after {found.prompts[0].text!r}: {examples}."
    rule = (least("French at some dose", max(shares), 0.5), least("different words", controls["different words"], 0.5))
    return Line("a dose, a text", f"{found.site}, {draw} draw, share of French texts", max(shares), controls, "graded", rule, False, note)


@SUITE.effect("One job, many neurons", minutes=4)
def one_job(model: Adapter, setup: Setup) -> Found:
    """The neurons that are most for a small word (these, those, both; this, that, one), by one gradient at the last token, taken out
    together: how many until the model says something else, beside as many random ones. Removing one rarely changes the answer."""
    results: dict[str, Result] = {}
    lines = []
    for draw in DRAWS:
        asked = prompts.one_job(draw)
        found = cumulative_ablation(model, [text for text, _ in asked], [word for _, word in asked], by="attribution", random=3)
        results[f"one_job_{draw}"] = found
        lines += one_job_lines(draw, found)
    return results, lines


def _flipped(flips: Tensor, k: int) -> float:
    """In which share some at most `k` flip it."""
    return float(((flips > 0) & (flips <= k)).double().mean())


def one_job_lines(draw: str, found: CumulativeAblation) -> list[Line]:
    """The share of prompts whose likeliest token, which is the word, changes without one neuron, and without a hundred."""
    said = [found.vocab[i] for i in found.plain_ids.tolist()]
    known = [i for i, word in enumerate(said) if word == found.answers[i]]
    if len(known) < 3:
        note = f"{draw} draw: only {len(known)} words are likeliest."
        return [Line("without the most effective", f"{draw} draw", float("nan"), {}, "", (), False, note)]
    shares = {k: _flipped(found.flips[known], k) for k in found.ks.tolist()}
    random = {k: _flipped(found.random_flips[known], k) for k in found.ks.tolist()}
    each = ", ".join(f"{k:,}: {share:.2f} ({random[k]:.2f})" for k, share in shares.items())
    words = ", ".join(sorted({said[i].strip() for i in known}))
    note = (
        f"{draw} draw: of {len(said)} prompts the word is likeliest after {len(known)} ({words}); of these the share after which "
        f"another is, without so many neurons (random ones): {each}."
    )
    rare = (("without one <= 0.2", shares[1] <= 0.2), *most({"random": random[1]}, {"random": 0.05}))
    many = (least("without 100", shares[100], 0.5), *most({"random 1,000": random[1000]}, {"random 1,000": 0.3}))
    return [
        Line("without the most effective", f"one, {draw} draw", shares[1], {"random": random[1]}, "rarely", rare, False, note),
        Line("without the most effective", f"100, {draw} draw", shares[100], {"random 1,000": random[1000]}, "", many, False),
    ]


def facts(model: Adapter, draw: str) -> tuple[list[str], list[int]]:
    """Prompts, and the first token of each answer."""
    begin = FACTS // 2 * DRAWS.index(draw)
    asked = [(f"The capital of {x} is", y) for x, y in tasks.load("country_capital").pairs[begin : begin + FACTS // 2]]
    asked += [(f"The opposite of {x} is", y) for x, y in tasks.load("antonym").pairs[begin : begin + FACTS // 2]]
    words = [answer_ids(model.encode(text), f" {word}", model.tokenizer)[0] for text, word in asked]
    return [text for text, _ in asked], words


@SUITE.effect("Attribution", minutes=5)
def attribution(model: Adapter, setup: Setup) -> Found:
    """Activation times gradient for every neuron at every token, against what taking each out really does: of random ones, of the largest,
    of all at the last token; whether probability and log-probability rank alike; and the largest twenty taken out together."""
    results: dict[str, Result] = {}
    lines = []
    for draw in DRAWS:
        asked, answers = facts(model, draw)
        found = results[f"attribution_{draw}"] = neuron_attribution(model, asked, answers)
        lines.append(gradient_line(draw, found, setup))
        logprob = neuron_attribution(model, asked, answers, of="logprob", exact=False)
        probability = neuron_attribution(model, asked, answers, of="probability", exact=False)
        lines += [metrics_line(draw, logprob, probability, setup), joint_line(draw, model, logprob, answers, setup)]
        lines.append(exact_line(draw, model, asked[0], answers[0]))
    return results, lines


def gradient_line(draw: str, found: NeuronAttribution, setup: Setup) -> Line:
    """Attributions against exact effects."""
    random, ranks, measured = found.correlation("drawn"), found.correlation(ranks=True), found.correlation()
    controls = {"random": random, "ranks of the largest": ranks}
    rule = (least("ranks of the largest", ranks, 0.6), least("random", random, 0.95))
    return Line("attribution", f"{draw} draw, the largest", measured, controls, "", rule, setup.expects("attribution", "gradient"))


def metrics_line(draw: str, logprob: NeuronAttribution, probability: NeuronAttribution, setup: Setup) -> Line:
    """Whether both metrics rank neurons alike, prompt by prompt."""
    import pandas as pd

    found = []
    for i in range(len(logprob.prompts)):
        mine = [one.attributions[one.token_rows == i].flatten().double() for one in (logprob, probability)]
        chosen = mine[0].abs().topk(min(1000, len(mine[0]))).indices
        found.append(float(pd.Series(mine[0][chosen].tolist()).corr(pd.Series(mine[1][chosen].tolist()), method="spearman")))
    rule = (least("rank correlation", min(found), 0.999),)
    what = f"probability and log-probability, {draw} draw, the least of {len(found)} prompts"
    return Line("attribution by", what, min(found), {}, "", rule, setup.expects("attribution", "metrics"))


def joint_line(draw: str, model: Adapter, found: NeuronAttribution, answers: Sequence[int], setup: Setup) -> Line:
    """The entries that are most for the answer set to zero together, beside as many random ones."""
    generator, rows = torch.Generator().manual_seed(0), []
    for i in range(len(found.prompts)):
        tokens = (found.token_rows == i).nonzero()[:, 0]
        values = found.attributions[tokens]
        for places in (values.flatten().topk(JOINT).indices, torch.randperm(values.numel(), generator=generator)[:JOINT]):
            at = zip(*(x.tolist() for x in torch.unravel_index(places, values.shape)), strict=True)
            edits = [
                Edit(Site("mlp_act", found.layers[layer], unit), 0.0, "set", int(found.token_positions[tokens[token]]))
                for token, layer, unit in at
            ]
            rows.append(Row(i, tuple(edits)))
    words = torch.tensor(answers)[:, None].repeat_interleave(2, 0)
    p = model.run(Request(found.prompts, rows, (), Readout(tokens=words))).said.token_logprobs[:, 0].exp().double()
    falls = 1 - p.unflatten(0, (-1, 2)) / found.metric.exp().double()[:, None]
    measured, random = falls.mean(0).tolist()
    rule = (least("p falls by", measured, 0.5), *most({"random": random}, {"random": 0.3}))
    note = f"{draw} draw: of {len(falls)} prompts {int((falls[:, 0] >= 0.5).sum())} lose half of the answer's probability or more."
    what = f"the largest {JOINT} entries together, {draw} draw, by which share p falls"
    return Line("without the attributed", what, measured, {"random": random}, "", rule, setup.expects("attribution", "joint"), note)


def exact_line(draw: str, model: Adapter, prompt: str, answer: int) -> Line:
    """Of all neurons at the last token of one prompt: the hundred that do most by the sweep and by the gradient."""
    swept = neuron_sweep(model, prompt, [answer]).changes[0, :, 0].double()
    guessed = neuron_attribution(model, prompt, answer, position=-1, exact=False).attributions[0].flatten().double()
    both = {*swept.abs().topk(100).indices.tolist()} & {*guessed.abs().topk(100).indices.tolist()}
    r = float(torch.corrcoef(torch.stack([-swept, guessed]))[0, 1])
    rule = (least("of the 100 largest", len(both) / 100, 0.8),)
    what = f"{prompt!r}, {draw} draw, share of the 100 that really do most"
    return Line("found by the gradient", what, len(both) / 100, {"correlation of all": r}, "", rule, False)
