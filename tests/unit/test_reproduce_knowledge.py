"""The rules of `hookbook reproduce knowledge`, on planted results."""

from __future__ import annotations

import pytest
import torch

import hookbook as hb
from hookbook.recipes.hops.backpatching import Backpatch
from hookbook.recipes.hops.hop_knock_out import HopKnockOut
from hookbook.recipes.hops.two_hops import WAYS, TwoHops
from hookbook.recipes.relations.linear_relations import LinearRelation
from hookbook.recipes.relations.relation_edits import RelationEdits
from hookbook.reproduce import knowledge
from hookbook.reproduce.knowledge import Setup
from hookbook.testing import toy

MODEL = toy()
CARD, D, N = MODEL.card, MODEL.card.d_model, MODEL.card.n_layers
SITES = tuple(hb.Site("resid_post", layer) for layer in range(N))
PAIRS = (("a", "b"), ("c", "d"))


def relation(validation, faithfulness, late=None, **controls):
    """A linear relation of three layers as if it had been measured."""
    names = ("logit lens", "bias", "least squares", "random")
    found = LinearRelation(
        card=CARD,
        relation="plural",
        template="{} is",
        answer=" {}",
        train=PAIRS,
        validation=PAIRS,
        test=PAIRS,
        validation_known=torch.tensor([True, True]),
        test_known=torch.tensor([True, False]),
        sites=SITES,
        weight=torch.eye(D).expand(N, D, D).clone(),
        bias=torch.zeros(N, D),
        betas=(1.0, 2.0),
        beta=torch.tensor([1.0, 2.0, 1.0]),
        chosen_by=torch.tensor(validation, dtype=torch.float64)[:, None].expand(N, 2),
        faithfulness=torch.tensor(faithfulness, dtype=torch.float64),
        controls={name: torch.full((N,), controls.get(name.replace(" ", "_"), 0.0), dtype=torch.float64) for name in names},
        settings={},
    )
    return knowledge.linear_line(found, Setup(late=late))


@pytest.mark.parametrize(
    ("line", "holds"),
    [
        (relation([0.1, 0.9, 0.0], [0.2, 0.8, 0.0], late=2), "yes"),
        (relation([0.9, 0.1, 0.0], [0.2, 0.8, 0.0], late=2), "no"),  # the layer is that of validation
        (relation([0.1, 0.9, 0.0], [0.2, 0.8, 0.3], late=2), "partly"),
        (relation([0.1, 0.9, 0.0], [0.2, 0.8, 0.3]), "yes"),  # late layers may be linear in a model that was not measured
        (relation([0.1, 0.9, 0.0], [0.2, 0.8, 0.0], logit_lens=0.3), "partly"),
        (relation([0.1, 0.9, 0.0], [0.2, 0.8, 0.0], bias=0.3), "partly"),
        (relation([0.1, 0.9, 0.0], [0.2, 0.8, 0.0], least_squares=0.3), "partly"),
        (relation([0.1, 0.9, 0.0], [0.2, 0.8, 0.0], random=0.1), "partly"),
        (relation([0.1, 0.9, 0.0], [0.2, float("nan"), 0.0]), "no"),
    ],
)
def test_a_relation_is_linear_if_lesser_maps_fail(line, holds):
    assert line.holds == holds


def test_a_relation_says_where_it_works_and_what_is_known():
    line = relation([0.1, 0.9, 0.0], [0.4, 0.8, 0.0], late=2)
    assert line.what == "plural, layer 1, beta 2" and line.measured == pytest.approx(0.8) and line.controls["layers from 2"] == 0
    assert line.note == "plural: the model knows 1 of 2 test pairs; at least half of the best at layers 0 to 1."


def edited(validation, test, random=0.0):
    """Edits at two sites and three ranks, of two validation and two test changes; numbers are how many of the two succeed."""
    said = torch.zeros(4, 2, 3, dtype=torch.long)
    for part, counts in ((0, validation), (2, test)):
        for site in range(2):
            for rank in range(3):
                said[part : part + counts[site][rank], site, rank] = 7
    zeros = torch.zeros(2, 3)
    found = RelationEdits(
        card=CARD,
        relation="plural",
        changes=tuple((x, y, "e", "f") for x, y in PAIRS * 2),
        n_validation=2,
        sites=SITES[:2],
        ranks=(10, 90, D),
        said=said,
        wanted=torch.full((4,), 7),
        vocab={0: "x", 7: "f"},
        random=zeros + random,
        substituted=torch.ones(2),
        divergence=zeros + 1,
        random_divergence=zeros,
        settings={},
    )
    return found


def line_of(*draws):
    return knowledge.edit_line(draws, Setup())


@pytest.mark.parametrize(
    ("line", "holds", "layer"),
    [
        (line_of(edited([[0, 0, 0], [0, 2, 0]], [[0, 0, 0], [0, 2, 0]])), "yes", 1),
        (
            line_of(edited([[2, 2, 0], [2, 1, 0]], [[0, 0, 0], [0, 2, 0]])),
            "no",
            0,
        ),  # the layer is that of validation, at the rank nearest to 100
        (line_of(edited([[0, 0, 0], [0, 2, 0]], [[0, 0, 0], [0, 2, 1]])), "partly", 1),  # the full rank works
        (line_of(edited([[0, 0, 0], [0, 2, 0]], [[0, 0, 0], [0, 2, 0]], random=0.2)), "partly", 1),
    ],
)
def test_an_edit_moves_the_answer_if_noise_and_the_full_inverse_do_not(line, holds, layer):
    assert (
        line.holds == holds and line.what == f"plural, layer {layer}, rank 90, mean of 1 draws" and line.controls["the other's state"] == 1
    )


