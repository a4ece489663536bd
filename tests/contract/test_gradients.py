"""Jacobians and kept graphs against autograd on plain runs, in float64."""

from __future__ import annotations

import pytest
import torch

import hookbook as hb
from hookbook.errors import EditError, TokenError
from hookbook.recipes.reading.jacobians import jacobian
from hookbook.request import Each, Read, Readout, Request, Row
from tests.contract.test_forks import direction

EXACT = 1e-10
TEXTS = ("The cat sat on", "Hi", "abc abc")


def sources(adapter: hb.Adapter) -> list[Read]:
    names = ["embed", "resid_post.0", "head_z.1.1", "attn_out.1", "mlp_act.0", f"resid_pre.{adapter.card.n_layers - 1}"]
    return [Read(hb.Site.parse(name), Each((-3, 1, -2))) for name in names]


def naive(case, tokens, read: Read, of: Read, position: int) -> torch.Tensor:
    """The Jacobian of one plain run with respect to a vector added at the source."""

    def run(value: torch.Tensor) -> torch.Tensor:
        return case.plain(tokens.ids, ((read.site, position, hb.Edit(read.site, value), []),), (of.site,), grad=True)[1][of.site][-1]

    return torch.autograd.functional.jacobian(run, torch.zeros(read.site.width(case.adapter.card), dtype=torch.float64))


def test_jacobians_of_every_source_are_those_of_plain_runs(case):
    adapter = case.adapter
    prompts = [adapter.encode(text) for text in TEXTS]
    of = Read(hb.Site("resid_post", adapter.card.n_layers - 1))
    found = jacobian(adapter, prompts, of, sources(adapter))
    for k, read in enumerate(found.wrt):
        i = k % len(prompts)
        position = hb.tokens.resolve(read.position.positions[i], prompts[i])[0]
        want = naive(case, prompts[i], read, of, position)
        assert found.matrices[k][i].shape == want.shape
        assert want.any() and (found.matrices[k][i] - want).abs().max() < EXACT * (1 + want.abs().max()), read
        _, plain = case.plain(prompts[i].ids, (), (read.site.whole, of.site))
        state = plain[read.site.whole][position]
        if read.site.unit is not None:
            state = state.unflatten(0, read.site.units(adapter.card))[read.site.unit]
        assert (found.inputs[k][i] - state).abs().max() < EXACT and (found.output[i] - plain[of.site][-1]).abs().max() < EXACT


def test_the_mean_over_prompts_and_a_small_budget_give_the_same_numbers(case, monkeypatch):
    adapter = case.adapter
    prompts = [adapter.encode(text) for text in TEXTS]
    of, wrt = Read("final_norm"), sources(adapter)[1:4]
    whole = jacobian(adapter, prompts, of, wrt)
    mean = jacobian(adapter, prompts, of, wrt, mean=True)
    monkeypatch.setattr("hookbook.engine.planning.BUDGET_BYTES", 1)
    cut = jacobian(adapter, prompts, of, wrt)
    for a, b, c in zip(whole.matrices, cut.matrices, mean.matrices, strict=True):
        assert (a - b).abs().max() < EXACT and (a.mean(0) - c).abs().max() < EXACT
    for found in (whole, mean, cut):
        for a, state, product in zip(whole.matrices, whole.inputs, found.products, strict=True):
            assert product.any() and (torch.einsum("noi,ni->no", a, state) - product).abs().max() < EXACT * (1 + product.abs().max())
    assert (whole.output - cut.output).abs().max() < EXACT


def test_the_jacobian_of_a_site_with_respect_to_itself_is_the_identity(case):
    tokens = case.adapter.encode("The cat")
    found = jacobian(case.adapter, [tokens], Read("resid_post.1"), [Read("resid_post.1")])
    assert torch.equal(found.matrices[0][0], torch.eye(case.adapter.card.d_model, dtype=torch.float64))


def test_logits_can_be_differentiated_with_respect_to_an_edit(case):
    """The gradient of a log-probability along a direction is the slope of separate runs; other rows do not leak into it."""
    adapter = case.adapter
    tokens = adapter.encode("The cat sat")
    value = direction(5, adapter.card.d_model).requires_grad_()
    rows = [
        Row(0, (hb.Edit("resid_post.0", value, "add", -2),)),
        Row(0),
        Row(0, (hb.Edit("resid_post.1", direction(6, adapter.card.d_model)),)),
    ]
    reply = adapter.run(Request([tokens], rows, [Read("resid_post.1")], Readout(tokens=torch.tensor([[7]] * 3)), grad=True))
    (grad,) = torch.autograd.grad(reply.readout.token_logprobs[0, 0], value, retain_graph=True)
    plain = value.detach().clone().requires_grad_()
    said = case.plain(tokens.ids, ((hb.Site("resid_post", 0), len(tokens) - 2, hb.Edit("resid_post.0", plain), []),), grad=True)[0]
    (want,) = torch.autograd.grad(said[-1].log_softmax(-1)[7], plain)
    assert (grad - want).abs().max() < EXACT
    assert all(g is None or not g.any() for g in torch.autograd.grad(reply.readout.token_logprobs[1:].sum(), value, allow_unused=True))
    assert not adapter.run(Request([tokens], rows[1:], [Read("resid_post.1")], Readout(k=1))).readings[0].values.requires_grad


def test_what_cannot_be_differentiated_is_refused(case):
    adapter = case.adapter
    tokens = [adapter.encode("The cat")]
    with pytest.raises(EditError, match="the source is above the output"):
        jacobian(adapter, tokens, Read("resid_post.0"), [Read("resid_post.1")])
    with pytest.raises(EditError, match="tokens see only those before them"):
        jacobian(adapter, tokens, Read("resid_post.1", 0), [Read("resid_post.0", 1)])
    with pytest.raises(TokenError, match="from one state to one"):
        jacobian(adapter, tokens, Read("resid_post.1"), [Read("resid_post.0", slice(0, 2))])
    with pytest.raises(EditError, match="a chosen token has no derivative"):
        adapter.run(Request(tokens, [Row(0)], generate=2, grad=True))
    value = torch.ones(adapter.card.d_model, requires_grad=True)
    with pytest.raises(EditError, match="this request keeps no graph"):
        adapter.run(Request(tokens, [Row(0, (hb.Edit("resid_post.0", value),))], (), Readout(k=1)))
