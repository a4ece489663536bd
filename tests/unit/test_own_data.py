"""Pairs that users bring are read as they are meant, or refused with the line that is wrong; nothing is dropped or filled in silence."""

from __future__ import annotations

import json
import logging
import re

import numpy as np
import pandas as pd
import pytest

import hookbook as hb
from hookbook.asking import encode_questions
from hookbook.errors import DataError
from hookbook.tasks import Contrast, Question, Task
from hookbook.testing import toy

WANT = (("France", "Paris"), ("Peru", "Lima"))
TEMPLATE = "The capital of {} is"


def frame(**columns: object) -> pd.DataFrame:
    return pd.DataFrame(columns)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "France,Paris\nPeru,Lima\n"),
        ("a.CSV", "France,Paris\r\nPeru,Lima"),
        ("a.csv", "\ufeffFrance,Paris\nPeru,Lima\n"),
        ("a.csv", "France;Paris\nPeru;Lima\n"),
        ("a.csv", "France\tParis\nPeru\tLima\n"),
        ("a.tsv", "France\tParis\nPeru\tLima\n"),
        ("a.csv", ' France , "Paris"\n\n"Peru",Lima \n,\n'),
        ("a.csv", "\ufeffinput,output\nFrance,Paris\nPeru,Lima\n"),
        ("a.csv", "Country;Capital city\nFrance;Paris\nPeru;Lima\n"),
        ("a.csv", "pays,capitale\nFrance,Paris\nPeru,Lima\n"),
        ("a.json", json.dumps(WANT)),
        ("a.JSON", "\ufeff" + json.dumps({"pairs": WANT})),
        ("a.json", json.dumps([["country", "capital"], *WANT])),
        ("a.json", json.dumps(dict(WANT))),
        ("a.json", json.dumps([{"country": x, "capital": y} for x, y in WANT])),
        ("a.json", json.dumps({"input": ["France", "Peru"], "output": ["Paris", "Lima"]})),
    ],
)
def test_a_file_is_read_as_it_is_meant(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert hb.tasks.load(tmp_path / name).pairs == hb.tasks.load(str(tmp_path / name)).pairs == WANT
    assert hb.relations.load(tmp_path / name, TEMPLATE).pairs == WANT


@pytest.mark.parametrize(
    "source",
    [
        list(WANT),
        [list(pair) for pair in WANT],
        (pair for pair in WANT),
        dict(WANT),
        np.array(WANT),
        pd.DataFrame(WANT),
        frame(country=["France ", "Peru"], capital=["Paris", "\tLima"]),
        Task(WANT),
        Task((("France ", " Paris"), ("Peru\n", "Lima"))),
    ],
    ids=lambda source: type(source).__name__,
)
def test_pairs_of_any_kind_are_taken(source):
    assert hb.tasks.load(source).pairs == WANT


def test_the_columns_and_the_header_can_be_named(tmp_path):
    path, cells = tmp_path / "a.csv", frame(id=[1, 2], country=["France", "Peru"], capital=["Paris", "Lima"])
    cells.to_csv(path, index=False)
    for source in (cells, path, cells.to_dict("records"), cells.to_dict("list")):
        assert hb.tasks.load(source, columns=("country", "capital")).pairs == WANT
        assert hb.tasks.load(source, columns=("capital", "id")).pairs == (("Paris", "1"), ("Lima", "2"))
        assert hb.relations.load(source, TEMPLATE, columns=("country", "capital")).pairs == WANT
    assert hb.tasks.load(path, header=True, columns=(1, 2)).pairs == hb.tasks.load(cells, columns=(1, 2)).pairs == WANT
    path.write_text("present,past\ngo,went\n")
    assert hb.tasks.load(path).pairs == hb.tasks.load(path, header=True).pairs == (("go", "went"),)
    assert hb.tasks.load(path, header=False).pairs == hb.tasks.load([("present", "past"), ("go", "went")]).pairs
    path.write_text("big,small\nhot,cold\n")
    assert hb.tasks.load(path).pairs == (("big", "small"), ("hot", "cold"))
    assert hb.tasks.load(path, header=True).pairs == hb.tasks.load([("big", "small"), ("hot", "cold")], header=True).pairs


@pytest.mark.parametrize(
    ("text", "header", "said"),
    [
        ("country,capital\nFrance,Paris\n", None, "line 1 .*taken as the names of columns: say header=False"),
        ("big,small\nhot,cold\n", None, "line 1 .*taken as a pair: say header=True"),
        ("country,capital\nFrance,Paris\n", True, ""),
        ("big,small\nhot,cold\n", False, ""),
    ],
)
def test_what_is_made_of_the_first_line_is_said(tmp_path, caplog, text, header, said):
    (tmp_path / "a.csv").write_text(text)
    with caplog.at_level(logging.WARNING):
        hb.tasks.load(tmp_path / "a.csv", header=header)
    assert [bool(re.search(said, record.getMessage())) for record in caplog.records] == [True] * bool(said)


def test_texts_are_kept_as_they_are_written(tmp_path):
    """The country code NA, numbers, quoted commas, quotation marks and line breaks."""
    path = tmp_path / "a.csv"
    path.write_text('NA,Namibia\n1,1.50\n"a, b","say ""no"""\n"two\nlines",nan\n')
    want = (("NA", "Namibia"), ("1", "1.50"), ("a, b", 'say "no"'), ("two\nlines", "nan"))
    assert hb.tasks.load(path, header=False).pairs == want
    assert hb.tasks.load([(3, np.int64(9))]).pairs == hb.tasks.load(frame(x=[3], y=[9])).pairs == (("3", "9"),)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "France,Paris,x\nPeru,Lima,y\n", "where there are 3: a pair is two texts.*columns="),
        ("a.csv", "country,capital,x\nPeru,Lima,y\n", "where there are 3"),
        ("a.csv", "France,Paris\nPeru\n", r"line 2 of .*a\.csv: it has 1 cells, and those before 2"),
        ("a.csv", "France,Paris\n\nPeru,\n", "line 3 .*a cell is empty"),
        ("a.csv", "France,Paris\nWashington, D.C.,USA\n", "line 2 .*it has 3 cells"),
        ("a.csv", "Lyon, France;Paris\nNice, France;Paris\n", "can be cut at ',' and at ';'"),
        ("a.csv", "France\nPeru\n", "line 1 .*it has 1 cells"),
        ("a.csv", 'France,Paris\n"Peru,Lima\n', "line 2 .*unexpected end"),
        ("a.tsv", "France,Paris\n", "line 1 .*separate two cells by '\\\\t'"),
        ("a.csv", "", "has no pairs"),
        ("a.csv", "country,capital\n", "has no pairs"),
        ("none.csv", None, "cannot be read: FileNotFoundError"),
        ("a.json", "{", "cannot be read: JSONDecodeError"),
        ("a.json", '["France", "Paris"]', "entry 1, 'France': it is not a pair"),
        ("a.json", '[["France", "Paris"], ["Peru", null]]', r"entry 2 of .*a\.json: a cell is empty"),
        ("a.json", '[["France", ["Paris"]]]', r"entry 1 .*\['Paris'\] is not one text"),
        ("a.json", "[[1, 2.5]]", "2.5 may be written in several ways"),
        ("a.json", "[[true, 2]]", "True may be written in several ways"),
        ("a.json", '[["a", "b"], ["c", "d", "e"]]', "entry 2 .*it has 3 cells"),
        ("a.json", '{"input": ["a", "b"], "output": ["c"]}', r"have \[2, 1\] cells"),
        ("a.json", '{"France": ["Paris"], "Peru": ["Lima"]}', "may be columns, or several answers"),
        ("a.json", '[{"input": "a", "output": "b"}, {"input": "c", "answer": "d"}]', "where there are .*answer"),
        ("a.json", '"b.json"', "str is no pairs"),
        ("a.xlsx", "", "no task .*or a .json, .csv or .tsv file"),
    ],
)
def test_a_file_is_refused_with_its_line_and_the_cause(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    for load in (hb.tasks.load, lambda path: hb.relations.load(path, TEMPLATE)):
        with pytest.raises(DataError, match=words):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (frame(x=["a", "b"], y=["c", None]), "row 1 of the frame: a cell is empty.*keep_default_na=False"),
        (frame(x=["a", pd.NA], y=["c", "d"]), "row 1 of the frame: a cell is empty"),
        (frame(x=["a", "b"], y=[float("nan"), "d"]), "row 0 of the frame: a cell is empty"),
        (frame(x=["a", "b"], y=[1, None]), "row 0 of the frame: 1.0 may be written"),
        (frame(x=["a"], y=["b"], z=["c"]), r"where there are \['x', 'y', 'z'\]"),
        (frame(x=["a"]), "a pair is two texts"),
        (["ab", "cd"], "entry 1, 'ab': it is not a pair"),
        ([("a", "b"), ("c", " ")], "entry 2: a cell is empty"),
        ({"a": None}, "entry 1: a cell is empty"),
        (None, "NoneType is no pairs"),
        (5, "int is no pairs"),
        ([], "has no pairs"),
    ],
    ids=str,
)
def test_what_holds_no_pairs_is_refused_in_words(source, words):
    with pytest.raises(DataError, match=words):
        hb.tasks.load(source)


