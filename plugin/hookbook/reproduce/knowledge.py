"""`hookbook reproduce knowledge`: what a model knows, as linear maps, and how it uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hookbook import prompts, relations
from hookbook.recipes.linear_relations import LinearRelation, linear_relation
from hookbook.recipes.logit_lens import LogitLens, logit_lens
from hookbook.recipes.relation_edits import RelationEdits, edit_relation
from hookbook.reproduce.suite import Expected, Found, Line, Suite, least, most
from hookbook.results import Result

if TYPE_CHECKING:
    from hookbook.adapter import Adapter

QUERIES = 40
RANK = 100


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
    language_layer: int | None = None
    """Where the language between two others is read; None: two thirds up."""


SETUPS = {
    "gemma-3-270m": Setup(
        relations=("present_past", "adjective_comparative", "antonym", "country_language", "country_capital", "landmark_country"),
        faithful=0.75,
        late=12,
        edits=("adjective_comparative", "present_past", "country_capital"),
        edit_layers=(8,),
        language_layer=13,
        counted=frozenset([("linear relation", "present_past"), ("linear relation", "adjective_comparative"), ("edit", "adjective_comparative")]),
    ),
    "smollm2-135m-instruct": Setup(
        relations=("adjective_comparative", "present_past", "country_capital"),
        faithful=0.75,
        late=24,
        edit_layers=(6, 7, 8, 9),
        counted=frozenset([("linear relation", "present_past"), ("linear relation", "adjective_comparative"), ("edit", "present_past")]),
    ),
}


def linear(model: Adapter, setup: Setup) -> Found:
    """A relation as one affine map from the subject's state to the state that says the object, its mean first-order expansion at five subjects (Hernandez et al. 2023).

    The layer and beta are the best on one half of the other pairs; accuracies are over the pairs of the other half that the model knows. Other maps know less: the
    subject's state itself, a shift, the bias alone, least squares on the same five pairs, noise. Least squares on all validation pairs is the fair rival of the fit.
    """
    found = {f"relation_{name}": linear_relation(model, relations.load(name), queries=QUERIES) for name in setup.relations}
    return dict(found), [linear_line(one, setup) for one in found.values()]


def linear_line(found: LinearRelation, setup: Setup) -> Line:
    """A relation at the layer that is best on validation pairs."""
    at, layer = found.best_index, found.best.layer or 0
    measured, controls = float(found.faithfulness[at]), {name: float(values[at]) for name, values in found.controls.items()}
    rule = [least("faithfulness", measured, setup.faithful), *most(controls, dict.fromkeys(("logit lens", "bias", "least squares"), 0.15) | {"random": 0.05})]
    if setup.late is not None:
        controls[f"layers from {setup.late}"] = max(
            [float(x) for site, x in zip(found.sites, found.faithfulness, strict=True) if (site.layer or 0) >= setup.late], default=float("nan")
        )
        rule += most(controls, {f"layers from {setup.late}": 0.1})
    works = [site.layer for site, x in zip(found.sites, found.faithfulness, strict=True) if x >= 0.5 * measured > 0]
    known, asked = int(found.test_known.sum()), len(found.test)
    note = f"{found.relation}: the model knows {known} of {asked} test pairs; at least half of the best at layers {works[0]} to {works[-1]}." if works else ""
    what = f"{found.relation}, layer {layer}, beta {float(found.beta[at]):g}"
    return Line("linear relation", what, measured, controls, "linear", tuple(rule), setup.expects("linear relation", found.relation), note)


def edits(model: Adapter, setup: Setup) -> Found:
    """A subject's state moved along the map's inverse of rank 100, so that the model says another subject's object (Hernandez et al. 2023, section 5).

    The inverse of full rank fails, as in the paper: small singular values amplify noise. Noise of the edit's length does nothing. The divergence is how far
    the next token after sentences that do not ask for the relation moves, for the edit and for noise: an edit is no surgery.
    """
    layers = list(setup.edit_layers) or list(range(model.card.n_layers // 2))
    results: dict[str, Result] = {}
    for name in setup.edits:
        found = linear_relation(model, relations.load(name), layers=layers, queries=QUERIES)
        results[f"edits_{name}"] = edit_relation(model, found, changes=QUERIES)
    return results, [edit_line(found, setup) for found in results.values() if isinstance(found, RelationEdits)]


def edit_line(found: RelationEdits, setup: Setup) -> Line:
    """Edits of rank 100 at the layer that is best on validation pairs."""
    rank = min(range(len(found.ranks)), key=lambda j: abs(found.ranks[j] - RANK))
    at = int(found.validation[:, rank].argmax())
    measured = float(found.success[at, rank])
    controls = {
        "random": float(found.random[at, rank]),
        f"rank {found.ranks[-1]}": float(found.success[at, -1]),
        "the other's state": float(found.substituted[at]),
    }
    controls |= {"KL elsewhere": float(found.divergence[at, rank]), "KL elsewhere, random": float(found.random_divergence[at, rank])}
    rule = (least("success", measured, 0.6), *most(controls, {"random": 0.05, f"rank {found.ranks[-1]}": 0.15}))
    site, best = found.best
    note = f"{found.relation}: of all layers and ranks tried, layer {site.layer} and rank {best} are best on validation pairs, and succeed on {float(found.success[found.best_index]):.2f} of the test pairs."
    what = f"{found.relation}, layer {found.sites[at].layer}, rank {found.ranks[rank]}"
    return Line("edit", what, measured, controls, "moves the answer", rule, setup.expects("edit", found.relation), note)


def languages(model: Adapter, setup: Setup) -> Found:
    """Between French and another language, middle layers are closer to the English word than late ones (Wendler et al. 2024, Llama 2 of 7 to 70 billion parameters).

    The probability of a language is the sum over the tokens that begin its word. The control is an English word that has nothing to do with the answer. In small
    models the effect is small: English is seldom the likeliest token.
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
    controls = {target: answer, "unrelated English": unrelated, "English at the end": float(means[-1, 1]), f"{target} at the end": float(means[-1, 0])}
    rule = (("English >= 10 times unrelated English", english >= 10 * unrelated), ("English falls to the end", float(means[-1, 1]) < english))
    return Line("language between", f"French to {target}, layer {layer}", english, controls, "English in the middle", rule, False)


EFFECTS: dict[str, tuple[str, Any]] = {
    "relations": ("Relations as linear maps", linear),
    "edits": ("Edits through a relation's inverse", edits),
    "languages": ("Which language it thinks in", languages),
}

SUITE = Suite(
    "Knowledge",
    EFFECTS,
    SETUPS,
    Setup(),
    "Accuracies are of an answer's first token among all tokens, on pairs that chose nothing; layers count block outputs from 0.",
)
