"""`hookbook reproduce knowledge`: what a model knows, as linear maps, and how it uses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hookbook import hops, prompts, relations
from hookbook.recipes.hops.backpatching import Backpatch, backpatch
from hookbook.recipes.hops.hop_knock_out import HopKnockOut, hop_knock_out
from hookbook.recipes.hops.hop_readability import hop_readability
from hookbook.recipes.hops.two_hops import TwoHops, two_hops
from hookbook.recipes.reading.logit_lens import LogitLens, logit_lens
from hookbook.recipes.relations.linear_relations import LinearRelation, linear_relation
from hookbook.recipes.relations.relation_edits import RelationEdits, edit_relation
from hookbook.reproduce.effect import Expected, Found, Line, least, most
from hookbook.reproduce.suite import Suite
from hookbook.results import Result

if TYPE_CHECKING:
    from hookbook.adapter import Adapter

QUERIES = 40
RANK = 100
DRAWS = 3
"""How often the pairs of edits are drawn: the authors' code has three trials."""


@dataclass(frozen=True, kw_only=True)
class Setup(Expected):
    """Where an effect is looked for, and how large it must be."""

    relations: tuple[str, ...] = ("adjective_comparative", "present_past", "country_capital", "country_language")
    faithful: float = 0.6
    late: int | None = None
    """From this layer on a relation is no longer linear."""
    edits: tuple[str, ...] = ("adjective_comparative", "present_past")
    edit_layers: tuple[int, ...] = ()
    """Where edits are judged, at the one that is best on validation pairs; none: those of the lower half."""
    late_to_early: tuple[tuple[int, int], tuple[int, int]] | None = None
    """From which layers to which a patch should help, each from and up to before; None: from the last third to those from a fifth to two
    thirds."""
    knock_out: tuple[int, int] | None = None
    """Windows around these layers, from and up to before, should take the answer, and none before them; None: the second half, up to five
    sixths."""
    language_layer: int | None = None
    """Where the language between two others is read; None: two thirds up."""


SETUPS = {
    "gemma-3-270m": Setup(
        relations=("present_past", "adjective_comparative", "antonym", "country_language", "country_capital", "landmark_country"),
        faithful=0.75,
        late=12,
        edit_layers=(8,),
        late_to_early=((12, 18), (4, 12)),
        knock_out=(9, 16),
        language_layer=13,
        counted=frozenset(
            [
                ("linear relation", "present_past"),
                ("linear relation", "adjective_comparative"),
                ("edit", "adjective_comparative"),
                ("backpatching", "region"),
            ]
        ),
    ),
    "smollm2-135m-instruct": Setup(
        relations=("adjective_comparative", "present_past", "country_capital"),
        faithful=0.75,
        late=24,
        edit_layers=(6, 7, 8, 9),
        counted=frozenset([("linear relation", "present_past"), ("linear relation", "adjective_comparative"), ("edit", "present_past")]),
    ),
}

SUITE = Suite(
    "Knowledge",
    SETUPS,
    Setup(),
    "Accuracies are of an answer's first token among all tokens, on pairs that chose nothing; layers count block outputs from 0.",
)


@SUITE.effect("Relations as linear maps", minutes=8, key="relations")
def linear(model: Adapter, setup: Setup) -> Found:
    """A relation as one affine map from the subject's state to the state that says the object, its mean first-order expansion at five
    subjects (Hernandez et al. 2023).

    The layer and beta are the best on one half of the other pairs; accuracies are over the pairs of the other half that the model knows.
    Other maps know less: the subject's state itself, a shift, the bias alone, least squares on the same five pairs, noise. Least squares
    on all validation pairs is the fair rival of the fit.
    """
    found = {f"relation_{name}": linear_relation(model, relations.load(name), queries=QUERIES) for name in setup.relations}
    return dict(found), [linear_line(one, setup) for one in found.values()]


def linear_line(found: LinearRelation, setup: Setup) -> Line:
    """A relation at the layer that is best on validation pairs."""
    at, layer = found.best_index, found.best.layer or 0
    measured, controls = float(found.faithfulness[at]), {name: float(values[at]) for name, values in found.controls.items()}
    rule = [
        least("faithfulness", measured, setup.faithful),
        *most(controls, dict.fromkeys(("logit lens", "bias", "least squares"), 0.15) | {"random": 0.05}),
    ]
    if setup.late is not None:
        controls[f"layers from {setup.late}"] = max(
            [float(x) for site, x in zip(found.sites, found.faithfulness, strict=True) if (site.layer or 0) >= setup.late],
            default=float("nan"),
        )
        rule += most(controls, {f"layers from {setup.late}": 0.1})
    works = [site.layer for site, x in zip(found.sites, found.faithfulness, strict=True) if x >= 0.5 * measured > 0]
    known, asked = int(found.test_known.sum()), len(found.test)
    note = (
        f"{found.relation}: the model knows {known} of {asked} test pairs; at least half of the best at layers {works[0]} to {works[-1]}."
        if works
        else ""
    )
    what = f"{found.relation}, layer {layer}, beta {float(found.beta[at]):g}"
    return Line("linear relation", what, measured, controls, "linear", tuple(rule), setup.expects("linear relation", found.relation), note)


