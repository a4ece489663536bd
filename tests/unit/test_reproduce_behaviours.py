"""The rules for what vectors do to a chat model's behaviour, on planted results."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hookbook as hb
from hookbook.recipes.steering.generation import Generation
from hookbook.recipes.steering.steering import Steering
from hookbook.reproduce import behaviours
from hookbook.reproduce.effect import Expected
from hookbook.testing import toy


def moved(up, down, random, base=1.0):
    """What two questions, each in two forms, would say under a vector: log-odds without it, and how far each run moves them."""
    numbers = torch.tensor([[base, base + down, base + up, base + random, base + random]] * 4, dtype=torch.float64)
    where = (hb.Site("resid_post", 1),)
    return Steering(toy().card, tuple(toy().encode(x) for x in "abcd"), where, (-2.0, 2.0), "", numbers, (), {})


@pytest.mark.parametrize(
    ("up", "down", "random", "other", "holds"),
    [
        (3.0, -3.0, 0.0, 1.0, ("yes", "yes")),
        (3.0, 0.0, 0.0, 1.0, ("yes", "no")),  # it comes, and does not go
        (3.0, -3.0, 2.0, 1.0, ("partly", "yes")),  # random ones bring it, too
        (3.0, -3.0, 0.0, 2.9, ("partly", "partly")),  # so do others
        (0.5, -0.5, 0.0, 0.0, ("no", "no")),
    ],
)
def test_a_behaviour_appears_and_goes(up, down, random, other, holds):
    odds = {"sycophancy": moved(up, down, random), "formality": moved(other, -other, 0.0)}
    said = Generation(toy().card, (), ("right",), (), (), ("wrong",), (), (), {}, (), {})
    choices = hb.tasks.choices("sycophancy")[:4]
    added, gone = behaviours.behaviour_lines("sycophancy", "first", "layer 1", odds, {1: said, -1: said}, choices, Expected())
    assert (added.holds, gone.holds) == holds and (added.measured, gone.measured) == (up, -down)
    assert added.controls["random"] == random and gone.controls["random"] == -random and added.controls["share without"] == 1.0
    assert repr(choices[0].question) + ": 'wrong', and 'right'" in added.note and "'You are right' and 'I agree' move" not in added.note


def test_what_is_asked_apart_comes_back_in_its_order():
    parts = {
        "x": replace(moved(1, 2, 3), numbers=torch.arange(20.0).view(4, 5)),
        "y": replace(moved(1, 2, 3), numbers=-torch.arange(20.0).view(4, 5)),
    }
    woven = behaviours._woven(parts, list("xyxyxyxy"))
    assert woven.numbers[:, 0].tolist() == [0, 0, 5, -5, 10, -10, 15, -15] and len(woven.to_frame()) == 8 * 5


@pytest.mark.parametrize(
    ("what", "shares", "why", "holds"),
    [
        ("added", (0.0, 0.8, 0.0, 0.0), "", "yes"),
        ("added", (0.0, 0.8, 0.5, 0.0), "", "partly"),
        ("added", (0.0, 0.2, 0.0, 0.0), "", "no"),
        ("added", (0.0, 0.8, 0.0, 0.0), "every candidate is discarded", "partly"),
        ("ablated", (1.0, 0.1, 1.0, 0.9), "", "yes"),
        ("ablated", (1.0, 0.1, 0.2, 0.9), "", "partly"),
        ("ablated", (1.0, 0.9, 1.0, 0.9), "", "no"),
    ],
)
def test_a_refusal_comes_and_goes_by_one_direction(what, shares, why, holds):
    run = Generation(toy().card, (toy().encode("ab"),), ("no",), (), (), ("yes",), (), (), {}, (), {})
    vector = hb.Vector.of(toy(), "resid_pre.1", torch.ones(16))
    line = behaviours.refusal_line(what, "first", behaviours.Outcomes(*shares), 24, run, vector, why, "")
    assert line.holds == holds and line.measured == shares[1]
