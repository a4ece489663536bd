"""Tasks: what ships is sound, splits leak nothing, prompts are what papers show, and bad data is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import hookbook as hb
from hookbook.errors import DataError
from hookbook.tasks import ARROW, QA, Task, lists, load, names

LETTERS = Task(tuple((letter, letter.upper()) for letter in "abcdefghijkl"), "letters")


@pytest.mark.parametrize("name", names())
def test_a_task_that_ships_is_a_function_of_clean_words(name):
    task = load(name)
    inputs = [x.lower() for x, _ in task.pairs]
    assert len(task) >= 40 and len(set(inputs)) == len(inputs)
    assert all(text == text.strip() and "\n" not in text for pair in task.pairs for text in pair)


def test_there_are_enough_tasks_of_enough_pairs():
    assert sum(len(load(name)) >= 80 for name in names()) >= 14


def test_facts_everybody_knows():
    assert dict(load("country_capital").pairs)["France"] == "Paris" and dict(load("singular_plural").pairs)["child"] == "children"
    assert dict(load("present_past").pairs)["go"] == "went" and dict(load("english_french").pairs)["water"] == "eau"
    assert dict(load("capitalize").pairs)["apple"] == "Apple"


def test_prompts_are_the_papers():
    pairs = (("Italy", "Rome"), ("Russia", "Moscow"))
    assert QA.prompt(pairs, "Japan") == "Q: Italy\nA: Rome\n\nQ: Russia\nA: Moscow\n\nQ: Japan\nA:"
    assert ARROW.prompt(pairs[:1], "Japan") == "example:Italy->Rome\nexample:Japan->"
    question = Task(pairs, "capital").questions(shots=1, n=1)[0]
    assert question.text in ("Q: Italy\nA: Rome\n\nQ: Russia\nA:", "Q: Russia\nA: Moscow\n\nQ: Italy\nA:") and question.answer in (
        " Moscow",
        " Rome",
    )


class Cuts:
    """A tokenizer that knows some texts whole, and others letter by letter."""

    def __init__(self, *whole: str) -> None:
        self.whole = whole

    def __call__(self, text: str, add_special_tokens: bool = True) -> Cuts:
        assert text[0] == "!" and not add_special_tokens
        self.input_ids = [0, 1] if text[1:] in self.whole else [0] * len(text)
        return self


def test_spaces_are_put_where_as_many_outputs_are_one_token_with_them():
    """By the authors' rule: with spaces, if at least 0.7 times as many outputs are one token so."""
    words = [f"word{i}" for i in range(12)]
    task = Task(tuple((f"in{i}", word) for i, word in enumerate(words)), "words", ARROW)
    for plain, spaced, form in ((10, 7, " "), (10, 6, ""), (0, 0, " "), (12, 12, " "), (1, 0, "")):
        found = task.fitted(Cuts(*words[:plain], *(f" {word}" for word in words[:spaced])))
        assert found.template.prompt(task.pairs[:1], "in5") == f"example:{form}in0->{form}word0\nexample:{form}in5->"
        assert found.pairs == task.pairs and found.fitted(Cuts()) == found and str(found.template) == f"example:{form}{{}}->{form}{{}}"
    for template in (QA, ARROW.spaced, replace(ARROW, spaced=None)):
        assert task.with_template(template).fitted(None).template is template  # of one form there is nothing to ask


def test_splits_are_the_same_whatever_the_order_and_share_nothing():
    parts, again = LETTERS.split(3), Task(LETTERS.pairs[::-1], "letters").split(3)
    assert parts == again != LETTERS.split(4)
    sets = [set(part.pairs) for part in (parts.train, parts.validation, parts.test)]
    assert [len(some) for some in sets] == [6, 3, 3] and set().union(*sets) == set(LETTERS.pairs)
    with pytest.raises(DataError, match="3 pairs.*one would be empty|2 pairs"):
        Task(LETTERS.pairs[:2], "two").split()


