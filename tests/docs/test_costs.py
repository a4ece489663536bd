"""The formulas of docs/explanation/forked-pass.md, beside what runs cost."""

from __future__ import annotations

import pytest
import torch

import hookbook as hb
from hookbook import deferred
from hookbook.engine.cost import accounting
from hookbook.request import Each, Read, Readout, Request, Row
from hookbook.testing import toy
from tests.docs.fences import ROOT

L = 6
PAGE = (ROOT / "docs/explanation/forked-pass.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model() -> hb.Adapter:
    return toy(n_layers=L, n_ctx=512)


def cost(model: hb.Adapter, rows: list[Row], n: int) -> int:
    request = Request([model.encode("x" * (n - 1))], rows, (), Readout(k=1))
    assert len(request.prompts[0]) == n
    return model.run(request).cost["token_layers"]


def add(model: hb.Adapter, layer: int, token: int) -> Row:
    return Row(0, (hb.Edit(f"resid_post.{layer}", torch.ones(model.card.d_model), "add", token),))


@pytest.mark.parametrize("n", [200, 400])
def test_a_fork_costs_the_tokens_and_the_blocks_above_its_edit(model, n):
    assert "`(n - i)(L - l - 1)`" in PAGE and "`n L`" in PAGE
    for layer in range(L):
        for i in (n - 1, n - 7):
            many = 40  # so that the prefix is worth a pass of its own
            forks = cost(model, [Row(0), *[add(model, layer, i)] * many], n) - cost(model, [Row(0)], n)
            assert forks == many * (n - i) * (L - layer - 1), (layer, i)


@pytest.mark.parametrize("n", [200, 400])
def test_all_pairs_of_a_patchscope_cost_what_the_page_says(model, n):
    assert "`L^2 (L - 1) / 2`" in PAGE and "`n L^3`" in PAGE
    target = "x" * (n - 1)
    result = hb.patchscope(model, "ab", target=target, target_position=-1, target_layers="all", k=1)
    whole = n * L + L * L * (L - 1) // 2 + len(model.encode("ab")) * L  # and the source, of which states are read
    assert result.settings["cost"]["token_layers"] == whole
    plan = hb.patchscope.plan(model, "ab", target=target, target_position=-1, target_layers="all", k=1)
    assert plan.token_layers == whole
    separate = sum(cost(model, [add(model, layer, -1)], n) for layer in range(L))
    assert L * separate == n * L**3


def test_what_is_not_read_does_not_run(model):
    assert "`n (l + 1)`" in PAGE
    for layer in range(L):
        reply = model.run(Request([model.encode("abcd")], [Row(0)], [Read(f"resid_post.{layer}", Each((0,)))]))
        assert reply.cost["token_layers"] == 5 * (layer + 1)


def test_a_jacobian_of_all_layers_costs_a_product_for_each_output(model):
    assert "`d`" in PAGE and "`L d`" in PAGE
    prompt = [model.encode("abcd")]
    last, reads = Read(f"resid_post.{L - 1}"), [Read(f"resid_post.{layer}", 1) for layer in range(L - 1)]
    with accounting() as account, deferred.recording(dry=True):
        hb.jacobian(model, prompt, last, reads)
    assert account.plan.vjps == model.card.d_model
