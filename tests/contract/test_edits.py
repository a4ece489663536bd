"""What edits and reads mean, on every adapter."""

from __future__ import annotations

import pytest
import torch

import hookbook as hb
from hookbook.request import Read, Readout, Request, Row
from tests.support.formulas import formula

SITES = ("resid_pre", "attn_out", "mlp_out", "resid_post")


def run(adapter, edits=(), reads=(), text="The cat sat", **more):
    return adapter.run(Request([adapter.encode(text)], [Row(0, tuple(edits))], list(reads), Readout(logits=True), **more))


@pytest.mark.parametrize("name", SITES)
def test_a_read_has_its_declared_shape_and_value(case, name):
    adapter = case.adapter
    for layer in range(adapter.card.n_layers):
        site = hb.Site(name, layer)
        reading = run(adapter, reads=[Read(site, slice(None))]).readings[0]
        tokens = adapter.encode("The cat sat")
        _, found = case.plain(tokens.ids, (), (site,))
        assert reading.values.shape == (len(tokens), adapter.card.d_model)
        assert (reading.values - found[site]).abs().max() < 1e-10


def test_the_stream_is_the_sum_of_what_blocks_add(case):
    adapter = case.adapter
    for layer in range(adapter.card.n_layers):
        pre, attn, mlp, post = (r.values for r in run(adapter, reads=[Read(hb.Site(name, layer), slice(None)) for name in SITES]).readings)
        assert (pre + attn + mlp - post).abs().max() < 1e-9


@pytest.mark.parametrize("op", ["set", "add", "scale", "project_out", "clamp", "rotate"])
@pytest.mark.parametrize("name", SITES)
def test_an_edit_does_what_its_formula_says(case, name, op):
    adapter, site = case.adapter, hb.Site(name, 1)
    value = 0.3 if op == "scale" else torch.linspace(-1, 2, adapter.card.d_model, dtype=torch.float64)
    edit = hb.Edit(site, value, op, 2, to=2.5 if op == "clamp" else 0.0)
    before = run(adapter, reads=[Read(site, slice(None))]).readings[0].values
    after = run(adapter, [edit], [Read(site, slice(None))]).readings[0].values
    want = before.clone()
    want[2] = formula(before[2], edit)
    assert (after - want).abs().max() < 1e-10
    assert (after - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", SITES)
def test_edits_that_do_nothing_change_nothing(case, name):
    adapter, site = case.adapter, hb.Site(name, 1)
    d = adapter.card.d_model
    clean = run(adapter, reads=[Read(site)])
    own, unit = clean.readings[0].values[0], torch.ones(d, dtype=torch.float64) / d**0.5
    for edit in (
        hb.Edit(site, own, "set"),
        hb.Edit(site, torch.zeros(d, dtype=torch.float64), "add"),
        hb.Edit(site, 1.0, "scale"),
        hb.Edit(site, unit, "clamp", to=float(own @ unit)),
    ):
        assert (run(adapter, [edit]).readout.logits - clean.readout.logits).abs().max() < 1e-9, edit.op


def test_projection_takes_the_whole_component_whatever_the_length(case):
    adapter, site = case.adapter, hb.Site("resid_post", 1)
    vector = 37 * torch.randn(adapter.card.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    after = run(adapter, [hb.Edit(site, vector, "project_out")], [Read(site)]).readings[0].values[0]
    assert abs(float(after @ vector)) < 1e-8


def test_a_rows_edits_at_one_site_apply_in_order(case):
    adapter, site = case.adapter, hb.Site("resid_post", 1)
    vector = torch.linspace(1, 2, adapter.card.d_model, dtype=torch.float64)
    set_, double = hb.Edit(site, vector, "set"), hb.Edit(site, 2.0, "scale")
    assert torch.allclose(run(adapter, [set_, double], [Read(site)]).readings[0].values[0], 2 * vector)
    assert torch.allclose(run(adapter, [double, set_], [Read(site)]).readings[0].values[0], vector)


def test_rows_do_not_touch_each_other_and_padding_moves_nothing(case):
    adapter, site = case.adapter, hb.Site("resid_post", 1)
    short, long = adapter.encode("Hi"), adapter.encode("A much longer prompt than that")
    vector = torch.full((adapter.card.d_model,), 2.0, dtype=torch.float64)
    rows = [Row(0), Row(1), Row(0, (hb.Edit(site, vector),)), Row(1, (hb.Edit(site, -vector, position=0),))]
    together = adapter.run(Request([short, long], rows, [Read(site)], Readout(logits=True)))
    for i, row in enumerate(rows):
        alone = adapter.run(Request([(short, long)[row.prompt]], [Row(0, row.edits)], [Read(site)], Readout(logits=True)))
        assert (together.readout.logits[i] - alone.readout.logits[0]).abs().max() < 1e-10
        assert (together.readings[0].values[i] - alone.readings[0].values[0]).abs().max() < 1e-10


def test_the_same_request_twice_gives_the_same_reply(case):
    adapter = case.adapter
    edit = hb.Edit(hb.Site("mlp_out", 0), torch.ones(adapter.card.d_model, dtype=torch.float64))
    assert torch.equal(run(adapter, [edit]).readout.logits, run(adapter, [edit]).readout.logits)


def test_logits_are_the_models_own(case):
    adapter = case.adapter
    tokens = adapter.encode("The cat sat")
    assert (run(adapter).readout.logits[0] - adapter.plain_logits(torch.tensor([tokens.ids]))[0, -1]).abs().max() < 1e-10


def test_an_edit_above_everything_that_is_read_is_refused(case):
    adapter = case.adapter
    edit = hb.Edit(hb.Site("resid_post", 1), torch.ones(adapter.card.d_model, dtype=torch.float64))
    with pytest.raises(hb.errors.EditError, match="never fire"):
        adapter.run(Request([adapter.encode("Hi")], [Row(0, (edit,))], [Read(hb.Site("resid_post", 0))]))


def test_refuses_agrees_with_run(case):
    adapter = case.adapter
    for name in SITES:
        site = hb.Site(name, 0)
        if adapter.refuses(site) is None:
            assert site in adapter.sites and run(adapter, reads=[Read(site)]).readings[0].values.shape == (1, adapter.card.d_model)
        else:
            with pytest.raises(hb.errors.Refused):
                run(adapter, reads=[Read(site)])
