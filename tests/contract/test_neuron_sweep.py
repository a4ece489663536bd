"""Every neuron taken out, on every adapter, against naive loops of whole runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.errors import DataError, SiteError, TokenError
from hookbook.testing import toy
from tests.support.formulas import flat

PROMPTS = ["a prompt", "another, longer"]
REFERENCE = ["some words", "and a few more words", "x"]
LAYERS = [0, "mlp_act.1.3", "mlp_act.1.5"]


def exact(case) -> float:
    return 1e-10 if case.name == "toy" or "gpt2" in case.name else 1e-6  # the others' norms compute in float32


def acts(case, tokens, layer: int) -> torch.Tensor:
    """Of a plain run `[pos, neuron]`."""
    site = hb.Site("mlp_act", layer)
    return case.plain(tokens.ids, (), (site,))[1][site]


@pytest.mark.parametrize("position", [-1, slice(1, None)])
@pytest.mark.parametrize("ablate", ["zero", -1.5])
def test_a_sweep_is_a_loop_of_plain_runs(case, position, ablate):
    found = hb.neuron_sweep(case.adapter, PROMPTS, ["c", 7], layers=LAYERS, position=position, ablate=ablate, distribution=True)
    d_mlp, wanted = case.adapter.card.d_mlp, [case.adapter.tokenizer.convert_tokens_to_ids("c"), 7]
    assert found.names == [*(f"mlp_act.0.{i}" for i in range(d_mlp)), "mlp_act.1.3", "mlp_act.1.5"]
    assert found.wanted == ("c", case.adapter.tokenizer.decode([7]))
    number = 0.0 if ablate == "zero" else ablate
    assert (found.values == number).all()
    for row, prompt in enumerate(found.prompts):
        plain = case.plain(prompt.ids, ())[0][-1]
        assert (found.wanted_logits[row] - plain[wanted]).abs().max() < exact(case)
        for at, name in enumerate(found.names):
            site = hb.Site.parse(name)
            before = acts(case, prompt, site.layer)[position, site.unit].flatten()
            assert abs(float(found.activations[row, at] - before[before.abs().argmax()])) < exact(case)
            changed = case.plain(prompt.ids, flat([hb.Edit(site, number, "set", position)], prompt))[0][-1]
            assert (found.changes[row, at] - (changed - plain)[wanted]).abs().max() < exact(case)
            kl = (plain.softmax(-1) * (plain.log_softmax(-1) - changed.log_softmax(-1))).sum()
            assert abs(float(found.kl[row, at] - kl)) < exact(case)
            assert int(found.token_ids[row, at]) == int(changed.argmax()) and int(found.plain_ids[row]) == int(plain.argmax())
    assert found.changes.abs().max() > 1e-3


def test_means_and_drawn_values_are_those_of_other_texts(case, monkeypatch):
    coded = [case.adapter.encode(text) for text in REFERENCE]
    special = set(case.adapter.tokenizer.all_special_ids)
    counted = [[i for i, token in enumerate(tokens.ids) if token not in special] for tokens in coded]
    assert any(len(some) < len(tokens) for some, tokens in zip(counted, coded, strict=True)) == any(
        token in special for tokens in coded for token in tokens.ids
    )
    every = {layer: torch.cat([acts(case, tokens, layer)[at] for tokens, at in zip(coded, counted, strict=True)]) for layer in (0, 1)}
    ask: Any = {"tokens": ["c"], "layers": [0, 1], "reference": REFERENCE}
    mean = hb.neuron_sweep(case.adapter, PROMPTS, ablate="mean", **ask)
    want = torch.cat([every[layer].mean(0) for layer in (0, 1)])
    assert (mean.values - want).abs().max() < 1e-6
    drawn = hb.neuron_sweep(case.adapter, PROMPTS, ablate="resample", seed=3, **ask)
    width = case.adapter.card.d_mlp
    columns = [every[layer][:, i] for layer in (0, 1) for i in range(width)]
    assert all(float((column - value).abs().min()) < 1e-6 for column, value in zip(columns, drawn.values.tolist(), strict=True))
    assert (drawn.values - mean.values).abs().max() > 1e-3
    for found in (mean, drawn):  # and these are what is written
        at = int(found.changes[0, :, 0].abs().argmax())
        edit = hb.Edit(found.names[at], float(found.values[at]), "set")
        prompt, word = found.prompts[0], case.adapter.tokenizer.convert_tokens_to_ids("c")
        changed = case.plain(prompt.ids, flat([edit], prompt))[0][-1] - case.plain(prompt.ids, ())[0][-1]
        assert abs(float(found.changes[0, at, 0] - changed[word])) < 1e-6
    monkeypatch.setattr("hookbook.recipes.neurons.ablation.HELD", 1)  # a text at a time
    for ablate, whole in (("mean", mean), ("resample", drawn)):
        again = hb.neuron_sweep(case.adapter, PROMPTS, ablate=ablate, seed=3, **ask)
        assert (again.values - whole.values).abs().max() < 1e-6
    other = hb.neuron_sweep(case.adapter, PROMPTS, ablate="resample", seed=4, **ask)
    assert not torch.equal(other.values, drawn.values)


def test_drawn_values_come_from_all_tokens():
    """Each token is as likely as any other: of 32 x 3 neurons about as many take each of 12 tokens."""
    adapter = toy()
    found = hb.neuron_sweep(adapter, "ab", ["c"], ablate="resample", reference=["abcdef", "ghijkl"])
    tokens = [adapter.encode(text) for text in ("abcdef", "ghijkl")]
    reads = [hb.request.Read(hb.Site("mlp_act", layer), slice(1, None)) for layer in range(3)]
    reply = adapter.run(hb.request.Request(tokens, [hb.request.Row(0), hb.request.Row(1)], reads))
    values = torch.stack([reading.values for reading in reply.readings], 1).flatten(1)  # [token, neuron]
    near = (values - found.values).abs().argmin(0).bincount(minlength=12)
    assert near.sum() == 96 and near.min() >= 1 and near.max() <= 24


def test_a_plan_and_parts_are_the_same(case, tmp_path, monkeypatch):
    ask: Any = {"tokens": ["c"], "layers": [0]}
    plan = hb.neuron_sweep.plan(case.adapter, PROMPTS, **ask)
    found = hb.neuron_sweep(case.adapter, PROMPTS, **ask, checkpoint=tmp_path)
    assert (plan.token_layers, plan.unembedded) == (found.settings["cost"]["token_layers"], 0)
    monkeypatch.setattr("hookbook.engine.planning.FAST_BYTES", 1)  # as few rows as there may be in a climb
    cut = hb.neuron_sweep(case.adapter, PROMPTS, **ask)
    assert cut.settings["cost"]["climbs"] >= found.settings["cost"]["climbs"]
    assert (cut.changes - found.changes).abs().max() < exact(case) and not found.kl.numel()


def test_what_does_most_is_named_and_drawn():
    found = hb.neuron_sweep(toy(), PROMPTS, ["c"], distribution=True)
    frame = found.to_frame()
    assert len(frame) == 2 * 96 and list(frame.columns) == [
        "prompt",
        "site",
        "layer",
        "unit",
        "activation",
        "logit_change c",
        "kl",
        "plain_token",
        "token",
    ]
    row, at = divmod(int(found.changes[..., 0].abs().argmax()), 96)
    best = found.top(1).iloc[0]
    assert (best.prompt, best.layer, best.unit) == (PROMPTS[row], int(found.layers[at]), int(found.neurons[at]))
    assert best["logit_change c"] == pytest.approx(float(found.changes[row, at, 0]))
    assert found.top(1, by="kl").iloc[0].kl == pytest.approx(float(found.kl.max()))
    ax = found.plot(n=5, value="kl")
    widths = [patch.get_width() for patch in ax.patches]
    assert len(widths) == 5 and max(widths) == pytest.approx(float(found.kl[0].max()))
    with pytest.raises(TokenError, match="'d'"):
        found.top(by="d")


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        ({}, DataError, "asks nothing"),
        ({"tokens": ["c"], "ablate": "median"}, DataError, "'median'"),
        ({"tokens": ["c"], "ablate": math.nan}, DataError, "nan"),
        ({"tokens": ["c"], "ablate": True}, DataError, "True"),
        ({"tokens": ["c"], "ablate": "mean"}, DataError, "without reference="),
        ({"tokens": ["c"], "reference": ["a"]}, DataError, "with reference="),
        ({"tokens": ["c"], "ablate": "mean", "reference": []}, TokenError, "no source prompts"),
        ({"tokens": ["c"], "layers": ["resid_post.1"]}, SiteError, "neurons of resid_post.1"),
        ({"tokens": ["c"], "layers": ["mlp_act.1.99"]}, SiteError, "0 to 31"),
        ({"tokens": "c"}, TokenError, "a list of texts"),
        ({"tokens": ["c"], "position": 9}, TokenError, "9"),
    ],
)
def test_bad_input_is_refused_before_work(more, error, match, monkeypatch):
    adapter = toy()
    monkeypatch.setattr(type(adapter), "forward", lambda *args, **kwargs: pytest.fail("something ran"))
    with pytest.raises(error, match=match):
        hb.neuron_sweep(adapter, "ab", **more)
