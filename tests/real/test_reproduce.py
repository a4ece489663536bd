"""The command on a real model, one cheap effect of it; `hookbook reproduce vectors` is the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hookbook import tasks
from hookbook.recipes.steering.contrast_vectors import contrast_vector
from hookbook.reproduce import suite, vectors
from hookbook.reproduce.behaviours import Asks
from tests.support.real import real


def test_one_effect_is_reproduced(monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "load", real)
    (line,) = suite.lines_of(suite.run(vectors.SUITE, "smollm2-135m-instruct", tmp_path / "new", ["sentiment"]))
    assert line.holds == "yes" and line.counts and line.measured >= line.controls["random +2"] + 3
    assert {path.name for path in (tmp_path / "new").iterdir()} >= {
        "report.html",
        "summary.csv",
        "steer_sentiment.csv",
        "steer_sentiment.png",
    }


@pytest.mark.whole
def test_what_is_published_of_agreeing_with_a_user_who_is_wrong_is_what_comes_out():
    """Added, its direction works on questions of the second draw; subtracted hardly, and a random vector as long adds more."""
    asks = Asks(real("smollm2-135m-instruct"))
    one, other = (
        contrast_vector(asks.model, *map(asks.texts, tasks.contrast(name)), **asks.where(name) | {"layers": [20]}).vector()
        for name in ("sycophancy", "formality")
    )
    moved = []
    for vector in (one, replace(other, values=other.values * (one.norm / other.norm))):
        odds = asks.odds(vector, tasks.choices("sycophancy", "second"), 4.0)
        moved += [float((said[:, 0, at] - odds.base).mean()) for said in (odds.scores, odds.random) for at in (-1, 0)]
    published = [3.16, -0.52, 4.64, -1.59, 2.25, 2.04]  # added and subtracted: its own, random, formality
    assert moved[:6] == pytest.approx(published, abs=0.02)
