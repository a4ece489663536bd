"""`hookbook reproduce` without a real model: the rules on planted results, the folder, and what it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import hookbook as hb
from hookbook import cli, reproduce
from hookbook.recipes.steering.generation import Generation
from hookbook.recipes.vectors.function_vectors import HeadEffects
from hookbook.recipes.vectors.task_vectors import Composition, TaskVectors
from hookbook.reproduce import suite, vectors
from hookbook.reproduce.effect import Effect, Expected, Line, least
from hookbook.reproduce.suite import Suite
from hookbook.reproduce.vectors import Setup
from hookbook.testing import toy

EFFECTS = vectors.SUITE.effects
SETUP = Setup(layer=1, dead=(0, 2))


def sweep(cls, accuracy, zero=0.0, mode="replace", **controls):
    """A result of three layers as if it had been measured."""
    sites = tuple(hb.Site("resid_post", layer) for layer in range(3))
    values = dict(validation=torch.tensor(accuracy), accuracy=torch.tensor(accuracy), values=torch.ones(3, 16))
    named = {name.replace("_", " "): torch.full((3,), x) for name, x in controls.items()}
    own = dict(card=toy().card, task="plural", template="", mode=mode, sites=sites, settings={})
    return cls(**own, **values, controls=named, zero_shot=torch.tensor(zero), few_shot=torch.tensor(0.9))


def planted(accuracy, zero=0.0, other=0.0, random=0.0, mode="replace"):
    return vectors.task_line(sweep(TaskVectors, accuracy, zero, mode, shuffled_labels=0.5, other_task=other, random=random), SETUP)


@pytest.mark.parametrize(
    ("line", "holds"),
    [
        (planted([0.0, 0.8, 0.1]), "yes"),
        (planted([0.0, 0.4, 0.1]), "no"),
        (planted([0.0, 0.8, 0.5]), "partly"),  # late layers work
        (planted([0.0, 0.8, 0.5], mode="difference"), "yes"),  # as they may
        (planted([0.0, 0.8, 0.0], zero=0.3), "partly"),
        (planted([0.0, 0.8, 0.0], other=0.3), "partly"),
        (planted([0.0, 0.8, 0.0], random=0.3), "partly"),
        (planted([0.0, float("nan"), 0.0]), "no"),
    ],
)
def test_a_task_vector_holds_if_its_controls_do_nothing(line, holds):
    assert line.holds == holds
    assert (
        line.effect.startswith("task vector, ")
        and line.controls["shuffled labels"] == 0.5
        and line.controls["with examples"] == pytest.approx(0.9)
    )


def test_where_replacing_works_is_said():
    assert (
        planted([0.0, 0.8, 0.1]).note
        == "plural, replace: at least half of the best at layers 1 of those tried, and at most 0.10 after them."
    )


def test_without_a_layer_the_best_on_validation_is_judged():
    found = sweep(TaskVectors, [0.0, 0.2, 0.9], other_task=0.0, random=0.0)
    assert vectors.task_line(found, Setup()).what == "plural, layer 2"


@pytest.mark.parametrize(("first", "last", "holds"), [(0.1, 0.1, "yes"), (0.4, 0.1, "partly"), (0.1, 0.4, "partly")])
def test_a_sum_must_be_better_than_each_of_its_parts(first, last, holds):
    found = sweep(Composition, [0.0, 0.6, 0.0], first_answer=first, last_copy=last, first_copy=0.0, direct=0.7, random=0.0)
    assert vectors.sum_line("plural", found, SETUP).holds == holds


@pytest.mark.parametrize(("other", "holds"), [(0.05, "yes"), (0.15, "partly"), (0.4, "no")])
def test_the_heads_that_matter_are_named(other, holds):
    effects = torch.zeros(1, 3, 2)
    effects[0, 1, 0], effects[0, 2, 1], effects[0, 0, 0] = 0.4, 0.2, other
    found = HeadEffects(card=toy().card, tasks=("plural",), effects=effects, misled=torch.zeros(1), settings={})
    assert vectors.heads_line(found, Setup(top_heads=((1, 0, 0.2), (2, 1, 0.08)))).holds == holds


FRENCH, ENGLISH, NOISE = ["le chat est dans la rue"] * 4, ["the cat is in the street"] * 4, ["was was"] * 4


@pytest.mark.parametrize(
    ("at", "random", "plain", "best", "holds"),
    [
        ((NOISE, FRENCH, NOISE), NOISE, ENGLISH, 0.05, "yes"),
        ((FRENCH[:2] + NOISE[:2], NOISE, FRENCH[:1] + NOISE[:3]), NOISE, ENGLISH, 0.02, "yes"),
        ((NOISE, NOISE, FRENCH[:1] + NOISE[:3]), NOISE, ENGLISH, 0.1, "no"),
        ((FRENCH, NOISE, NOISE), FRENCH, ENGLISH, 0.02, "partly"),  # any direction does it
        ((FRENCH, NOISE, NOISE), NOISE, FRENCH, 0.02, "partly"),  # it says so by itself
    ],
)
def test_an_in_context_vector_holds_if_random_directions_do_nothing(at, random, plain, best, holds):
    card, prompts = toy().card, tuple(toy().encode(x) for x in "abcd")

    def says(texts):
        return Generation(card, prompts, tuple(texts), ((),) * 4, ((),) * 4, tuple(plain), ((),) * 4, ((),) * 4, {}, (), {})

    found, line = vectors.in_context_line(dict(zip(vectors.TURNS, map(says, at), strict=True)), {vectors.TURNS[-1]: says(random)}, SETUP)
    assert (found, line.holds) == (best, holds) and line.what.endswith(f"strength {best:g}")


def test_only_what_was_expected_decides():
    good, bad = Line("a", "", 1.0, {}, "", (("", True),)), Line("b", "", 0.0, {}, "", (("", False),), counts=False)
    assert suite.verdict([good, bad]).startswith("1 of 1 ")


def test_a_model_that_is_no_chat_model_has_no_refusal_to_look_for():
    results, (line,) = vectors.refusal(toy(), Setup())
    assert not results and line.holds == "not run" and not line.counts and suite.number(line.measured) == "–"


def planted_effect(key, line=None, fails=None) -> Effect[Any]:
    """An effect of one real result of the toy model."""

    def find(model, setup) -> Any:
        """What is planted."""
        print("noise")
        if fails is not None:
            raise fails
        return {"lens": hb.logit_lens(model, "ab")}, [line]

    return Effect(key, "Planted", find, 1)


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Run the command on the toy model in an empty folder; gives its exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "load", lambda name: print("loading") or toy())
    for name in EFFECTS:
        line = Line(name, "it", 0.9, {"random": 0.0, "none": float("nan")}, "works", (("it >= 0.5", True),))
        monkeypatch.setitem(EFFECTS, name, planted_effect(name, line))

    def run(*words: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["hookbook", "reproduce", "vectors", *words])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return left.value.code

    return run


def test_the_folder_has_a_table_and_a_picture_of_every_result_and_a_page_that_needs_nothing_else(command, tmp_path):
    assert command("--only", "french", "--out", "new") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]  # no scratch stays
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["lens.csv", "lens.png", "report.html", "summary.csv"]
    page = (tmp_path / "new/report.html").read_text()
    assert 'src="data:image/png;base64,' in page and 'alt="lens' in page and "http" not in page.replace("http-equiv", "")
    assert pd.read_csv(tmp_path / "new/summary.csv")[["effect", "measured", "holds"]].values.tolist() == [["french", 0.9, "yes"]]


def test_json_is_all_that_is_printed(command, capsys, tmp_path):
    assert command("--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [line["effect"] for line in said] == list(EFFECTS) and (tmp_path / "hookbook-vectors-gemma-3-270m/report.html").exists()
    assert said[0]["controls"] == {"random": 0.0, "none": None} and set(said[0]) == {
        *"effect what measured controls paper holds rule counts note".split()
    }


def test_what_effects_and_libraries_print_is_no_json(command, capsys, monkeypatch):
    line = Line("sums", "it", float("inf"), {}, "works", (("it >= 0.5", True),))
    monkeypatch.setitem(EFFECTS, "sums", planted_effect("sums", line))
    assert command("--only", "sums", "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out, parse_constant=pytest.fail)[0]["measured"] is None and "noise" in err


def test_brackets_in_names_are_no_markup(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(EFFECTS, "sums", planted_effect("sums", Line("sums", "[/it]", 0.9, {}, "[/b]", (("it >= 0.5", True),))))
    assert command("--only", "sums", "--model", "runs/[/v2]", "--out", "[/new]") == 0
    out = capsys.readouterr().out
    assert "runs/[/v2]" in out and "[/it]" in out and "[/b]" in out and "[/new]/report.html" in out


@pytest.mark.parametrize("name", ["gemma-3-270m", "Gemma-3-270M", "google/gemma-3-270m", "Google/Gemma-3-270m"])
def test_a_model_has_its_setup_by_any_of_its_names(name):
    assert vectors.SUITE.setup(name) is vectors.SETUPS["gemma-3-270m"] and vectors.SUITE.setup("other/model") is vectors.SUITE.default


def test_the_exit_code_is_1_if_something_expected_does_not_hold(command, monkeypatch, capsys):
    monkeypatch.setitem(EFFECTS, "sums", planted_effect("sums", Line("sums", "it", 0.1, {}, "works", (("it >= 0.5", False),))))
    assert command("--only", "sums", "--out", "a") == 1
    monkeypatch.setitem(
        EFFECTS, "sums", planted_effect("sums", Line("sums", "it", 0.1, {}, "works", (("it >= 0.5", False),), counts=False))
    )
    assert command("--only", "sums", "--out", "b") == 0
    monkeypatch.setitem(EFFECTS, "sums", planted_effect("sums", fails=hb.errors.Refused("heads", "it has none", "use another model")))
    assert command("--only", "sums", "--only", "french", "--json", "--out", "c") == 1  # the others run all the same
    assert "heads: it has none" in capsys.readouterr().out
    monkeypatch.setitem(EFFECTS, "sums", planted_effect("sums", fails=ZeroDivisionError("by nothing")))
    assert command("--only", "sums", "--only", "french", "--json", "--out", "d") == 1
    failed, ran = sorted(json.loads(capsys.readouterr().out), key=lambda line: line["holds"])
    assert failed["note"] == "ZeroDivisionError: by nothing" and ran["holds"] == "yes" and Path("d/lens.csv").exists()


def test_a_folder_with_something_in_it_is_refused_before_any_work(command, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "load", lambda name: pytest.fail("loaded"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note").write_text("mine")
    assert command("--out", "full") == 1 and "full exists" in capsys.readouterr().err
    assert command("--only", "magic") == 1 and "no effect 'magic'" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["note"]


def test_a_run_that_is_cut_off_leaves_nothing(command, tmp_path, monkeypatch):
    monkeypatch.setitem(EFFECTS, "sums", planted_effect("sums", fails=KeyboardInterrupt()))
    (tmp_path / "new").mkdir()
    with pytest.raises(KeyboardInterrupt):
        suite.run(vectors.SUITE, "toy", tmp_path / "new", ["sums"])
    assert [path.name for path in tmp_path.iterdir()] == ["new"] and not list((tmp_path / "new").iterdir())
    assert command("--only", "french", "--out", "new") == 0  # an empty folder may be there


def test_every_module_with_a_suite_is_a_command():
    modules = {path.stem for path in Path(reproduce.__file__).parent.glob("*.py") if "\nSUITE = Suite(" in path.read_text(encoding="utf-8")}
    assert modules == set(reproduce.SUITES)


@pytest.mark.parametrize("name", reproduce.SUITES)
def test_the_help_names_every_effect(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["hookbook", "reproduce", name, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    effects = reproduce.get(name).effects
    assert f": {', '.join(effects)}." in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert reproduce.SUITES[name][1] in effects


def test_saying_which_commands_there_are_loads_no_torch():
    code = "import sys; from hookbook import cli; cli._app()(['reproduce', '--help'], standalone_mode=False); print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(name in said for name in reproduce.SUITES) and said.split()[-1] == "False"


def test_every_picture_that_needs_no_argument_is_drawn(monkeypatch, tmp_path):
    found = hb.logit_lens(toy(), "ab")

    class Pictured(type(found)):
        def plot_twice(self, ax=None):
            """The same again."""
            return self.plot(ax)

        def plot_token(self, token):
            raise AssertionError("nobody said which")

    monkeypatch.setattr(suite, "load", lambda name: toy())
    planted = Suite("Pictures", {}, Expected())
    planted.effect("One", minutes=1, key="one")(lambda model, setup: ({"lens": Pictured(**vars(found))}, []))
    suite.run(planted, "toy", tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "lens.csv",
        "lens.png",
        "lens_twice.png",
        "report.html",
        "summary.csv",
    ]
    page = (tmp_path / "new/report.html").read_text()
    assert page.count("<img") == 2 and 'alt="lens twice: The same again. ' in page and page.count("The numbers are in lens.csv.") == 1


def test_steering_to_french_runs_on_any_model():
    results, (line,) = vectors.french(toy(n_ctx=160), Setup())
    assert set(results) == {"contrast_french", "steer_french"} and line.holds == "no" and line.counts


TEMPORARY = Suite("Temporary", {"small": Expected(counted=frozenset())}, Expected(), "Numbers are shares.")


@TEMPORARY.effect("Whether the lens reads the end", minutes=0.1)
def last_layer(model, setup):
    """Does the last layer say
    what the model says?"""
    found = hb.logit_lens(model, ["ab", "cd"], k=1)
    same = float((found.token_ids[:, -1, 0] == found.own_ids).double().mean())
    return {"lens": found}, [Line("lens", "the last layer", same, {}, "", (least("share", same, 1),), setup.expects("lens"))]


@TEMPORARY.effect("What cannot be", minutes=0.1, key="never")
def breaks(model, setup) -> Any:
    """Does it break?"""
    return {"lens": hb.logit_lens(model, "ab"), "broken": None}, []  # it is found, and cannot be drawn


def test_an_effect_is_one_function_and_one_line():
    assert {key: one.heading for key, one in TEMPORARY.effects.items()} == {
        "last-layer": "Whether the lens reads the end",
        "never": "What cannot be",
    }
    outcome = TEMPORARY.effects["last-layer"].run(toy(), TEMPORARY.setup("anything"))
    (line,) = outcome.lines
    assert outcome.effect.question == "Does the last layer say what the model says?" and outcome.effect.minutes == 0.1
    assert (outcome.holds, outcome.error, line.measured, line.counts) == ("yes", "", 1, True)
    assert list(outcome.results) == ["lens"] and 0 < outcome.seconds < 60
    assert [(file.name, bool(file.words)) for file in outcome.files] == [("lens.csv", False), ("lens.png", True)]
    (line,) = TEMPORARY.effects["last-layer"].run(toy(), TEMPORARY.setup("small")).lines
    assert line.holds == "yes" and not line.counts  # by the data of that model


def test_an_effect_that_fails_is_an_outcome_with_its_error():
    outcome = TEMPORARY.effects["never"].run(toy(), Expected())
    (line,) = outcome.lines
    assert outcome.holds == line.holds == "no" and line.effect == "never" and outcome.seconds > 0
    assert outcome.error == line.note and outcome.error.startswith("AttributeError: ")
    assert [file.name for file in outcome.files] == ["lens.csv", "lens.png"] and "<img" not in suite.section(outcome)[2]


def test_a_suite_runs_its_effects_in_the_order_of_their_lines(monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "load", lambda name: toy())
    outcomes = suite.run(TEMPORARY, "toy", tmp_path / "new", ["never", "last-layer"])
    assert [one.effect.key for one in outcomes] == ["last-layer", "never"] == list(TEMPORARY.effects)
    summary, page = (tmp_path / "new/summary.csv").read_text(), (tmp_path / "new/report.html").read_text()
    assert [line.split(",")[0] for line in summary.splitlines()] == ['"effect"', '"lens"', '"never"'] and "second" not in summary
    assert page.index("Whether the lens reads the end") < page.index("What cannot be") and page.count(" s)</p>") == 2
    assert not any(one.results for one in outcomes)  # they may be large


def test_two_effects_of_a_name_are_refused():
    with pytest.raises(hb.errors.DataError, match="two effects 'never' in Temporary"):
        TEMPORARY.effect("Again", minutes=1, key="never")(breaks)
    assert TEMPORARY.effects["never"].heading == "What cannot be"


@pytest.mark.parametrize(
    ("lines", "holds"),
    [("yes+ partly+ no-", "partly"), ("yes+ no+", "no"), ("yes- no-", "no"), ("yes+ not-run-", "yes"), ("not-run-", "not run")],
)
def test_an_outcome_is_as_good_as_the_worst_of_what_counts(lines, holds):
    rules = {"yes": (("a", True),), "partly": (("a", True), ("b", False)), "no": (("a", False),), "not-run": ()}
    planted = tuple(Line("", "", 0.0, {}, "", rules[word[:-1]], word.endswith("+")) for word in lines.split())
    outcome = TEMPORARY.effects["never"].run(toy(), Expected())
    assert replace(outcome, lines=planted).holds == holds


@pytest.mark.parametrize("name", reproduce.SUITES)
def test_every_effect_says_what_it_asks_and_how_long_it_takes(name):
    for key, effect in reproduce.get(name).effects.items():
        assert effect.key == key and effect.heading and effect.question.endswith(".") and 0 < effect.minutes < 30
