"""The `hookbook` command on a tiny random model: it prints what the recipes give, says what is wrong before it loads a model, and leaves
nothing behind."""

from __future__ import annotations

import inspect
import io
import json
import shutil

import pandas as pd
import pytest
import torch

import hookbook as hb
from hookbook.cli import recipes
from hookbook.models import loading
from tests.support.needs import require
from tests.support.samples import TEXTS


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
    "neuron mlp_act.1.3 --contrast texts.json --token a -k 2 --seed 4": lambda model: hb.neuron(
        model, "mlp_act.1.3", [*TEXTS["positive"], *TEXTS["negative"]], ["a"], k=2, seed=4
    ),
    "neuron mlp_act.1.3 --texts texts.txt --prompt one --prompt two --ablate mean --generate 2": lambda model: hb.neuron(
        model, "mlp_act.1.3", ["one two", "three"], prompts=["one", "two"], ablate="mean", reference=["one two", "three"], generate=2
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
        "neuron": "matched",
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
        "neuron": hb.neuron,
    }
    other = {"target", "other", "token", "template", "first", "second", "n", "shots"}  # names of things, and data
    other |= {"contrast", "texts", "prompt"}
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
        ("neuron mlp_act.1.3 --contrast texts.json --texts texts.txt", 2, "one of"),
        ("neuron mlp_act.1 --texts texts.txt", 2, "no single neuron"),
        ("neuron mlp_act.1.3 --texts latin.txt", 2, "latin.txt"),
        ("neuron mlp_act.1.3 --texts empty.txt", 2, "no text"),
        ("neuron mlp_act.1.3 --texts nowhere.txt", 2, "nowhere.txt"),
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
        ("task-vector texts.json", 1, "a dict of lists"),
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
    for module in (hb, loading):  # in this order: hb takes its own from the other when it is first asked for
        monkeypatch.setattr(module, "load", lambda *args, **settings: pytest.fail("it was loaded"))
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
