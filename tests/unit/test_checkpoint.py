"""Plans are what then runs; checkpoints keep finished climbs, also of a process that was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import hookbook as hb
from hookbook.engine import cost, planning, runs as engine
from hookbook.errors import EditError, ResultError, SiteError
from hookbook.request import Read, Readout, Request, Row
from hookbook.testing import toy

SWEEP = """
import sys, time, torch
import hookbook as hb
from hookbook.engine import runs as engine
from hookbook.engine import planning
from hookbook.request import Read, Readout, Request, Row
from hookbook.testing import toy

adapter = toy()
prompts = [adapter.encode(text) for text in ("The cat", "Hi", "abc")]
vectors = torch.randn(30, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
rows = [Row(i % 3, (hb.Edit(f"resid_post.{i % 2}", v),)) for i, v in enumerate(vectors)]
request = Request(prompts, rows, [Read("resid_post.2")], Readout(k=3, tokens=torch.arange(30)[:, None]), generate=3)
planning.BUDGET_BYTES = 1
"""


def sweep() -> tuple[hb.Adapter, Request]:
    scope: dict = {}
    before = planning.BUDGET_BYTES
    try:
        exec(SWEEP, scope)
    finally:
        planning.BUDGET_BYTES = before
    return scope["adapter"], scope["request"]


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """The numbers of rows of each climb that ran."""
    ran, run = [], engine._run_part
    monkeypatch.setattr(engine, "_run_part", lambda adapter, part, *more: (ran.append(len(part.rows)), run(adapter, part, *more))[1])
    return ran


def same(a, b) -> bool:
    tensors = [
        (a.readings[0].values, b.readings[0].values),
        (a.readout.topk_logprobs, b.readout.topk_logprobs),
        (a.readout.token_logprobs, b.readout.token_logprobs),
    ]
    return all(torch.equal(x, y) for x, y in tensors) and a.generated == b.generated and a.logprobs == b.logprobs and a.cost == b.cost


def test_a_killed_process_loses_at_most_the_climb_in_flight(tmp_path, counted, monkeypatch):
    folder = tmp_path / "kept"
    slow = (
        SWEEP
        + f"""
run = engine._run_part
engine._run_part = lambda *args: (time.sleep(0.2), run(*args))[1]
adapter.run(request, checkpoint={str(folder)!r})
"""
    )
    process = subprocess.Popen([sys.executable, "-c", slow], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.safetensors")) if folder.exists() else []) < 3:
        assert process.poll() is None and time.monotonic() < deadline, "the sweep ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = len(list(folder.glob("*.safetensors")))
    adapter, request = sweep()
    monkeypatch.setattr(planning, "BUDGET_BYTES", 1)
    plain = adapter.run(request)
    climbs = len(counted)
    assert 3 <= finished < climbs == 30
    counted.clear()
    assert same(adapter.run(request, checkpoint=folder), plain)
    assert len(counted) == climbs - finished
    counted.clear()
    assert same(adapter.run(request, checkpoint=folder), plain) and counted == []
    assert all(not path.name.startswith(".") or path.stat().st_size >= 0 for path in folder.iterdir())


def test_a_checkpoint_is_of_one_request_and_one_model(tmp_path, counted):
    adapter, request = sweep()
    adapter.run(request, checkpoint=tmp_path)
    counted.clear()
    moved = Request(
        request.prompts,
        [Row(row.prompt, (hb.Edit(row.edits[0].site, row.edits[0].value + 1e-9),)) for row in request.rows],
        request.reads,
        request.readout,
        3,
    )
    adapter.run(moved, checkpoint=tmp_path)
    assert counted == [30]
    other = toy(seed=1)
    with pytest.raises(ResultError, match="other weights"):
        other.run(request, checkpoint=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="it is a file"):
        adapter.run(request, checkpoint=tmp_path / "file")
    with pytest.raises(EditError, match="not their graph"):
        adapter.run(Request(request.prompts, request.rows, (), Readout(k=1), grad=True), checkpoint=tmp_path)


def test_a_recipe_goes_on_from_its_checkpoint(tmp_path, counted):
    first = hb.patchscope(toy(), ["ab", "the cat"], target="cd?", target_layers="all", generate=2, checkpoint=tmp_path)
    ran = len(counted)
    again = hb.patchscope(toy(), ["ab", "the cat"], target="cd?", target_layers="all", generate=2, checkpoint=tmp_path)
    assert ran == len(counted) and torch.equal(first.logprobs, again.logprobs) and first.texts == again.texts


@pytest.mark.parametrize("budget", [1, 1 << 30])
@pytest.mark.parametrize("generate", [0, 3])
def test_a_plan_is_what_then_runs(monkeypatch, counted, budget, generate):
    monkeypatch.setattr(planning, "BUDGET_BYTES", budget)
    monkeypatch.setattr("hookbook.testing.ToyAdapter.eos_ids", frozenset())  # rows that end early cost less than planned
    call = dict(target="cd?", target_layers="all", generate=generate, k=2)
    plan = hb.patchscope.plan(toy(), ["ab", "the cat"], **call)
    assert counted == []
    done = {"climbs": 0, "passes": 0, "token_layers": 0, "unembedded": 0}
    run = engine.run

    def counting(*args, **kwargs):
        reply = run(*args, **kwargs)
        for key in done:
            done[key] += reply.cost[key]
        return reply

    monkeypatch.setattr(engine, "run", counting)
    out = hb.patchscope(toy(), ["ab", "the cat"], **call)
    # the source's own next token and its log-probability for every pair: 2 + 2 * 9 rows, unembedded beside the climbs
    assert done["climbs"] == plan.climbs and done["passes"] == plan.passes and done["unembedded"] == plan.unembedded - 2 - 2
    assert (
        (done["token_layers"] == plan.token_layers) if not generate else (done["token_layers"] <= plan.token_layers)
    )  # rows that say the same share
    assert len(counted) == plan.climbs and plan.jobs == 0 and bool(out.texts) == bool(generate)
    assert (plan.climbs > 2) == (budget == 1)
    assert str(plan).startswith(f"{plan.climbs} climbs, {plan.passes} passes")


def test_a_plan_checks_its_input():
    with pytest.raises(SiteError):
        hb.patchscope.plan(toy(), "ab", source_layers=9)


def test_a_plan_of_a_jacobian_says_its_products_and_memory(monkeypatch):
    adapter = toy()
    prompts = [adapter.encode("ab"), adapter.encode("cd")]
    with cost.accounting() as account:
        found = hb.jacobian(adapter, prompts, Read("resid_post.2"), [Read("resid_post.0"), Read("resid_post.1")])
    assert account.plan.vjps == 2 * 16 and account.plan.climbs == 1
    assert account.plan.peak_bytes > sum(matrix.nbytes for matrix in found.matrices)


def test_readings_of_a_plan_have_the_shapes_of_the_run(counted):
    adapter = toy()
    prompts = [adapter.encode("ab"), adapter.encode("the cat")]
    reads = [
        Read("attn_pattern.1"),
        Read("attn_pattern.1.0", slice(None)),
        Read("head_z.0"),
        Read("head_z.0.1"),
        Read("mlp_act.2.3"),
        Read("final_norm"),
    ]
    request = Request(prompts, [Row(1), Row(0)], reads, Readout(k=2, tokens=torch.tensor([[1], [2]]), logits=True), generate=2)
    with cost.accounting():
        blank = adapter.run(request)
    assert counted == []
    real = adapter.run(request)
    for a, b in zip(blank.readings, real.readings, strict=True):
        assert (
            a.values.shape == b.values.shape and torch.equal(a.rows, b.rows) and torch.equal(a.positions, b.positions) and a.site == b.site
        )
    for name in ("topk_ids", "topk_logprobs", "token_logprobs", "logits"):
        assert getattr(blank.readout, name).shape == getattr(real.readout, name).shape


def test_a_file_of_a_checkpoint_that_was_cut_off_is_named(tmp_path):
    adapter, request = sweep()
    adapter.run(request, checkpoint=tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    Path(path).write_bytes(path.read_bytes()[:100])
    with pytest.raises(ResultError, match=f"{path}.*delete this file"):
        adapter.run(request, checkpoint=tmp_path)
    path.unlink()
    assert same(adapter.run(request, checkpoint=tmp_path), adapter.run(request))
