"""The `hookbook` command on the real model: a few of the examples in its help, and the doctor."""

from __future__ import annotations

import json
import shlex
import sys

import pytest

import hookbook as hb
from hookbook import cli
from hookbook.cli import recipes
from tests.support.real import real


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command line; the model is loaded once for all."""
    loaded = real("gemma-3-270m")
    monkeypatch.setattr(hb, "load", lambda *given, **settings: loaded)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def call(line: str) -> str:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        return capsys.readouterr().out

    return call


def test_what_every_layer_says_of_the_eiffel_tower(run):
    patchscope, _ = recipes.COMMANDS["patchscope"][2]
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in run(patchscope).splitlines() if line.startswith("│")]
    assert [line[0] for line in lines] == [*map(str, range(18)), "unpatched"]
    assert lines[16][1] == "Paris" and float(lines[16][2]) > 0.5 and lines[-1][1] == "->"
    lens, _ = recipes.COMMANDS["lens"][2]
    found = [row for row in json.loads(run(f"{lens} --json")) if row["rank"] == 0]
    assert [row["layer"] for row in found] == list(range(18)) and found[-1]["token"] == " Paris" and found[-1]["rank  Paris"] == 0
    assert found[0]["rank  Paris"] > 1000 and found[-1]["kl"] == 0


def test_steering_moves_the_next_word(run):
    sentiment, french = recipes.COMMANDS["steer"][2]
    found = json.loads(run(f"{sentiment} --json"))
    score = {(row["vector"], row["layer"], row["strength"]): row["score"] for row in found}
    assert score["vector", 13, 2.0] > score["none", None, 0.0] > score["vector", 13, -2.0]
    assert score["vector", 13, 2.0] - score["vector", 13, -2.0] > 2 * abs(score["random", 13, 2.0] - score["random", 13, -2.0])
    assert "french_score" in run(french)


@pytest.mark.parametrize(
    "line, kind",
    [
        ("task-vector country_capital --layers 8-10 --shots 5 --n-prompts 8 --queries 12", hb.TaskVectors),
        pytest.param("relation landmark_city --layers 8 --n-train 2 --queries 12", hb.LinearRelation, marks=pytest.mark.whole),
    ],
)
def test_the_table_says_what_the_result_says(run, line, kind):
    says = " ".join(run(f"hookbook {line} --save found.safetensors").split())
    found = kind.load("found.safetensors")
    share = found.accuracy if kind is hb.TaskVectors else found.faithfulness
    share, random = float(share[found.best_index]), float(found.controls["random"][found.best_index])
    assert share > random and f"At {found.sites[found.best_index]}, chosen on validation pairs" in says
    assert f"{share:.0%} of" in says and f"random {random:.0%}" in says
