"""Results in a line, and in a few rows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from hookbook.errors import Refused
from hookbook.results import Result
from tests.makers import attached, kinds, result


@dataclass(frozen=True, eq=False)
class Other(Result):
    number: int


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("Vector", "Vector(toy, resid_post.1, position '-1', recipe 'mine', values [16])"),
        ("HeadEffects", "HeadEffects(toy, 1 task, effects [1, 3, 2], misled [1])"),
        (
            "Patchscope",
            "Patchscope(toy, 2 sources, 3 x 3 pairs, token_ids [2, 9, 4], logprobs [2, 9, 4], control_ids [2, 4], control_logprobs [2, 4], "
            "source_ids [2], precision [2, 9], surprisal [2, 9], wanted_logprobs [2, 9, 1], control_wanted_logprobs [2, 1])",
        ),
        (
            "LinearRelation",
            "LinearRelation(toy, relation 'planted', template '{}2', answer '{}', 2 train, 9 test, 3 sites, 3 betas, validation_known [9], "
            "test_known [9], weight [3, 16, 16], bias [3, 16], beta [3], chosen_by [3, 3], faithfulness [3], controls 7 x [3])",
        ),
        pytest.param(
            "FeatureVector",
            "FeatureVector(toy, resid_post.1, sae 'toy resid_post.1 5594428f', method 'pursuit', recipe 'mine', features [6], values [6], "
            "rows [6, 16], vector [16], offset [16])",
            marks=pytest.mark.hooked,
        ),
    ],
)
def test_a_result_is_a_line_of_names_sizes_and_shapes(kind, line):
    assert repr(result(kind)) == str(result(kind)) == line


@pytest.mark.parametrize("kind", kinds())
def test_every_result_is_one_short_line_and_a_short_table(kind):
    made, line = result(kind), repr(result(kind))
    assert len(line) <= 300 and len(line.splitlines()) == 1 and line.startswith(f"{type(made).__name__}(toy, ") and line.endswith(")")
    html = made._repr_html_()
    assert html.count("<tr>") == 1 + min(20, len(made.to_frame())) and f"{type(made).__name__} of toy" in html and len(html) < 20_000


def test_a_long_line_ends_with_dots():
    made: Any = result("Patchscope")
    long = repr(replace(made, control_wanted_logprobs=torch.empty([1] * 60)))
    assert len(long) <= 300 and long.endswith("surprisal [2, 9], wanted_logprobs [2, 9, 1], ...)")
    vector: Any = result("Vector")
    named = replace(vector, card=replace(vector.card, model_id="x" * 999))
    assert repr(named) == f"Vector({'x' * 99}…, resid_post.1, position '-1', recipe 'mine', values [16])"
    assert (
        repr(replace(vector, recipe="a\n" + "b" * 99)) == f"Vector(toy, resid_post.1, position '-1', recipe 'a\\n{'b' * 37}…', values [16])"
    )


def test_models_of_two_names_are_both_named():
    grid: Any = result("Patchscope")
    other = replace(grid, target_card=replace(grid.target_card, model_id="other"))
    assert repr(other).startswith("Patchscope(toy and other, 2 sources, 3 x 3 pairs, ")


def test_a_recipe_of_anybody_has_a_short_line_too():
    assert repr(Other(3)) == "Other(number 3)"

    @dataclass(frozen=True, eq=False)
    class Mine(Other):
        values: torch.Tensor

        def __repr__(self) -> str:
            return "mine"

    assert repr(Mine(1, torch.zeros(2))) == "mine"


def test_a_table_of_a_result_is_safe_and_says_what_it_leaves_out():
    made: Any = result("Patchscope")
    html = replace(made, vocab=dict.fromkeys(made.vocab, "<b>"))._repr_html_()
    assert "Patchscope of toy: the first 20 of 72 rows" in html and "<b>" not in html and "&lt;b&gt;" in html


def test_a_result_that_waits_for_its_numbers_is_a_line():
    class Waiting(Other):
        def to_frame(self):
            raise Refused("numbers", "the job is not done <yet>", "wait")

    assert Waiting(3)._repr_html_() == "<p>Waiting(number 3)</p>"


def test_what_results_hold_says_no_more_than_it_must():
    grid: Any = result("Patchscope")
    assert repr(grid.sources[0]) == "Tokens(text='ab', ids=(0, 66, 67), strings=('<s>', 'a', 'b'))"
    assert "versions" not in repr(grid.source_card) and len(repr(grid.source_card)) < 300


@pytest.mark.hooked
def test_an_attached_sae_is_its_sites():
    site = "Site(name='resid_post', layer=1, unit=None)"
    assert repr(attached()) == f"AttachedSAE(site={site}, out={site}, bos=None)"


def test_results_need_no_pandas_to_be_imported():
    code = "import sys, hookbook.results, hookbook.show.tidy, hookbook.show.brief; print({'pandas', 'matplotlib'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
