"""Neurons taken out together, on every adapter, against plain runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.errors import DataError, TokenError
from hookbook.testing import toy
from tests.support.formulas import flat

PROMPTS = ["a prompt", "another, longer"]


@pytest.mark.parametrize("other", [None, "d"])
def test_the_most_effective_are_taken_out_together(case, other):
    exact = 1e-9 if case.name == "toy" or "gpt2" in case.name else 1e-6
    found = hb.cumulative_ablation(case.adapter, PROMPTS, "c", other, ks=[1, 3, 8], layers=[0, 1], random=2, seed=4)
    sweep = hb.neuron_sweep(case.adapter, PROMPTS, ["c", "d"], layers=[0, 1])
    word = case.adapter.tokenizer.convert_tokens_to_ids("c")
    assert found.neurons.shape == (2, 8, 2) and found.random_ids.shape == (2, 2, 3)
    for p, prompt in enumerate(found.prompts):
        falls = -sweep.changes[p, :, 0] + (0 if other is None else sweep.changes[p, :, 1])
        best = falls.argsort(descending=True, stable=True)[:8]
        assert [f"mlp_act.{layer}.{i}" for layer, i in found.neurons[p].tolist()] == [sweep.names[i] for i in best.tolist()]
        assert (found.effects[p] - falls[best]).abs().max() < exact
        plain = case.plain(prompt.ids, ())[0][-1].log_softmax(-1)
        assert int(found.plain_ids[p]) == int(plain.argmax()) and abs(float(found.plain_logprobs[p] - plain[word])) < exact
        for at, k in enumerate((1, 3, 8)):
            edits = [hb.Edit(hb.Site("mlp_act", layer, i), 0.0, "set") for layer, i in found.neurons[p, :k].tolist()]
            out = case.plain(prompt.ids, flat(edits, prompt))[0][-1].log_softmax(-1)
            assert abs(float(found.logprobs[p, at] - out[word])) < exact and int(found.token_ids[p, at]) == int(out.argmax())
    assert (found.random_logprobs - found.plain_logprobs[:, None, None]).abs().max() > 1e-6
    assert not torch.equal(found.random_logprobs[:, 0], found.random_logprobs[:, 1])


def test_all_neurons_are_all_neurons_whatever_their_order():
    """Drawn or ranked, without every neuron of the layers it is the same run: MLPs that add their biases alone."""
    adapter = toy()
    total = 3 * adapter.card.d_mlp
    found = hb.cumulative_ablation(adapter, PROMPTS, "c", ks=[total], random=2)
    word = torch.tensor([[adapter.encode("c", bos=False).ids[0]]])
    edits = tuple(hb.Edit(hb.Site("mlp_act", layer), torch.zeros(adapter.card.d_mlp), "set") for layer in range(3))
    for row, prompt in enumerate(found.prompts):
        request = hb.request.Request([prompt], [hb.request.Row(0, edits)], (), hb.request.Readout(tokens=word))
        want = float(adapter.run(request).said.token_logprobs[0, 0])
        assert abs(float(found.logprobs[row, 0]) - want) < 1e-9
        assert (found.random_logprobs[row, :, 0] - want).abs().max() < 1e-9


def test_gradients_rank_as_they_attribute(case):
    found = hb.cumulative_ablation(case.adapter, PROMPTS, ["c", "d"], by="attribution", ks=[4], random=0)
    one = hb.neuron_attribution(case.adapter, PROMPTS, ["c", "d"], position=-1, exact=False)
    width = case.adapter.card.d_mlp
    for p in range(2):
        flat_ = one.attributions[p].flatten()
        assert [layer * width + i for layer, i in found.neurons[p].tolist()] == flat_.argsort(descending=True, stable=True)[:4].tolist()
        assert (found.effects[p] - flat_.sort(descending=True).values[:4]).abs().max() < 1e-6
    assert found.random_logprobs.shape == (2, 0, 1)


def test_prompts_of_other_answers_are_ranked_by_their_own(case):
    """And texts for the mean are read as they are for one."""
    ask: Any = {"ks": [2], "layers": [0], "random": 0, "ablate": "mean", "reference": ["some", "words"]}
    both = hb.cumulative_ablation(case.adapter, [*PROMPTS, PROMPTS[0]], ["c", "d", "c"], **ask)
    for i, (prompt, answer) in enumerate(zip([*PROMPTS, PROMPTS[0]], ["c", "d", "c"], strict=True)):
        one = hb.cumulative_ablation(case.adapter, prompt, answer, **ask)
        assert torch.equal(both.neurons[i], one.neurons[0]) and (both.logprobs[i] - one.logprobs[0]).abs().max() < 1e-6


def test_a_flip_is_the_first_of_them():
    likeliest = hb.neuron_sweep(toy(), PROMPTS, layers=[2], distribution=True).plain_ids.tolist()
    found = hb.cumulative_ablation(toy(), PROMPTS, likeliest, random=2)
    assert found.ks.tolist() == [1, 2, 5, 10, 20, 50]
    for p in range(2):
        changed = (found.token_ids[p] != found.plain_ids[p]).tolist()
        assert int(found.flips[p]) == (found.ks.tolist()[changed.index(True)] if any(changed) else 0)
        for draw in range(2):
            changed = (found.random_ids[p, draw] != found.plain_ids[p]).tolist()
            assert int(found.random_flips[p, draw]) == (found.ks.tolist()[changed.index(True)] if any(changed) else 0)
    assert found.flips.any()


def test_frames_and_pictures(plt):
    found = hb.cumulative_ablation(toy(), PROMPTS, "c", "d", ks=[1, 4], random=2)
    frame = found.to_frame()
    assert len(frame) == 2 * 3 * 2 and list(frame.control.unique()) == ["effective", "random 0", "random 1"]
    assert frame.logprob.iloc[7] == pytest.approx(float(found.logprobs[1, 1]))
    assert found.top(2, prompt=1).effect.tolist() == pytest.approx(found.effects[1, :2].tolist())
    ax = found.plot(prompt=1)
    assert ax.lines[0].get_ydata()[1] == pytest.approx(float(found.logprobs[1, 1]))


def test_its_plan_and_its_checkpoint(tmp_path):
    ask: Any = {"prompts": PROMPTS, "answer": "c", "ks": [1, 4], "random": 1}
    cheap = hb.cumulative_ablation.plan(toy(), **ask, by="attribution")
    assert cheap.token_layers == hb.cumulative_ablation(toy(), **ask, by="attribution").settings["cost"]["token_layers"] > 0
    plan = hb.cumulative_ablation.plan(toy(), **ask)
    found = hb.cumulative_ablation(toy(), **ask, checkpoint=tmp_path)
    assert plan.token_layers >= found.settings["cost"]["token_layers"] > 0 and any(tmp_path.rglob("*.safetensors"))
    assert torch.equal(found.logprobs, hb.cumulative_ablation(toy(), **ask, checkpoint=tmp_path).logprobs)


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        ({"ks": []}, DataError, "ascending"),
        ({"ks": [1, 2.5]}, TokenError, "not a whole number"),
        ({"ks": [1, None]}, TokenError, "not a whole number"),
        ({"answer": None}, TokenError, "no answer"),
        ({"ks": [4, 2]}, DataError, "ascending"),
        ({"ks": [1000]}, DataError, "96 neurons"),
        ({"ks": [0, 2]}, TokenError, "ks"),
        ({"by": "size"}, DataError, "effect, attribution"),
        ({"random": -1}, TokenError, "random"),
        ({"answer": ["c"]}, DataError, "1 for 2 prompts"),
    ],
)
def test_what_cannot_be_asked_is_refused(more, error, match, monkeypatch):
    adapter = toy()
    monkeypatch.setattr(type(adapter), "run", lambda *args, **kwargs: pytest.fail("it was run"))
    ask: dict[str, Any] = {"prompts": PROMPTS, "answer": "c"} | more
    with pytest.raises(error, match=match):
        hb.cumulative_ablation(adapter, **ask)
