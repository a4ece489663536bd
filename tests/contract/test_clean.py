"""Wrapping changes nothing, and nothing is left behind, also when a run raises."""

from __future__ import annotations

import pytest
import torch

import hookbook as hb
from hookbook.request import Read, Readout, Request, Row
from hookbook.travel.climb import Climb


def modules(adapter):
    model = adapter.model
    return list((model if isinstance(model, torch.nn.Module) else model._module).modules())


def hooks(adapter) -> list[int]:
    found = []
    for module in modules(adapter):
        found += [len(module._forward_hooks), len(module._forward_pre_hooks), len(getattr(module, "fwd_hooks", ()))]
    return found


def request(adapter):
    edit = hb.Edit(hb.Site("attn_out", 1), torch.ones(adapter.card.d_model, dtype=torch.float64))
    return Request(
        [adapter.encode("The cat"), adapter.encode("Hi")],
        [Row(0), Row(1, (edit,))],
        [Read(hb.Site("mlp_out", 1))],
        Readout(logits=True),
        generate=2,
    )


def test_no_hook_survives_a_run(case):
    case.adapter.run(request(case.adapter))
    before = hooks(case.adapter)
    case.adapter.run(request(case.adapter))
    assert hooks(case.adapter) == before


@pytest.mark.parametrize("where", ["resid_pre", "attn_out", "mlp_out"])
def test_no_hook_survives_a_run_that_raised(case, monkeypatch, where):
    adapter = case.adapter
    clean = adapter.run(request(adapter))
    before = hooks(adapter)
    visit = Climb.visit

    def broken(self, name, layer, x, **more):
        if name == where and layer == 1:
            raise ZeroDivisionError("on purpose")
        return visit(self, name, layer, x, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Climb, "visit", broken)
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            adapter.run(request(adapter))
    assert hooks(adapter) == before
    assert torch.equal(adapter.run(request(adapter)).readout.logits, clean.readout.logits)


def test_wrapping_changes_nothing(case):
    model = case.adapter.model
    tokens = torch.tensor([case.adapter.encode("The cat").ids])
    parameters = [(p, p.clone()) for module in modules(case.adapter) for p in module._parameters.values() if p is not None]
    logits, before = case.adapter.plain_logits(tokens), hooks(case.adapter)
    again = case.adapter if case.name == "toy" else hb.wrap(model)
    again.run(request(again))
    assert torch.equal(again.plain_logits(tokens), logits) and hooks(again) == before
    assert again.model is model and again.card == case.adapter.card
    now = [p for module in modules(again) for p in module._parameters.values() if p is not None]
    assert len(now) == len(parameters) and all(a is b and torch.equal(a, old) for a, (b, old) in zip(now, parameters, strict=True))


def test_a_hook_of_the_users_stays(hook_point_case):
    case = hook_point_case
    model, seen = case.adapter.model, []
    model.add_hook("blocks.1.hook_attn_out", lambda x, hook: seen.append(x.shape[0]))
    try:
        case.adapter.run(request(case.adapter))
        count = len(seen)
        assert count > 0
        model(torch.tensor([case.adapter.encode("Hi").ids]))
        assert len(seen) == count + 1
    finally:
        model.reset_hooks()


def test_a_hook_of_the_users_acts_on_forks_too(hook_point_case):
    """Rows run one at a time then: the hook sees the tokens that it would see in a plain run."""
    adapter = hook_point_case.adapter
    edits = [(hb.Edit(hb.Site("resid_post", 0), float(i), "scale"),) for i in range(12)]
    request = Request([adapter.encode("The cat sat")], [Row(0, e) for e in edits], [], Readout(logits=True))
    shift, n = torch.linspace(0, 1, adapter.card.d_model, dtype=torch.float64), len(request.prompts[0])

    def hook(x, hook):
        return torch.cat([x[:, :-1], x[:, -1:] + shift], 1) if x.shape[:2] == (1, n) else x

    adapter.model.add_hook("blocks.1.hook_mlp_out", hook)
    try:
        hooked = adapter.run(request).readout.logits
    finally:
        adapter.model.reset_hooks()
    rows = [Row(0, (*e, hb.Edit(hb.Site("mlp_out", 1), shift))) for e in edits]
    ours = adapter.run(Request(request.prompts, rows, [], Readout(logits=True))).readout.logits
    assert (hooked - ours).abs().max() < 1e-9


def test_what_comes_back_needs_no_gradient_and_the_mode_is_as_before(case):
    assert torch.is_grad_enabled()
    reply = case.adapter.run(request(case.adapter))
    assert not reply.readings[0].values.requires_grad and torch.is_grad_enabled()
