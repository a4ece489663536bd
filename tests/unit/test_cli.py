"""The `hookbook` command on a tiny random model: it prints what the recipes give, says what is wrong before it loads a model, and leaves
nothing behind."""

from __future__ import annotations

import inspect
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.cells import cell_len
from transformers import AutoModelForCausalLM, GPT2Config

import hookbook as hb
from hookbook import cli
from hookbook.cli import demo, output, recipes, tables
from hookbook.models import doctor, loading
from hookbook.reproduce import suite
from hookbook.testing import toy, toy_tokenizer
from tests.support.needs import require

PAIRS = [[x, x.upper()] for x in ("ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr", "st", "uv", "wx")]
TEXTS = {"positive": ["ab", "ac", "ad", "ae"], "negative": ["xb", "xc", "xd", "xe"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model that often says a space, with which answers begin; and data."""
    require("transformer_lens")
    folder = tmp_path_factory.mktemp("model")
    names = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=256, initializer_range=0.25, **names)
        )
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(0.3)
        model.transformer.wte.weight[toy_tokenizer().encode(" ")[-1]].fill_(1.0)
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    (folder / "pairs.json").write_text(json.dumps(PAIRS))
    (folder / "other.csv").write_text("input,output\n" + "".join(f"{x}{x},{x}\n" for x in "abcdefgh"))
    (folder / "rel.json").write_text(json.dumps({"pairs": PAIRS, "templates": ["{} is"]}))
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    (folder / "folder.png").mkdir()
    (folder / "folder.html").mkdir()
    (folder / "page.html").write_text("mine")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs a command line in the folder: exit code, stdout and stderr."""

    def call(line: str | list[str]) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        words = shlex.split(line) if isinstance(line, str) else line
        own = ["--model", str(folder)] if words[0] in recipes.COMMANDS and "--model" not in words else []
        monkeypatch.setattr(sys, "argv", ["hookbook", *words, *own])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        code = stopped.value.code
        out, err = capsys.readouterr()
        return int(code or 0), out, err

    return call


def steered(model, **settings):
    found = hb.contrast_vector(
        model, TEXTS["positive"], TEXTS["negative"], layers=[1, 2], position=slice(None), held_out=0.5, site="resid_pre"
    )
    return hb.steer(model, found, ["ab", "the"], **settings)


COMMANDS = {
    'patchscope "one two"': lambda model: hb.patchscope(model, "one two"),
    'patchscope one "[/red] two" --target-layers all --source-layers 0,-1 -k 2': lambda model: hb.patchscope(
        model, ["one", "[/red] two"], target_layers="all", source_layers=[0, -1], k=2
    ),
    (
        'patchscope one none --source-layers mlp_out.1 --target-layers 0-1 --source-position ne --target "a [x] b" '
        '--target-position x --generate 3 --token " "'
    ): lambda model: hb.patchscope(
        model,
        ["one", "none"],
        source_layers=["mlp_out.1"],
        target_layers=[0, 1],
        source_position=-1,
        target="a [x] b",
        target_position="x",
        generate=3,
        tokens=[" "],
    ),
    "patchscope one --target ENTITY_DESCRIPTION --generate 2 --backend nnsight": lambda model: hb.patchscope(
        model, "one", target=hb.prompts.ENTITY_DESCRIPTION, generate=2
    ),
    'lens "one two" --token " " --token a --layers 0,resid_pre.1': lambda model: hb.logit_lens(
        model, "one two", tokens=[" ", "a"], layers=[0, "resid_pre.1"]
    ),
    "lens one two": lambda model: hb.logit_lens(model, ["one", "two"]),
    "lens one two -k 2 --position all": lambda model: hb.logit_lens(model, ["one", "two"], k=2, position=slice(None)),
    "task-vector pairs.json --other other.csv --shots 2 --n-prompts 4 --queries 3 --seed 1": lambda model: hb.task_vector(
        model, hb.tasks.load("pairs.json"), other=hb.tasks.load("other.csv"), shots=2, n_prompts=4, queries=3, seed=1
    ),
    "task-vector antonym --mode difference --layer 1 --shots 1 --n-prompts 3 --queries 2": lambda model: hb.task_vector(
        model, hb.tasks.load("antonym"), mode="difference", layers=1, shots=1, n_prompts=3, queries=2
    ),
    "relation rel.json --n-train 2 --layers 0-1 --ridge 0.1": lambda model: hb.linear_relation(
        model, hb.relations.load("rel.json"), n_train=2, layers=[0, 1], ridge=0.1
    ),
    'relation pairs.json --template "{} as" --n-train 1 --queries 3 --seed 2': lambda model: hb.linear_relation(
        model, hb.relations.load("pairs.json", "{} as"), n_train=1, queries=3, seed=2
    ),
    "backpatch city_country country_capital -n 4 --position bridge --seed 3": lambda model: hb.backpatch(
        model, hb.hops.chain("city_country", "country_capital", 4, seed=3), position="bridge", seed=3
    ),
    "backpatch -n 1 --generate 2": lambda model: hb.backpatch(model, hb.hops.questions(1), generate=2),
    (
        "steer texts.json --prompt ab --prompt the --layers 1-2 --position all --held-out 0.5 --site resid_pre "
        '--toward a --against b --against "["'
    ): lambda model: steered(model, tokens=(["a"], ["b", "["])),
    (
        "steer texts.json --prompt ab --prompt the --layers 1,2 --position all --held-out 0.5 --site resid_pre "
        "--score refusal --generate 3 --strength -1 --strength 0.5"
    ): lambda model: steered(model, score=hb.scores.refusal_score, generate=3, strengths=[-1, 0.5]),
}


def rows(frame: pd.DataFrame) -> list[dict]:
    """A frame as plain rows; what is no number is None."""
    return [
        {key: None if pd.isna(value) else value for key, value in zip(frame.columns, row, strict=True)}
        for row in frame.itertuples(index=False)
    ]


@pytest.mark.parametrize("line", COMMANDS)
def test_json_is_the_frame_of_the_recipe_and_nothing_else(run, folder, line):
    require("nnsight")
    code, out, err = run(f"{line} --json")
    assert code == 0 and "loading" in err, err
    frame = COMMANDS[line](hb.load(str(folder), "nnsight" if "nnsight" in line else "transformer_lens")).to_frame()
    assert json.loads(out) == rows(frame) and len(frame) > 0


@pytest.mark.parametrize("line", COMMANDS)
def test_people_get_a_short_table_with_its_controls(run, monkeypatch, line):
    monkeypatch.setenv("COLUMNS", "100")
    code, out, err = run(line)
    assert code == 0 and len(out.splitlines()) < 80 and max(map(len, out.splitlines())) <= 100, err
    control = {
        "patchscope": "npatched",
        "lens": "layer",
        "task-vector": "random",
        "relation": "least squares",
        "backpatch": "shuffled",
        "steer": "random",
    }
    assert control[line.split()[0]] in " ".join(out.split()), out


def test_a_grid_says_what_the_result_says(run, folder, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = run("patchscope one --target-layers all")
    result = hb.patchscope(hb.load(str(folder)), "one", target_layers="all")
    cells = [[cell.split()[-1] for cell in line.split("│")[2:-1]] for line in out.splitlines() if line.startswith("│")]
    chances = result.logprobs[0, :, 0].exp().reshape(3, 3)
    assert cells == [["1.0" if p >= 0.995 else f"{p:.2f}"[1:] for p in line] for line in chances.tolist()]


def test_csv_is_the_frame(run, folder):
    _, out, _ = run("lens one two --csv")
    frame = hb.logit_lens(hb.load(str(folder)), ["one", "two"]).to_frame()
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(out), keep_default_na=False), frame, check_dtype=False, rtol=1e-12)


def test_defaults_are_those_of_the_recipes():
    called = {
        "patchscope": hb.patchscope,
        "lens": hb.logit_lens,
        "task-vector": hb.task_vector,
        "relation": hb.linear_relation,
        "backpatch": hb.backpatch,
    }
    other = {"target", "other", "token", "template", "first", "second", "n", "shots"}  # names of things, and data
    assert recipes.COMMANDS.keys() == called.keys() | {"steer"}
    for name, recipe in called.items():
        own, theirs = inspect.signature(recipes.COMMANDS[name][0]).parameters, inspect.signature(recipe).parameters
        for option, parameter in own.items():
            if parameter.default is not inspect.Parameter.empty and (name, option) != ("task-vector", "shots") and option in other:
                continue
            if parameter.default is not inspect.Parameter.empty:
                default = theirs[option.removesuffix("_")].default
                assert parameter.default in (default, str(default)), (name, option)
    steer = inspect.signature(recipes.COMMANDS["steer"][0]).parameters
    assert tuple(steer["strength"].default) == inspect.signature(hb.steer).parameters["strengths"].default
    contrast = inspect.signature(hb.contrast_vector).parameters
    assert [steer[name].default for name in ("layers_", "site", "held_out", "seed")] == [
        contrast[name].default for name in ("layers", "site", "held_out", "seed")
    ]


@pytest.mark.parametrize(
    "line, code, says",
    [
        ("patchscope", 2, "Missing argument"),
        ("patchscope x --source-layers 0,five", 1, "'five' as a layer"),
        ("patchscope x --source-layers 8-4", 1, "'8-4' as a layer"),
        ("patchscope x --source-layers resid_pots.3", 1, "resid_post.3"),
        ("patchscope x -k 0", 2, "Invalid value"),
        ("patchscope x --json --csv", 2, "two formats"),
        ("patchscope x --plot grid.jpeg", 2, ".png"),
        ("patchscope x --save none/x.safetensors", 2, "no folder"),
        ("lens x --report pairs.json", 2, ".html"),
        ("lens x --plot folder.png --force", 2, "that is a folder"),
        ("lens x --save /proc/x.safetensors", 2, "nothing can be written there"),
        ("demo --no-install --out folder.html", 2, "that is a folder"),
        ("demo --no-install --out page.html", 1, "page.html exists"),
        ("demo --no-install --backend jax", 2, "'jax' is not transformer_lens or nnsight"),
        ("lens x --backend jax", 2, "'jax' is not transformer_lens or nnsight"),
        ("lens x --dtype int8", 2, "'int8' is not float32"),
        ("lens x --layers same", 1, "'same' as a layer"),
        ("lens x --layers 0-99999999999", 1, "'0-99999999999' as a layer"),
        ("lens x --token ''", 2, "no token"),
        ("patchscope x --source-layers same", 1, "'same' as a layer"),
        ("patchscope x --source-position all", 2, "one token is patched"),
        ("patchscope x --target-position all", 2, "one token is patched"),
        ("patchscope x --target entity_description", 2, "write ENTITY_DESCRIPTION"),
        ("patchscope x --target ENTITY_DESCRIPTON", 2, "write ENTITY_DESCRIPTION"),
        ("task-vector antonym --mode nonsense", 2, "'nonsense' is not replace or difference"),
        ("backpatch --position all", 2, "one token is patched"),
        ("steer sentiment --prompt x --toward '' --against b", 2, "no token"),
        ("steer sentiment --prompt x --toward a --against b --site nope", 1, "nope"),
        ("steer sentiment --prompt x --toward a --against b --held-out 1.5", 2, "Invalid value"),
        ("task-vector antonyms", 1, "no task 'antonyms'"),
        ("task-vector texts.json", 1, "cannot be read as pairs"),
        ("task-vector antonym --other nothing", 1, "no task 'nothing'"),
        ("relation copy", 1, "no templates"),
        ("relation country_capital --n-train 0", 2, "Invalid value"),
        ("backpatch city_country", 2, "both"),
        ("backpatch country_capital city_country", 1, "no questions of"),
        ("steer sentiment --toward a --against b", 2, "--prompt"),
        ("steer sentiment --prompt x", 2, "what counts?"),
        ("steer sentiment --prompt x --toward a", 2, "what counts?"),
        ("steer sentiment --prompt x --score french --toward a --generate 2", 2, "without --toward"),
        ("steer sentiment --prompt x --score english --generate 2", 2, "french or refusal"),
        ("steer sentiment --prompt x --score french", 2, "--generate"),
        ("steer sentiments --prompt x --toward a --against b", 1, "no 'sentiments' as a contrast"),
        ("steer pairs.json --prompt x --toward a --against b", 1, "cannot be read as a contrast"),
        ("nothing", 2, "No such command"),
    ],
)
def test_bad_input_is_found_before_a_model_is_loaded(run, folder, monkeypatch, line, code, says):
    monkeypatch.setattr(loading, "load", lambda *args, **settings: pytest.fail("it was loaded"))
    monkeypatch.setattr(hb, "load", loading.load)
    monkeypatch.setenv("COLUMNS", "300")
    before = sorted(folder.iterdir())
    found, out, err = run(line)
    assert (found, out) == (code, "") and says in err, err
    assert sorted(folder.iterdir()) == before


def test_what_only_the_model_knows_is_an_error_too(run, folder):
    before = sorted(folder.iterdir())
    for line, says in (
        ("lens x --device nonsense", "device 'nonsense' cannot be used"),
        ("lens x --device cuda:99", "device 'cuda:99' cannot be used"),
        ("lens x --layers 3 --save new.safetensors", "layers 0 to 2"),
        ("lens x --model nowhere/model --plot new.png", "was not found"),
    ):
        code, out, err = run(line)
        assert (code, out) == (1, "") and says in err and "Traceback" not in err
    assert sorted(folder.iterdir()) == before


def test_files_are_written_whole_and_not_overwritten(run, folder, tmp_path):
    line = f"lens one --plot {tmp_path}/x.png --save {tmp_path}/x.safetensors --json"
    code, out, err = run(line)
    assert (
        code == 0
        and json.loads(out)
        and f"{tmp_path}/x.png" in err
        and {path.name for path in tmp_path.iterdir()} == {"x.png", "x.safetensors"}
    )
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    saved = hb.LogitLens.load(tmp_path / "x.safetensors")
    assert torch.equal(saved.logprobs, hb.logit_lens(hb.load(str(folder)), "one").logprobs)
    code, out, err = run(line)
    assert (code, out) == (1, "") and "exists" in err and "--force" in err and "loading" not in err
    (tmp_path / "x.png").write_text("old")
    assert run(f"{line} --force")[0] == 0 and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_broken_model_is_an_error(run, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "broken")
    weights = tmp_path / "broken/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, out, err = run(f"lens x --model {tmp_path}/broken")
    assert (code, out) == (1, "") and "cannot be loaded" in err and "Traceback" not in err


def test_a_file_that_cannot_be_written_after_all_is_an_error(run, monkeypatch, tmp_path):
    monkeypatch.setattr(hb.LogitLens, "plot", lambda self: (_ for _ in ()).throw(PermissionError("no more")))
    code, out, err = run(f"lens one --plot {tmp_path}/x.png")
    assert (code, out) == (1, "") and err.endswith("Error: no more\n")


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
    assert tuple(loading.BACKENDS) == recipes.BACKENDS


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
        ("hookbook steer s", {"sentiment"}),
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
    assert recipes.layers("all") == "all" and recipes.layers("same", "same") == "same"
    assert recipes.layers("0, 4-6,-1,mlp_out.3") == [0, 4, 5, 6, -1, hb.Site("mlp_out", 3)]
    assert (recipes.position("-2"), recipes.position("all"), recipes.position("Paris")) == (-2, slice(None), "Paris")


def test_the_doctor_prints_what_it_finds(run, folder, monkeypatch):
    require("nnsight")
    code, out, _ = run(["doctor", str(folder), "--json"])
    found = json.loads(out)
    assert code == 0 and [finding["what"] for finding in found][-7:-4] == [
        "TransformerBridge: 26 sites of 3 layers",
        "TransformerBridge: logits",
        "TransformerBridge: greedy continuation of 8 tokens",
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
