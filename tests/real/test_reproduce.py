"""The command on a real model, one cheap effect of it; `hookbook reproduce vectors` is the whole."""

from __future__ import annotations

from hookbook.reproduce import suite, vectors
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
