"""Relations: their data, their prompts, and where the subject is."""

from __future__ import annotations

import json

import pandas as pd
import pytest

import hookbook as hb
from hookbook import relations
from hookbook.errors import DataError
from hookbook.relations import Relation
from hookbook.tasks import QA, Task
from hookbook.testing import toy
from tests.support.real import real

PAIRS = (("Peru", "Lima"), ("Cuba", "Havana"), ("Chad", "N'Djamena"))
SENTENCE = "The capital of {} is"


def test_there_are_relations_of_facts_and_words():
    assert {"country_capital", "country_language", "country_currency", "city_country", "landmark_city", "book_author", "animal_young"} <= {
        *relations.names()
    }
    assert {"present_past", "adjective_comparative", "antonym", "singular_plural"} <= {*relations.names()}
    for name in relations.names():
        found = hb.relations.load(name)
        assert isinstance(found, Relation) and len(found) >= 40 and len(found.templates) >= 3 and "{}" in found.phrase
        assert found.pairs == hb.tasks.load(name).pairs, "the same facts as the task"
        assert not [t for t in found.templates if t.rstrip() != t or t.split("{}")[0].endswith(" a ")], (
            "ends where ' object' follows; no article that may not fit"
        )


@pytest.mark.parametrize("name", ["gemma-3-270m", "smollm2-135m-instruct"])
def test_the_subject_ends_at_its_own_token(name):
    """Of every pair that ships, also where the subject's text occurs in what is shown and in the sentence."""
    encode = real(name).encode
    for relation in map(hb.relations.load, relations.names()):
        for subject, _ in relation.pairs:
            asked = relation.ask(subject, relation.pairs[:2])
            tokens = encode(asked.text)
            at, (start, end) = asked.subject_at(tokens), (asked.start, asked.end)
            assert asked.text[start:end] == subject and tokens.offsets and tokens.offsets[at][0] < end <= tokens.offsets[at][1]


def test_a_subject_that_occurs_elsewhere_is_found_by_its_place():
    relation = Relation((("is", "was"), ("a", "b")), templates=("This is {} and is",))
    asked = relation.ask("is", relation.pairs)
    assert asked.text == "This is a and is b\nThis is is and is" and asked.answer == " was"
    tokens = toy().encode(asked.text)
    at = asked.subject_at(tokens)
    assert tokens.offsets and tokens.offsets[at][1] == len("This is a and is b\nThis is is") and tokens.strings[at] == "s"


def test_a_subject_may_end_the_prompt():
    asked = Relation(PAIRS, templates=("Country: {}",)).ask("Peru")
    tokens = toy().encode(asked.text)
    assert asked.subject_at(tokens) == len(tokens) - 1


def test_the_same_subject_is_not_shown():
    relation = Relation(PAIRS, templates=(SENTENCE,))
    assert relation.ask("Cuba", PAIRS).text == "The capital of Peru is Lima\nThe capital of Chad is N'Djamena\nThe capital of Cuba is"
    assert relation.ask("Fiji", PAIRS[:1], "Suva").answer == " Suva"


def test_a_relation_is_a_task():
    relation = hb.relations.load("country_capital")
    parts = relation.split(3)
    assert isinstance(parts.train, Relation) and parts.train.templates == relation.templates
    (question,) = parts.test.questions(n=1)
    assert question.text.startswith("The capital of ") and question.answer.startswith(" ")
    assert type(relation.with_template(QA)) is Task and relation.with_sentence("{}:").ask("Peru").text == "Peru:"


def test_files_and_tables(tmp_path):
    (tmp_path / "capitals.json").write_text(json.dumps({"pairs": PAIRS, "templates": [SENTENCE], "phrase": "the capital of {}"}))
    (tmp_path / "pairs.json").write_text(json.dumps(PAIRS))
    (tmp_path / "capitals.csv").write_text("input,output\n" + "\n".join(",".join(pair) for pair in PAIRS))
    whole = relations.load(tmp_path / "capitals.json")
    assert whole == Relation(PAIRS, "capitals", templates=(SENTENCE,), phrase="the capital of {}")
    for source in (tmp_path / "pairs.json", str(tmp_path / "capitals.csv"), pd.DataFrame(PAIRS)):
        assert relations.load(source, SENTENCE).pairs == PAIRS and relations.load(source, SENTENCE).templates == (SENTENCE,)
        with pytest.raises(DataError, match="has no templates"):
            relations.load(source)
    assert relations.load("country_capital", SENTENCE).templates == (SENTENCE,)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Relation(PAIRS), "has no templates"),
        (lambda: Relation(PAIRS, templates=("The capital is",)), "the subject is in it once"),
        (lambda: Relation(PAIRS, templates=("{} and {}",)), "the subject is in it once"),
        (lambda: Relation(PAIRS, templates=(SENTENCE,), phrase="the capital"), "the subject is in it once"),
        (lambda: Relation((), templates=(SENTENCE,)), "has no pairs"),
        (lambda: Relation((("Peru", "Lima"), ("Peru", "Cusco")), templates=(SENTENCE,)), "two outputs"),
        (lambda: Relation(PAIRS, templates=(SENTENCE,)).ask("Fiji"), "no subject 'Fiji'"),
        (lambda: hb.relations.load("capitalize"), "has no templates"),
        (lambda: hb.relations.load("capitals"), "no task 'capitals'"),
    ],
)
def test_bad_relations(make, words):
    with pytest.raises(DataError, match=words):
        make()
