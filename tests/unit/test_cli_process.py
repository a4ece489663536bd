"""The command as a process, what it draws and prints, its help, and its completions."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.cells import cell_len

import hookbook as hb
from hookbook.cli import commands, demo, output, recipes, tables
from hookbook.models import doctor, loading
from hookbook.reproduce import suite
from hookbook.testing import toy
from tests.support.needs import require
from tests.unit.test_cli import rows


@pytest.mark.parametrize("encoding", ["cp1252", pytest.param("ascii", marks=pytest.mark.whole)])
def test_data_is_utf8_whatever_the_terminal_has(folder, encoding):
    for option, read in (("--json", json.loads), ("--csv", lambda text: rows(pd.read_csv(io.StringIO(text))))):
        words = [sys.executable, "-m", "hookbook", "lens", "北京 é", "--model", str(folder), "--layers", "0", option]
        done = subprocess.run(words, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
        assert done.returncode == 0 and read(done.stdout.decode())[0]["prompt"] == "北京 é", done.stderr
    done = subprocess.run(words[:-1], capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})
    assert done.returncode == 0 and "\\u5317" in done.stdout.decode("ascii", "replace"), done.stderr


def test_json_has_no_number_that_is_none():
    given = {"a": float("nan"), "b": {"c": [float("inf"), 1.5]}, "d": "é"}
    assert json.loads(output.to_json([given]), parse_constant=pytest.fail) == [{"a": None, "b": {"c": [None, 1.5]}, "d": "é"}]


def test_csv_with_line_ends_of_every_kind_is_read_back():
    frame = pd.DataFrame({"token": ["a\rb", "\n", "\r\n", 'c,"d'], "p": [0.5, 1.0, float("nan"), 0.25]})
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(suite.to_csv(frame), newline="")), frame)


def test_a_report_without_its_library_is_refused_at_once(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "circuitsvis", None)
    code, out, err = run("lens one --report new.html --save new.safetensors")
    assert (code, out) == (1, "") and 'pip install "hookbook[viz]"' in err and "loading" not in err


def test_a_cell_has_its_probability_whatever_the_token(folder):
    grid = hb.logit_lens(hb.load(str(folder)), ["one", "two"])
    for word, chance, says in (("一二三四五六七八", 0.25, ".25"), ("ab", float("nan"), "nan"), ("ab", 1.0, "1.0"), ("一二", 0.0, ".00")):
        made = replace(grid, vocab=dict.fromkeys(grid.vocab, word), logprobs=torch.full_like(grid.logprobs, chance).log())
        text = tables._cell(made, 0, 0).plain
        assert text.endswith(f" {says}") and cell_len(text) == tables.CELL


def test_a_long_prompt_and_what_a_terminal_would_obey_are_not_a_title(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, _ = run(["lens", "\x1b[31mab\n" * 20 + "the end"])
    assert code == 0 and "\x1b" not in out and "the end" in out and len(out.splitlines()) < 15


def test_a_model_of_one_layer_has_a_demo(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "load", lambda *given: toy(n_layers=1, n_ctx=300))
    demo.demo("toy", "transformer_lens", "ab", "ab", tmp_path / "x.html")
    assert "Report: " in capsys.readouterr().out and "nats away" not in (tmp_path / "x.html").read_text()


def test_the_names_are_those_of_load():
    assert tuple(loading.BACKENDS) == commands.BACKENDS


def test_a_picture_that_fails_leaves_neither_file(run, tmp_path, monkeypatch):
    (tmp_path / "x.svg").write_text("old")
    monkeypatch.setattr(hb.LogitLens, "plot", lambda self: (_ for _ in ()).throw(hb.errors.DataError("no picture")))
    code, out, err = run(f"lens one --save {tmp_path}/x.safetensors --plot {tmp_path}/x.svg --force")
    assert (code, out) == (1, "") and "no picture" in err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_report_is_a_page(run, tmp_path):
    assert run(f"lens one --report {tmp_path}/x.html")[0] == 0
    assert "<html" in (tmp_path / "x.html").read_text() and [path.name for path in tmp_path.iterdir()] == ["x.html"]


def start(words: list[str], folder: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "hookbook", *words], capture_output=True, text=True, cwd=folder, env=os.environ | env)


def test_a_process_separates_the_result_from_notes(folder):
    done = start(["lens", "one", "--json", "--model", str(folder)], folder)
    assert done.returncode == 0 and json.loads(done.stdout) and "loading" in done.stderr
    assert (
        (wrong := start(["task-vector", "none"], folder)).returncode == 1
        and not wrong.stdout
        and wrong.stderr.startswith("DataError: no task 'none'")
    )
    assert (usage := start(["lens"], folder)).returncode == 2 and not usage.stdout and "Missing argument" in usage.stderr


@pytest.mark.parametrize(
    "words, names",
    [
        ("hookbook lens x --model gem", {"gemma-3-270m"}),
        ("hookbook doctor smol", {"smollm2-135m-instruct"}),
        ("hookbook task-vector country_", {"country_capital", "country_continent", "country_currency", "country_language"}),
        ("hookbook relation cop", set()),  # a task without sentences
        ("hookbook relation landmark_", {"landmark_city", "landmark_country"}),
        ("hookbook steer s", {"sentiment", "sycophancy"}),
        ("hookbook patchscope x --target E", {"ENTITY_DESCRIPTION"}),
        ("hookbook lens x --backend nn", {"nnsight"}),
    ],
)
def test_names_are_completed(folder, words, names):
    done = start([], folder, _HOOKBOOK_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split()) - 1))
    assert set(done.stdout.split()) == names, done.stderr


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in recipes.COMMANDS), ["demo", "--help"], ["doctor", "--help"]])
def test_help_imports_no_torch(words):
    code = f"""