def test_what_is_shown_never_holds_the_query():
    for shuffled in (False, True):
        for question in LETTERS.questions(shots=5, n=40, shuffled=shuffled):
            shown, _, query = question.text.rpartition("\n\n")
            letter = query[3]
            pairs = dict(block.removeprefix("Q: ").split("\nA: ") for block in shown.split("\n\n"))
            assert letter not in pairs and len(pairs) == 5 and question.answer == " " + letter.upper()
            assert all((y == x.upper()) is not shuffled for x, y in pairs.items())
    assert LETTERS.questions(shots=2, n=3) == LETTERS.questions(shots=2, n=3) != LETTERS.questions(shots=2, n=3, seed=1)
    train, test = Task(LETTERS.pairs[:6], "a"), Task(LETTERS.pairs[6:], "b")
    assert all(set(q.text.split("Q: ")[1:-1]) <= {f"{x}\nA: {y}\n\n" for x, y in train.pairs} for q in test.questions(train, 3))
    with pytest.raises(DataError, match="12 pairs to show"):
        LETTERS.questions(shots=12)


def test_lists_ask_for_one_item():
    task = lists(LETTERS, "last", n=30)
    assert len(task) == 30 and all(y == x.split(", ")[-1].upper() for x, y in task.pairs)
    assert all(y == x.split(", ")[0] for x, y in load("copy:first").pairs) and len(load("country_capital:last")) == 200
    with pytest.raises(DataError, match="first or last"):
        load("copy:middle")


def test_files_and_frames(tmp_path):
    import pandas as pd

    (tmp_path / "a.json").write_text(json.dumps([["x", "y"], ["z", "w"]]))
    (tmp_path / "b.json").write_text(json.dumps({"pairs": [["x", "y"], ["z", "w"]]}))
    (tmp_path / "c.csv").write_text('input,output\nx,y\n"z",w\n')
    want = (("x", "y"), ("z", "w"))
    assert load(tmp_path / "a.json").pairs == load(str(tmp_path / "b.json")).pairs == load(tmp_path / "c.csv").pairs == want
    assert load(pd.DataFrame({"in": ["x", "z"], "out": ["y", "w"]})).pairs == want
    (tmp_path / "d.json").write_text("{")
    for bad in ("d.json", "none.csv"):
        with pytest.raises(DataError, match="cannot be read"):
            load(tmp_path / bad)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ((), "no pairs"),
        ((("a", "b"), ("a", "c")), "two outputs of 'a'"),
        ((("a", " "),), "input and output are texts"),
        ((("a", 3),), "are texts"),
    ],
)
def test_bad_pairs_are_refused(pairs, words):
    with pytest.raises(DataError, match=words):
        Task(pairs)


def test_an_unknown_task_names_those_there_are():
    with pytest.raises(DataError, match="no task 'capitals'.*country_capital"):
        hb.tasks.load("capitals")


@pytest.mark.parametrize("name", ["sycophancy", "truthfulness"])
def test_questions_about_a_contrast_of_conversations_are_new(name):
    """Sixty pairs and more, that differ in the answer alone; a claim that is asked about is in no conversation, and in one part."""
    positive, negative = hb.tasks.contrast(name)
    assert len(positive) == len(negative) >= 60 and len({one[0]["content"] for one in positive}) == len(positive)
    for one, other in zip(positive, negative, strict=True):
        assert one[0] == other[0] and one[1]["role"] == other[1]["role"] == "assistant" and one[1]["content"] != other[1]["content"]
    parts = {part: hb.tasks.choices(name, part) for part in ("choose", "first", "second")}
    claims = [one.question.split(" that ", 1)[1] for some in parts.values() for one in some[::2]]
    assert [len(some) for some in parts.values()] == [24, 48, 48]
    said = " ".join(message["content"] for one in (*positive, *negative) for message in one).lower()
    for claim in claims:
        assert claim.split(".")[0].split("?")[0].lower() not in said and claims.count(claim) == 1
    for some in parts.values():
        for one, other in zip(some[::2], some[1::2], strict=True):
            assert len({one.positive, one.negative, other.positive, other.negative}) == 4 and one.question != other.question
    with pytest.raises(DataError, match="no 'third' of the questions.*choose, first, second"):
        hb.tasks.choices(name, "third")
    with pytest.raises(DataError, match="no 'sentiment' as questions.*sycophancy, truthfulness"):
        hb.tasks.choices("sentiment")


def test_requests_to_decline_are_of_one_topic_and_shared_by_no_parts():
    before, requests = hb.tasks.declined()
    every = [one for some in requests.values() for one in some]
    assert {part: len(some) for part, some in requests.items()} == {"make": 48, "first": 24, "second": 24}
    assert len(set(every)) == len(every) and not {one["content"] for one in before} & set(every)
    refused = [after["content"] for after in before if after["role"] == "assistant" and "sorry" in after["content"]]
    assert len(refused) == 3 == sum(one["role"] == "assistant" for one in before) / 2
