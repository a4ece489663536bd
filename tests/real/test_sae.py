"""The demonstration SAE on the real model: it is what its card says, fits, and does what the suite says, against SAELens' own bridge."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import hookbook as hb
from hookbook.request import Read, Readout, Request, Row
from tests.support.real import real

PROMPTS = ["The capital of France is the city of", "Hier soir, nous avons mangé dans un petit restaurant"]


@pytest.fixture(scope="module", params=["transformer_lens", "nnsight"])
def sae(request):
    return hb.sae.attach(real("gemma-3-270m", request.param), hb.sae.demo())


def test_nothing_edited_is_the_plain_run(sae):
    prompts = sae.encode_prompts(PROMPTS)
    rows = [Row(i, edits) for i in range(2) for edits in ((), (sae.splice(),), (sae.splice(keep_error=False),))]
    plain, spliced, dropped = (
        sae.model.run(Request(prompts, rows, readout=Readout(logits=True))).readout.logits.unflatten(0, (2, 3)).unbind(1)
    )
    assert (plain - spliced).abs().max() < 1e-5 * plain.abs().max() and (plain - dropped).abs().max() > 0.1


def test_what_is_read_and_clamped_is_saelens_own(sae):
    (prompt,) = sae.encode_prompts(PROMPTS[1])
    states = sae.model.run(Request([prompt], [Row(0)], [Read(sae.site, slice(None))])).readings[0].values
    acts = sae.sae.encode(states)
    found = hb.feature_activations(sae, PROMPTS[1])
    assert torch.allclose(found.dense()[1:], acts[1:], rtol=1e-5, atol=0) and 10 < (acts[1:] > 0).sum(-1).float().mean() < 100
    feature = int(acts[-1].argmax())
    new = sae.sae.encode(states)
    new[-1, feature] = 900.0
    last = states[-1] - sae.sae.decode(acts)[-1] + sae.sae.decode(new)[-1]
    ways = [sae.edit(feature, to=900.0, position=-1), hb.Edit(sae.site, last.detach(), "set")]
    ours, theirs = sae.model.run(Request([prompt], [Row(0, (edit,)) for edit in ways], readout=Readout(logits=True))).readout.logits
    assert (ours - theirs).abs().max() < 2e-3 and ours.argmax() == theirs.argmax()


def test_it_fits_and_brings_french(sae):
    french, english = hb.tasks.contrast("language_french")
    report = hb.sae_report(sae, [*french[:12], *english[:12]])
    card = json.loads((hb.sae.DEMO / "card.json").read_text())["held_out"]
    assert report.fits and report.fvu < 0.3 and report.loss_recovered > 0.9 and card["loss recovered"] > 0.9
    sides = [hb.feature_activations(sae, texts) for texts in (french, english)]
    sae = replace(sae, maxima=torch.maximum(sides[0].largest(), sides[1].largest()))
    said = hb.steer_feature(sae, 3077, hb.tasks.openings("english")[1:12:2], times_max=[2], score=hb.scores.french_score, generate=12)
    assert said.scores.mean() >= 0.5 and said.random.mean() <= 0.2 and said.base.mean() <= 0.1


def test_attributions_follow_exact_effects(sae):
    task = hb.tasks.load("country_capital")
    found = hb.feature_attribution(sae, task.template.prompt(task.pairs[:3], "France"), answer=" Paris", top=20)
    assert found.correlation() > 0.7 and int(found.top(1).feature.iloc[0]) == 1298
