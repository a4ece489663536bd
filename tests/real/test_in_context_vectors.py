"""The published effect of task vectors, on real models, against its controls."""

from __future__ import annotations

from dataclasses import replace

import pytest

import hookbook as hb
from tests.support.real import real


@pytest.fixture(scope="module")
def gemma() -> hb.Adapter:
    return real("gemma-3-270m")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("singular_plural", "replace"),
        *(pytest.param("country_capital", mode, marks=pytest.mark.whole) for mode in ("replace", "difference")),
    ],
)
def test_a_middle_layer_holds_the_task(gemma, name, mode):
    task, other = hb.tasks.load(name), hb.tasks.load("present_past")
    found = hb.task_vector(
        gemma, task, layers=[6, 9, 11, 13, 15] if mode == "replace" else [10, 11], mode=mode, other=other, queries=30, n_prompts=32
    )
    at = {site.layer: i for i, site in enumerate(found.sites)}
    accuracy, random, wrong = found.accuracy[at[11]], found.controls["random"][at[11]], found.controls["other task"][at[11]]
    assert accuracy >= 0.5 and found.zero_shot <= 0.1 and random <= 0.05 and wrong <= 0.15 and found.few_shot >= 0.6
    assert found.best.site.layer in (9, 10, 11) and found.accuracy[found.best_index] >= 0.5
    if mode == "replace":
        assert all(found.accuracy[at[layer]] <= 0.15 for layer in (6, 13, 15))


def test_on_another_model():
    model = real("smollm2-135m-instruct")
    found = hb.task_vector(model, hb.tasks.load("singular_plural"), layers=[21], mode="difference", queries=30, n_prompts=32)
    assert found.accuracy[0] >= 0.55 and found.controls["random"][0] <= 0.1


@pytest.mark.parametrize("name", ["antonym", "present_past"])
def test_the_tokenizer_has_spaces_in_the_prompts_of_hendel(name):
    """Words are one token with a space in SmolLM2: their prompts have spaces, and without these the model answers less."""
    model, ask = real("smollm2-135m-instruct"), {"layers": [18], "shots": 5, "n_prompts": 2, "queries": 24}
    task = hb.tasks.load(name, hb.tasks.ARROW)
    found, plain = (hb.task_vector(model, some, **ask) for some in (task, task.with_template(replace(hb.tasks.ARROW, spaced=None))))
    assert found.template == found.settings["template"] == found.best.template == "example: {}-> {}" != plain.template == "example:{}->{}"
    assert found.few_shot >= plain.few_shot + 0.15 and found.few_shot >= 0.6