@pytest.mark.parametrize("pairs", [("ab", "cd"), (("a", "b", "c"),), (("a", 3),), (5,)])
def test_a_task_takes_no_letters_for_a_pair(pairs):
    with pytest.raises(DataError, match="input and output are texts"):
        Task(pairs)


def test_a_relation_of_a_dict_a_relation_and_its_file_are_one(tmp_path):
    whole = {"pairs": WANT, "templates": TEMPLATE, "phrase": "the capital of {}"}
    (tmp_path / "pairs.JSON").write_text(json.dumps(whole))
    want = hb.Relation(WANT, "pairs", templates=(TEMPLATE,), phrase="the capital of {}")
    assert hb.relations.load(whole) == hb.relations.load(tmp_path / "pairs.JSON") == hb.relations.load(want) == want
    assert hb.relations.load(want, "{}:").templates == ("{}:",) and hb.relations.load(want, "{}:").phrase == want.phrase
    (found,) = hb.hops.chain({"pairs": {"Lyon": "France"}, "templates": "{} is in", "phrase": "the country of {}"}, want)
    assert found.text == "The capital of the country of Lyon is" and found.answer == " Paris"


def test_contrasts_are_tables_of_two_columns(tmp_path):
    want = Contrast(("good ", "fine"), ("bad", "poor"))
    table = frame(negative=want.negative, positive=want.positive, id=[1, 2])
    table.to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "a.json").write_text(json.dumps({**want._asdict(), "from": "us"}))
    for source in (table, tmp_path / "a.csv", str(tmp_path / "a.json"), want._asdict()):
        assert hb.tasks.contrast(source) == want
    for bad, words in [
        ({"positive": "good", "negative": "bad"}, "one is no list"),
        ({"positive": ["good", "fine"], "negative": ["bad"]}, r"have \[2, 1\] cells"),
        ({"positive": ["good"]}, "one is no list"),
        ({"positive": ["good"], "negative": [None]}, "entry 1: a cell is empty"),
        ({"positive": [], "negative": []}, "has no texts"),
        (frame(a=["x"], b=["y"]), r"where there are \['a', 'b'\]"),
    ]:
        with pytest.raises(DataError, match=words):
            hb.tasks.contrast(bad)


def test_pairs_of_a_frame_make_an_in_context_vector():
    pairs = [("bad", "good"), ("sad", "glad"), ("no", "yes")]
    found, want = (hb.in_context_vector(toy(), some) for some in (pd.DataFrame(pairs, columns=["from", "to"]), pairs))
    assert (found.values == want.values).all()


def test_answers_that_all_begin_alike_are_said(caplog):
    asked = [Question("one:", " ab"), Question("two:", " ac")]
    with caplog.at_level(logging.WARNING):
        _, ids = encode_questions(toy(), asked)
        assert len({*ids.tolist()}) == 1 and "all 2 answers begin with the token ' '" in caplog.text
        caplog.clear()
        encode_questions(toy(), [Question("one:", "ab"), Question("two:", "cd")])
        encode_questions(toy(), asked[:1])
    assert not caplog.records
