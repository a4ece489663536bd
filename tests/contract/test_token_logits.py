"""Logits of some words, from their rows of the unembedding: those of all words, without the normaliser."""

from __future__ import annotations

import torch

import hookbook as hb
from hookbook.engine import cost, planning
from hookbook.request import Readout, Request, Row
from tests.support.situations import PROMPTS


def wanted(case, m=3) -> Request:
    """Rows of several prompts, each with words of its own."""
    prompts = [case.adapter.encode(list(ids)) for ids in PROMPTS]
    vector = torch.linspace(-2, 2, case.adapter.card.d_model)
    rows = [Row(i, (hb.Edit(f"resid_pre.{layer}", vector, position=-1),)) for i in range(3) for layer in (0, 1, 2)] + [Row(1)]
    ids = torch.randint(case.adapter.card.d_vocab, (len(rows), m), generator=torch.Generator().manual_seed(0))
    return Request(prompts, rows, readout=Readout(token_logits=ids))


def test_they_are_the_models_own(case):
    request = wanted(case)
    reply = case.adapter.run(request)
    whole = case.adapter.run(Request(request.prompts, request.rows, readout=Readout(k=1, tokens=request.readout.token_logits, logits=True)))
    want = whole.said.logits.gather(1, request.readout.token_logits)
    assert reply.said.token_logits.shape == (len(request.rows), 3) and (reply.said.token_logits - want).abs().max() < 1e-10
    assert reply.said.logits is None and reply.said.topk_ids.shape == (len(request.rows), 0) and whole.said.token_logits is None
    assert (reply.said.token_logits.diff(dim=1) - whole.said.token_logprobs.diff(dim=1)).abs().max() < 1e-10
    plain = case.plain(request.prompts[1].ids)[0][-1]
    assert (reply.said.token_logits[-1] - plain[request.readout.token_logits[-1]]).abs().max() < 1e-10
    assert reply.cost["unembedded"] == 0 and whole.cost["unembedded"] == len(request.rows)


def test_they_stand_beside_what_else_is_asked_and_are_the_same_in_several_climbs(case, monkeypatch):
    request = wanted(case)
    both = Readout(k=2, token_logits=request.readout.token_logits)
    one = case.adapter.run(Request(request.prompts, request.rows, readout=both))
    monkeypatch.setattr(planning, "BUDGET_BYTES", 1)
    several = case.adapter.run(Request(request.prompts, request.rows, readout=both))
    assert several.cost["climbs"] > one.cost["climbs"]
    assert (several.said.token_logits - one.said.token_logits).abs().max() < 1e-10
    assert torch.equal(several.said.topk_ids, one.said.topk_ids) and one.said.topk_ids.shape == (len(request.rows), 2)


def test_where_the_unembedding_gives_no_part_all_are_computed(case, monkeypatch):
    request = wanted(case)
    before = case.adapter.run(request)
    monkeypatch.setattr(type(case.adapter), "splits", lambda self: 0)
    if case.name.startswith("nnsight"):
        monkeypatch.setattr(type(case.adapter.passes), "splits", lambda self: 0)
    assert (case.adapter.run(request).said.token_logits - before.said.token_logits).abs().max() < 1e-10


def test_of_a_state_they_are_what_the_readout_says(case):
    states = torch.randn(70, case.adapter.card.d_model, generator=torch.Generator().manual_seed(1)).to(
        getattr(torch, case.adapter.card.dtype)
    )
    words = torch.arange(70 * 4).view(70, 4) % case.adapter.card.d_vocab
    found = case.adapter.readout(states, token_logits=words).token_logits
    assert (found - case.adapter.readout(states, k=1, logits=True).logits.gather(1, words)).abs().max() < 1e-10
    with cost.accounting() as account:
        assert case.adapter.readout(states, token_logits=words).token_logits.shape == (70, 4)
    assert account.plan.unembedded == 0
