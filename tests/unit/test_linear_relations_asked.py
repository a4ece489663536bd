"""What relations, edits and readings refuse, and what a plan counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.deferred import Later
from hookbook.errors import DataError, EditError, Refused, SiteError, TokenError
from hookbook.relations import Relation
from hookbook.testing import ToyModel
from tests.contract.test_linear_relations import BETAS, LAYERS, SEED, TRAIN, planted
from tests.unit.test_linear_relations import TOY, WIDTH, edits, found, relation

# plans, and bad input


def test_a_plan_counts_and_runs_nothing(monkeypatch):
    one, more = found(), edits()
    with monkeypatch.context() as patch:
        patch.setattr(ToyModel, "forward", lambda *args: pytest.fail("the model was run"))
        plan = hb.linear_relation.plan(TOY, relation(), layers=LAYERS, betas=BETAS, n_train=TRAIN, seed=SEED)
        edit = hb.edit_relation.plan(TOY, one, ranks=[1, 5, 16], changes=3, n_unrelated=1)
        lens = hb.attribute_lens.plan(TOY, one, ["a prompt"])
        change = hb.change_answer.plan(TOY, one, "new", one.train[0][1], rank=3)
    assert plan.vjps == one.settings["vjps"] == TRAIN * WIDTH and edit.vjps == 0
    cost = one.settings["cost"]
    assert (plan.climbs, plan.token_layers, plan.vjps) == (cost["climbs"], cost["token_layers"], cost["vjps"])
    assert (edit.climbs, edit.token_layers) == (more.settings["cost"]["climbs"], more.settings["cost"]["token_layers"])
    assert lens.climbs > 0 and lens.unembedded >= 3 and change.climbs == 2


def refused(patch: Any, call: Any, error: Any, match: str) -> bool:
    """Whether a call is refused in these words before the model runs."""
    ran: list[Any] = []
    patch.setattr(ToyModel, "forward", lambda *args: ran.append(args))
    with pytest.raises(error, match=match):
        call()
    return not ran


@pytest.mark.parametrize(
    ("ask", "error", "match"),
    [
        ({"n_train": 19}, DataError, "20 pairs of 'planted'.*19 are to train, and others to choose and to judge by"),
        ({"n_train": 0}, TokenError, "n_train=0"),
        ({"queries": 0}, TokenError, "queries=0"),
        ({"ridge": -0.1}, TokenError, "ridge=-0.1"),
        ({"betas": ()}, TokenError, "0 betas"),
        ({"layers": "head_z.0"}, SiteError, "a relation maps states of the stream"),
        ({"layers": "final_norm"}, SiteError, "a relation maps states of the stream"),
        ({"layers": [3]}, SiteError, "layers 0 to 2"),
        ({"layers": []}, SiteError, "no layers were given"),
    ],
)
def test_bad_relations_are_refused_before_anything_runs(ask, error, match, monkeypatch):
    assert len(relation()) == 20
    assert refused(monkeypatch, lambda: hb.linear_relation(TOY, relation(), **ask), error, match)


OTHER = {"relation": lambda: replace(found(), card=replace(TOY.card, model_id="another", weights=()))}


@pytest.mark.parametrize(
    ("ask", "error", "match"),
    [
        (OTHER, EditError, "a relation of another in toy"),
        ({"layers": [0]}, SiteError, r"resid_post.0 in this relation: it has resid_pre.0, resid_post.1"),
        ({"ranks": [0, 5]}, EditError, "ranks 1 to 16"),
        ({"ranks": [17]}, EditError, "ranks 1 to 16"),
        ({"ranks": []}, EditError, "ranks 1 to 16"),
        ({"changes": 0}, TokenError, "changes=0"),
        ({"n_unrelated": 0}, TokenError, "n_unrelated=0"),
        ({"unrelated": []}, DataError, "no unrelated sentences"),
        ({"unrelated": ["a sentence"]}, DataError, "the subject is in it once"),
        (
            {"relation": lambda: replace(found(), test=tuple((x, "y") for x, _ in found().test))},
            DataError,
            "known test pairs.*no other object",
        ),
        ({"relation": lambda: replace(found(), validation_known=0 * found().validation_known)}, DataError, "0 known validation pairs"),
    ],
)
def test_bad_edits_are_refused_before_anything_runs(ask, error, match, monkeypatch):
    ask = {"relation": found, **ask}
    one = ask.pop("relation")()
    assert refused(monkeypatch, lambda: hb.edit_relation(TOY, one, **ask), error, match)


@pytest.mark.parametrize(
    ("ask", "error", "match"),
    [
        (OTHER, EditError, "a relation of another in toy"),
        ({"answer": "nothing"}, DataError, "no subject of 'planted' whose object is 'nothing'"),
        ({"subject": lambda: found().test[0][0], "answer": lambda: found().test[0][1]}, DataError, "the relation has already"),
        ({"subject": lambda: found().train[0][0]}, DataError, "the relation has already"),
        ({"rank": 0}, EditError, "W has ranks 1 to 16"),
        ({"rank": 17}, EditError, "W has ranks 1 to 16"),
        ({"layer": 0}, SiteError, "resid_post.0 in this relation"),
        ({"sentence": "no subject"}, DataError, "the subject is in it once"),
        ({"max_new_tokens": 0}, TokenError, "max_new_tokens=0"),
    ],
)
def test_bad_changes_are_refused_before_anything_runs(ask, error, match, monkeypatch):
    made = {"relation": found, "subject": "new", "answer": lambda: found().train[0][1], "rank": 3} | ask
    one, subject, answer, more = (made.pop(key) for key in ("relation", "subject", "answer")), None, None, made
    one, subject, answer = (value() if callable(value) else value for value in one)
    assert refused(monkeypatch, lambda: hb.change_answer(TOY, one, subject, answer, **more), error, match)


@pytest.mark.parametrize(
    ("ask", "error", "match"),
    [
        (OTHER, EditError, "a relation of another in toy"),
        ({"layers": [0]}, SiteError, "resid_post.0 in this relation"),
        ({"position": 30}, TokenError, "tokens"),
        ({"position": "zz"}, TokenError, "'zz' is not in the prompt"),
        ({"k": 0}, TokenError, "k of 1 or more"),
        ({"tokens": ["xy"]}, TokenError, "needs one"),
        ({"prompts": ""}, TokenError, "the prompt is empty"),
    ],
)
def test_bad_readings_are_refused_before_anything_runs(ask, error, match, monkeypatch):
    ask = {"relation": found, "prompts": ["a prompt"], **ask}
    one = ask.pop("relation")()
    assert refused(monkeypatch, lambda: hb.attribute_lens(TOY, one, **ask), error, match)


def test_no_two_curves_look_alike():
    curves = found().plot().get_lines()
    looks = {(line.get_color(), line.get_linestyle()) for line in curves}
    assert len(looks) == len(curves) == 1 + len(found().controls) > 6


def test_a_map_has_its_layers_ranks_and_width():
    with pytest.raises(SiteError, match="use one of them, or make it with this layer"):
        found().affine(0)
    with pytest.raises(SiteError, match="'all' as one layer"):
        found().place("all")
    for rank in (0, 17):
        with pytest.raises(EditError, match=f"rank {rank}: W has ranks 1 to 16"):
            found().affine(rank=rank)
        with pytest.raises(EditError, match=f"rank {rank}: W has ranks 1 to 16"):
            found().inverse(rank)
    with pytest.raises(EditError, match="this map takes 16"):
        found()(torch.zeros(2, 5))


def test_a_relation_that_is_being_made_elsewhere_is_not_used_before_it_is_there():
    one = replace(found(), weight=Later(torch.zeros, ()))
    for use in (lambda: hb.attribute_lens(TOY, one, "a"), lambda: hb.edit_relation(TOY, one)):
        with pytest.raises(Refused, match="numbers are not here yet.*leave the job first"):
            use()


def test_a_relation_that_the_model_does_not_know_has_no_map():
    wrong = Relation(tuple((x, "\x7f") for x, _ in relation().pairs), "wrong", templates=relation().templates, answer="{}")
    with pytest.raises(DataError, match="says none of the validation objects of 'wrong'"):
        hb.linear_relation(TOY, wrong, layers=[0], n_train=TRAIN)


def test_a_sentence_may_end_with_the_subject():
    one = planted(TOY, 1, end=True)
    result = hb.linear_relation(TOY, one, layers=[0, 1], betas=BETAS, n_train=1, seed=SEED)
    subject, own = result.test[0]
    wanted = next(y for _, y in (*result.train, *result.validation, *result.test) if y != own)
    said = hb.change_answer(TOY, result, subject, wanted, sentence="So {}", rank=3, max_new_tokens=2)
    assert said.prompts[0].text == f"So {subject}" and "-> -1" not in said.edits[0]
    assert result.ask("new").text.endswith("new")
