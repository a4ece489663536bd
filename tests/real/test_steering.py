"""The published effects of steering, on real models, beside no vector and a random one; and that no direction of refusal is found where
none shows."""

from __future__ import annotations

import pytest
import torch

import hookbook as hb
from hookbook.request import Readout, Request, Row
from tests.support.real import real

GOOD, BAD = [" good", " great", " wonderful", " excellent", " amazing"], [" bad", " terrible", " awful", " horrible", " poor"]


def test_english_goes_on_in_french():
    model = real("gemma-3-270m")
    found = hb.contrast_vector(model, *hb.tasks.contrast("language_french"), layers=[5], position=slice(1, None))
    assert found.auroc >= 0.9 and abs(float(found.shuffled) - 0.5) <= 0.1
    said = hb.steer(model, found, hb.tasks.openings("english")[:12], strengths=[1, 2], score=hb.scores.french_score, generate=12)
    assert (said.scores.mean(0) >= 0.75).all()
    assert said.base.mean() <= 0.1 and (said.random.mean(0) <= 0.1).all()


@pytest.mark.parametrize(("name", "layer"), [("smollm2-135m-instruct", 21), ("gemma-3-270m", 13)])
def test_sentiment_moves_both_ways(name, layer):
    model = real(name)
    found = hb.contrast_vector(model, *hb.tasks.contrast("sentiment"), layers=[layer])
    odds = hb.steer(model, found, hb.tasks.openings("neutral")[:24], strengths=[-2, 2], tokens=(GOOD, BAD))
    base, (down, up) = odds.base.mean(), odds.scores.mean(0)[0]
    assert found.auroc >= 0.9 and abs(float(found.shuffled) - 0.5) <= 0.1
    assert up >= base + 3 and down <= 0
    assert ((odds.random.mean(0) - base).abs() < 0.5 * torch.stack([base - down, up - base])).all()


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_in_context_vectors_turn_a_model_and_random_ones_do_not(name):
    model = real(name)
    sentiment = hb.tasks.contrast("sentiment")
    found = hb.in_context_vector(model, list(zip(sentiment.negative[:10], sentiment.positive[:10], strict=True)))
    edits, draw = found.edits(0.02), torch.Generator().manual_seed(0)
    noise = [torch.randn(model.card.d_model, generator=draw) for _ in edits]
    random = [hb.Edit(edit.site, 0.02 * x / x.norm(), "rotate", slice(None), scope="all") for edit, x in zip(edits, noise, strict=True)]
    prompts = [model.encode(text) for text in hb.tasks.openings("neutral")[:24]]
    ids = torch.tensor([[*(model.encode(f"It was{word}").ids[-1] for word in (*GOOD, *BAD))]] * (3 * len(prompts)))
    rows = [Row(i, tuple(some)) for some in ([], edits, random) for i in range(len(prompts))]
    said = model.run(Request(prompts, rows, (), Readout(tokens=ids))).readout.token_logprobs
    base, turned, control = (said[:, :5].logsumexp(-1) - said[:, 5:].logsumexp(-1)).unflatten(0, (3, -1)).mean(1)
    assert turned >= base + 3 and abs(control - base) <= 1.5


def test_what_a_model_does_not_do_has_no_direction():
    """No request makes the first token of a refusal likelier than all others together, so that the rule has nothing to choose from."""
    model = real("smollm2-135m-instruct")
    positive, negative = hb.tasks.contrast("refusal")
    found = hb.contrast_vector(
        model,
        positive[:48],
        negative[:48],
        site="resid_pre",
        layers=[12],
        position=hb.tokens.after_instruction(model.tokenizer)[-1:],
        chat=True,
    )
    chosen = hb.select_direction(model, found, positive[48:56], negative[48:56], tokens=["I"])
    assert found.auroc >= 0.8  # the requests are told apart all the same
    assert chosen.best is None and "no positive prompt" in chosen.why and (chosen.base[0] < 0).all()


def test_exported_weights_are_the_ablated_run(tmp_path):
    model = real("smollm2-135m-instruct")
    vector = hb.Vector.of(model, "resid_pre.12", torch.randn(model.card.d_model, generator=torch.Generator().manual_seed(0)))
    new = hb.load(str(hb.orthogonalize(model, vector, tmp_path / "new")), device="cpu")
    prompts = [model.encode("The capital of France is"), model.encode("Name a colour.", chat=True)]
    ablated, clean = (
        model.run(Request(prompts, [Row(0, edits), Row(1, edits)], (), Readout(logits=True))).readout.logits
        for edits in (tuple(hb.directional_ablation(vector)), ())
    )
    ours = new.run(Request(prompts, [Row(0), Row(1)], (), Readout(logits=True))).readout.logits
    assert (ours - ablated).abs().max() < 1e-3 < 1e-2 < (clean - ablated).abs().max()