@SUITE.effect("Edits through a relation's inverse", minutes=6)
def edits(model: Adapter, setup: Setup) -> Found:
    """A subject's state moved along the map's inverse of rank 100, so that the model says another subject's object (Hernandez et al. 2023,
    section 5).

    The inverse of full rank fails, as in the paper: small singular values amplify noise. Noise of the edit's length does nothing. The
    divergence is how far the next token after sentences that do not ask for the relation moves, for the edit and for noise: an edit is
    no surgery.
    """
    layers = list(setup.edit_layers) or list(range(model.card.n_layers // 2))
    results: dict[str, Result] = {}
    lines = []
    for name in setup.edits:
        relation, draws = relations.load(name), []
        for seed in range(DRAWS):
            found = linear_relation(model, relation, layers=layers, queries=QUERIES, seed=seed)
            draws.append(edit_relation(model, found, changes=QUERIES, seed=seed))
            results[f"edits_{name}_{seed}"] = draws[-1]
        lines.append(edit_line(draws, setup))
    return results, lines


def edit_line(draws: Sequence[RelationEdits], setup: Setup) -> Line:
    """Edits of rank 100, at the layer that is best on each draw's validation pairs; means over the draws."""
    name, ranks = draws[0].relation, draws[0].ranks
    rank = min(range(len(ranks)), key=lambda j: abs(ranks[j] - RANK))
    places = [int(found.validation[:, rank].argmax()) for found in draws]

    def mean(field: str, *at: int) -> float:
        return sum(float(getattr(found, field)[(place, *at)]) for found, place in zip(draws, places, strict=True)) / len(draws)

    measured, full = mean("success", rank), f"rank {ranks[-1]}"
    controls = {"random": mean("random", rank), full: mean("success", -1), "the other's state": mean("substituted")}
    controls |= {"KL elsewhere": mean("divergence", rank), "KL elsewhere, random": mean("random_divergence", rank)}
    rule = (least("success", measured, 0.6), *most(controls, {"random": 0.05, full: 0.15}))
    each = ", ".join(f"{float(found.success[place, rank]):.2f}" for found, place in zip(draws, places, strict=True))
    best = [(site.layer, chosen, float(found.success[found.best_index])) for found in draws for site, chosen in [found.best]]
    note = f"{name}: {each} in draws of the five pairs; the layer and rank that are best on validation pairs: "
    note += ", ".join(f"layer {layer} rank {chosen} {x:.2f}" for layer, chosen, x in best) + "."
    layers = sorted({found.sites[place].layer or 0 for found, place in zip(draws, places, strict=True)})
    what = f"{name}, layer {' or '.join(map(str, layers))}, rank {ranks[rank]}, mean of {len(draws)} draws"
    return Line("edit", what, measured, controls, "moves the answer", rule, setup.expects("edit", name), note)


@SUITE.effect("Two hops and backpatching", minutes=3, key="two-hops")
def two(model: Adapter, setup: Setup) -> Found:
    """Questions over a bridge that the text does not name, such as the capital of the country of Lyon (Biran et al. 2024, models of 7 to
    70 billion parameters).

    First: is a question answered whose two hops are known? Only questions that no shortcut answers count: neither the second relation of
    the entity itself, nor the question without it. Then, of answered questions, the attention that is needed: windows of seven layers in
    which the last token cannot see the entity. Last, of questions that are not answered though both hops are known, backpatching: a later
    layer's state at the last token given to an earlier layer. That any pair of layers helps says little, for states of other questions
    (shuffled) help, too; look at the region, which was fixed beforehand, and at the pair that one half of the questions chose.
    """
    asked = [question for first in ("city_country", "landmark_country") for question in hops.chain(first, "country_capital", 40, shots=2)]
    cells = two_hops(model, asked)
    results: dict[str, Result] = {"two_hops": cells}
    lines = [cells_line(cells)]
    answered, late = cells.select(composed=True)[:12], cells.select(composed=False)[:50]
    if len(answered) >= 4:
        cut = results["knock_out"] = hop_knock_out(model, [asked[i] for i in answered], edges=[("last", "entity"), ("last", "bridge")])
        lines.append(knock_out_line(cut, setup))
        results["readability"] = hop_readability(model, [asked[i] for i in answered])
    if len(late) >= 4 and model.card.n_layers > 1:
        back = results["backpatching"] = backpatch(model, [asked[i] for i in late])
        lines += backpatch_lines(back, setup)
    return results, lines


def cells_line(found: TwoHops) -> Line:
    """Questions whose hops are both known, without and with a shortcut."""
    right = found.right["composed"].double()
    alone, helped = found.select(shortcut=False), found.select(shortcut=True)
    rates = [float(right[some].mean()) for some in (alone, helped)]
    controls = {"with a shortcut": rates[1]}
    note = f"Both hops are known of {len(found.select())} of {len(found.answers)} questions; {len(alone)} of these have no shortcut."
    rule = (("answered <= 0.5", rates[0] <= 0.5),)
    return Line("two hops", "both known, no shortcut", rates[0], controls, "often not answered", rule, False, note)


def knock_out_line(found: HopKnockOut, setup: Setup) -> Line:
    """What is left of the answers where the last token cannot see the entity."""
    n = len(found.windows)
    begin, end = setup.knock_out or (n // 2, max(n // 2 + 1, n * 5 // 6))
    kept, other = found.kept()[0]
    before = float(kept[:begin].min()) if begin else float("nan")
    measured, controls = float(kept[begin:end].max()), {"other tokens": float(other[begin:end].min()), "windows before": before}
    rule = (
        ("still answered <= 0.3", measured <= 0.3),
        least("other tokens", controls["other tokens"], 0.7),
        least("windows before", before, 0.6),
    )
    what = f"last token to entity, windows around layers {begin} to {end - 1}"
    return Line("attention knock-out", what, measured, controls, "is needed", rule, False)


def backpatch_lines(found: Backpatch, setup: Setup) -> list[Line]:
    """The region, any pair, and the pair that was chosen on the other half."""
    n = found.card.n_layers
    sources, targets = (range(*bounds) for bounds in setup.late_to_early or ((n * 2 // 3, n), (n // 5, n * 2 // 3)))
    region, every, best = found.region(sources, targets), found.region(), found.best()
    measured, controls = (
        region["patch"].mean,
        {name: rate.mean for name, rate in region.items() if name != "patch"} | {"any pair of it": region["patch"].any},
    )
    rule = (
        least("mean over pairs", measured, 0.04),
        ("mean >= 3 times shuffled", measured >= 3 * controls["shuffled"]),
        *most(controls, {"random": 0.02}),
    )
    where = f"layers {sources[0]}-{sources[-1]} to {targets[0]}-{targets[-1]}, mean of {int((~found.clean).sum())} questions"
    explained = {row["control"]: row["explained"] for row in found.summary().to_dict("records")}
    note = (
        f"Of the mean over all pairs, shuffled donors reach {explained['shuffled']:.0%}, swapped pairs {explained['swapped']:.0%}, "
        f"random vectors {explained['random']:.0%}."
    )
    others = {name: rate.any for name, rate in every.items() if name != "patch"}
    chosen = {name: share for name, share in best.rates.items() if name != "patch"}
    at_all, paper = (least("any pair", every["patch"].any, 0.32),), "fixes 0.32 to 0.66"
    one = f"layer {best.source} to {best.target}, chosen on the other half"
    single = (("fixes some", best.rates["patch"] > 0), ("more than shuffled", best.rates["patch"] > chosen["shuffled"]))
    return [
        Line("backpatching", where, measured, controls, "fixes questions", rule, setup.expects("backpatching", "region"), note),
        Line("backpatching, any pair", "at least one of all pairs", every["patch"].any, others, paper, at_all, False),
        Line("backpatching, one pair", one, best.rates["patch"], chosen, "", single, False),
    ]


@SUITE.effect("Which language it thinks in", minutes=1)
def languages(model: Adapter, setup: Setup) -> Found:
    """Between French and another language, middle layers are closer to the English word than late ones (Wendler et al. 2024, Llama 2 of 7
    to 70 billion parameters).

    The probability of a language is the sum over the tokens that begin its word. The control is an English word that has nothing to do
    with the answer. In small models the effect is small: English is seldom the likeliest token.
    """
    results: dict[str, Result] = {}
    lines = []
    for target in ("Chinese", "German"):
        items = prompts.translation(model, "French", target)
        found = logit_lens(model, items.prompts[:48], languages=items.languages[:48], k=1)
        results[f"lens_french_{target.lower()}"] = found
        lines.append(language_line(found, target, setup))
    return results, lines


def language_line(found: LogitLens, target: str, setup: Setup) -> Line:
    """The English word in the middle, beside the answer and an unrelated word there."""
    layers = [site.layer for site in found.sites]
    layer = setup.language_layer if setup.language_layer is not None else len(layers) * 2 // 3
    means = found.language_logprobs.exp().mean(0)
    answer, english, unrelated = means[layers.index(layer)].tolist()
    controls = {
        target: answer,
        "unrelated English": unrelated,
        "English at the end": float(means[-1, 1]),
        f"{target} at the end": float(means[-1, 0]),
    }
    rule = (
        ("English >= 10 times unrelated English", english >= 10 * unrelated),
        ("English falls to the end", float(means[-1, 1]) < english),
    )
    return Line("language between", f"French to {target}, layer {layer}", english, controls, "English in the middle", rule, False)