def test_edits_are_means_over_draws_each_at_its_own_layer():
    line = line_of(edited([[0, 0, 0], [0, 2, 0]], [[0, 0, 0], [0, 2, 0]]), edited([[0, 2, 0], [0, 0, 0]], [[0, 1, 0], [0, 2, 0]]))
    assert line.measured == 0.75 and line.what == "plural, layer 0 or 1, rank 90, mean of 2 draws" and "1.00, 0.50 in draws" in line.note


def test_two_hops_without_a_shortcut_are_told_apart():
    prompts = tuple(MODEL.encode(text) for text in "abcd")
    yes, no = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    right = {
        "composed": torch.tensor([True, True, False, False]),
        "first": yes,
        "second": yes,
        "entity_shortcut": yes & (torch.arange(4) < 2),
    }
    right["relation_shortcut"] = no
    texts = ("x",) * 4
    found = TwoHops(CARD, prompts, texts, texts, texts, texts, right, dict.fromkeys(WAYS, torch.zeros(4, dtype=torch.long)), {0: "x"}, {})
    line = knowledge.cells_line(found)
    assert (line.measured, line.controls["with a shortcut"], line.holds) == (0, 1, "yes")
    right["composed"] = yes
    assert knowledge.cells_line(found).holds == "no"


@pytest.mark.parametrize(
    ("inside", "before", "other", "holds"),
    [(0.0, 1.0, 1.0, "yes"), (0.5, 1.0, 1.0, "no"), (0.0, 0.25, 1.0, "partly"), (0.0, 1.0, 0.25, "partly")],
)
def test_attention_is_needed_if_the_answer_goes_with_it_alone(inside, before, other, holds):
    n, right = 4, torch.ones(4, 1, 2, N)
    for keep, c, layers in ((inside, 0, slice(1, 3)), (before, 0, slice(0, 1)), (other, 1, slice(1, 3))):
        right[round(keep * n) :, 0, c, layers] = 0
    prompts, yes = tuple(MODEL.encode(text) for text in "abcd"), torch.ones(n, dtype=torch.bool)
    keys, windows = (((0,),),) * n, tuple((layer,) for layer in range(N))
    found = HopKnockOut(CARD, prompts, ("x",) * n, (("last", "entity"),), keys, keys, windows, yes, torch.zeros(n), right, right, {})
    assert knowledge.knock_out_line(found, Setup(knock_out=(1, 3))).holds == holds


@pytest.mark.parametrize(("layers", "place"), [(1, "0 to 0"), (2, "1 to 1"), (3, "1 to 1"), (6, "3 to 4")])
def test_models_of_few_layers_have_windows_too(layers, place):
    prompts, yes, right = (MODEL.encode("a"),), torch.ones(1, dtype=torch.bool), torch.ones(1, 1, 2, layers)
    keys, windows = (((0,),),), tuple((layer,) for layer in range(layers))
    found = HopKnockOut(CARD, prompts, ("x",), (("last", "entity"),), keys, keys, windows, yes, torch.zeros(1), right, right, {})
    line = knowledge.knock_out_line(found, Setup())
    assert line.what.endswith(f"layers {place}") and line.measured == 1 and (line.controls["windows before"] == 1 or layers == 1)


def patched(patch, shuffled, random=0, swapped=0):
    """Four questions that are not answered, and how many of them the only pair of the region fixes."""
    fixed = {
        name: torch.tensor([[i < count, False, False] for i in range(4)])
        for name, count in dict(patch=patch, shuffled=shuffled, random=random).items()
    }
    fixed["swapped"] = torch.tensor([[i < swapped, False, False] for i in range(4)])
    prompts, pairs = tuple(MODEL.encode(text) for text in "abcd"), ((2, 0), (1, 0), (2, 1))
    ids = {name: torch.zeros(4, 3, dtype=torch.long) for name in fixed}
    no, zero = torch.zeros(4, dtype=torch.bool), torch.zeros(4)
    clean = dict(clean=no, clean_ids=torch.zeros(4, dtype=torch.long), clean_logprobs=zero)
    found = Backpatch(
        card=CARD,
        prompts=prompts,
        answers=("x",) * 4,
        positions=(0,) * 4,
        pairs=pairs,
        **clean,
        right=fixed,
        token_ids=ids,
        logprobs=ids,
        vocab={0: "x"},
        donors=(1, 0, 3, 2),
        order=(0, 2, 1, 3),
        settings={},
    )
    return knowledge.backpatch_lines(found, Setup(late_to_early=((2, 3), (0, 1))))


@pytest.mark.parametrize(
    ("lines", "holds"), [(patched(3, 1), "yes"), (patched(3, 2), "partly"), (patched(0, 0), "no"), (patched(3, 0, random=1), "partly")]
)
def test_backpatching_counts_if_states_of_other_questions_do_not(lines, holds):
    region, any_pair, one = lines
    assert region.holds == holds and region.counts and not any_pair.counts and not one.counts


def test_what_the_controls_explain_is_said():
    region, any_pair, one = patched(3, 1, swapped=2)
    assert "shuffled donors reach 33%, swapped pairs 67%, random vectors 0%" in region.note
    assert any_pair.measured == 0.75 and any_pair.controls["shuffled"] == 0.25
    assert one.what == "layer 2 to 0, chosen on the other half" and one.measured == 0.5
