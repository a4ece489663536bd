"""Questions in two hops: what they are made of, where their parts are, and that nothing tells their answers."""

from __future__ import annotations

import pytest

import hookbook as hb
from hookbook import hops
from hookbook.errors import DataError, TokenError
from hookbook.relations import Relation
from hookbook.tokens import covering
from tests.support.real import real

COUNTRY = Relation(
    (
        ("Lyon", "France"),
        ("Kobe", "Japan"),
        ("Paris", "France"),
        ("Lima Town", "Peru"),
        ("Nice", "Atlantis"),
        ("Japan City", "Japan"),
        ("Turin", "Italy"),
    ),
    "country",
    templates=("{} is in",),
    phrase="the country of {}",
)
CAPITAL = Relation(
    (("France", "Paris"), ("Japan", "Tokyo"), ("Peru", "Lima"), ("Italy", "Rome")), "capital", templates=("The capital of {} is",)
)


def test_the_parts_of_a_question():
    lyon, kobe, turin = hops.chain(COUNTRY, CAPITAL)
    assert (lyon.text, lyon.answer, lyon.entity, lyon.bridge, lyon.chain) == (
        "The capital of the country of Lyon is",
        " Paris",
        "Lyon",
        "France",
        "country > capital",
    )
    assert lyon.text[lyon.start : lyon.end] == "the country of Lyon" and lyon.text[lyon.entity_start : lyon.entity_end] == "Lyon"
    assert (lyon.first.text, lyon.first.answer) == ("The country of Lyon is", " France")
    assert (lyon.second.text, lyon.second.answer) == ("The capital of France is", " Paris")
    assert (lyon.entity_shortcut.text, lyon.entity_shortcut.answer) == ("The capital of Lyon is", " Paris")
    assert (lyon.relation_shortcut.text, lyon.relation_shortcut.answer) == ("The capital of the country of is", " Paris")
    assert (kobe.entity, turin.entity) == ("Kobe", "Turin"), (
        "not where the answer is the entity, or the entity tells it, or the bridge leads nowhere"
    )


def test_questions_that_are_shown_tell_nothing():
    (kobe,) = [question for question in hops.chain(COUNTRY, CAPITAL, shots=2) if question.entity == "Kobe"]
    lines = kobe.text.split("\n")
    assert lines[2] == "The capital of the country of Kobe is" and {*lines[:2]} == {
        "The capital of the country of Lyon is Paris",
        "The capital of the country of Turin is Rome",
    }
    assert kobe.text[kobe.start : kobe.end] == "the country of Kobe" and kobe.start > len(lines[0])
    assert {*kobe.first.text.split("\n")} == {"The country of Lyon is France", "The country of Turin is Italy", "The country of Kobe is"}
    assert {*kobe.second.text.split("\n")} == {"The capital of France is Paris", "The capital of Italy is Rome", "The capital of Japan is"}
    assert {*kobe.entity_shortcut.text.split("\n")} == {
        "The capital of Lyon is Paris",
        "The capital of Turin is Rome",
        "The capital of Kobe is",
    }
    assert {*kobe.relation_shortcut.text.split("\n")} == {*lines[:2], "The capital of the country of is"}


def test_questions_are_drawn_by_seed():
    first, again, other = (hops.chain("city_country", "country_capital", 20, shots=2, seed=seed) for seed in (1, 1, 2))
    assert first == again != other and len({question.entity for question in first}) == 20
    every = hops.questions()
    assert len(every) > 600 and {question.chain for question in every} == {" > ".join(names) for names in hops.CHAINS}
    assert len(hops.questions(5)) == 5 * len(hops.CHAINS)


@pytest.mark.parametrize("shots", [0, 2])
def test_nothing_is_told(shots):
    """Of every question that ships: neither the bridge nor the answer is in its text, nor the answer in its shortcuts."""
    for question in hops.questions(shots=shots):
        text, bridge, answer = question.text.lower(), question.bridge.lower(), question.answer.strip().lower()
        assert bridge not in text and answer not in text and answer not in bridge and bridge not in answer
        assert bridge not in question.first.text.lower()
        for part in (question.second, question.entity_shortcut, question.relation_shortcut):
            assert answer not in part.text.lower() and part.answer == question.answer
        assert question.entity.lower() in question.first.text.lower() and text.count(question.entity.lower()) == 1


@pytest.mark.parametrize("name", ["gemma-3-270m", "smollm2-135m-instruct"])
def test_the_bridge_token_is_the_last_of_the_phrase(name):
    tokenizer = real(name)
    for question in hops.questions(40, shots=1):
        tokens = tokenizer.encode(question.text)
        bridge, entity = question.subject_at(tokens), question.entity_at(tokens)
        assert tokens.offsets is not None
        assert tokens.offsets[bridge][0] < question.end <= tokens.offsets[bridge][1] and entity[-1] == bridge
        told = question.text[tokens.offsets[entity[0]][0] : tokens.offsets[bridge][1]].strip()
        assert question.entity in told and len(told) <= len(question.entity) + 1
        assert covering(tokens, question.start, question.end)[-1] == bridge < len(tokens) - 1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: hops.chain(Relation(COUNTRY.pairs, "country", templates=("{} is in",)), CAPITAL), "has no phrase"),
        (lambda: hops.chain(CAPITAL, COUNTRY), "has no phrase"),
        (lambda: hops.chain(COUNTRY, COUNTRY), "no questions of 'country' and 'country'"),
        (lambda: hops.chain("country_capital", "present_past"), "is a subject of the second"),
        (lambda: hops.chain(COUNTRY, CAPITAL, shots=3), "3 questions to show.*there are 2"),
        (lambda: hops.chain(COUNTRY, CAPITAL, 0), "n=0"),
        (lambda: hops.chain(COUNTRY, CAPITAL, shots=-1), "shots=-1"),
        (lambda: hops.chain("city_county", "country_capital"), "no task 'city_county'"),
    ],
)
def test_relations_that_make_no_questions(make, words):
    with pytest.raises((DataError, TokenError), match=words):
        make()


def test_hops_are_part_of_the_interface():
    assert hb.hops is hops