import sys
from hookbook import cli
try:
    cli._app()({words}, standalone_mode=False)
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False" and ("Example: hookbook" in done.stdout or words == ["--help"])


def test_examples_in_help_are_right(run, monkeypatch):
    class Loaded(Exception):
        pass

    def load(*args, **settings):
        raise Loaded

    monkeypatch.setattr(hb, "load", load)
    examples = [example for _, _, several in recipes.COMMANDS.values() for example in several]
    assert len(examples) == 2 * len(recipes.COMMANDS)
    for example in examples:
        assert example.startswith("hookbook ")
        with pytest.raises(Loaded):
            run(example.removeprefix("hookbook "))


def test_layers_are_read_as_they_are_written():
    assert commands.layers("all") == "all" and commands.layers("same", "same") == "same"
    assert commands.layers("0, 4-6,-1,mlp_out.3") == [0, 4, 5, 6, -1, hb.Site("mlp_out", 3)]
    assert (commands.position("-2"), commands.position("all"), commands.position("Paris")) == (-2, slice(None), "Paris")


def test_the_doctor_prints_what_it_finds(run, folder, monkeypatch):
    require("nnsight")
    code, out, _ = run(["doctor", str(folder), "--json"])
    found = json.loads(out)
    assert code == 0 and [finding["what"] for finding in found if finding["what"].startswith("TransformerBridge")] == [
        "TransformerBridge: 26 sites of 3 layers",
        "TransformerBridge: logits",
        "TransformerBridge: greedy continuation of 8 tokens",
        "TransformerBridge: passes of 128 tokens and more",
    ]
    monkeypatch.setattr(doctor, "TOLERANCE", 0.0)
    code, out, _ = run(["doctor", str(folder)])
    assert code == 1 and "✗ TransformerBridge: 26 sites of 3 layers: embed differs first" in out and "✓ TransformerBridge: greedy" in out
    code, out, _ = run(["doctor"])
    assert code == 0 and ('pip install "hookbook[demo]"' in out or "gemma-3-270m: installed" in out)


def test_an_error_keeps_its_brackets(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run("lens one --plot new.png")
    assert code == 1 and 'pip install "hookbook[viz]"' in err and "loading" not in err
