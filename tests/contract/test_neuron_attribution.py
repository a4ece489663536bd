"""Neurons by a gradient, on every adapter: finite differences and runs without a neuron, both by naive loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.errors import DataError, SiteError, TokenError
from hookbook.testing import toy
from tests.support.formulas import flat

PROMPTS = ["a prompt", "another, longer"]


def exact(case) -> float:
    return 1e-10 if case.name == "toy" or "gpt2" in case.name else 1e-6  # the others' norms compute in float32


def metric(case, prompt, of: str, words, *edits) -> float:
    """Of one plain run."""
    logits = case.plain(prompt.ids, flat(edits, prompt))[0][-1]
    values = {"logit": logits, "logprob": logits.log_softmax(-1), "probability": logits.softmax(-1)}[of][words]
    return float(values[0] - values[1] if len(words) > 1 else values[0])


@pytest.mark.parametrize(("of", "other"), [("logit", None), ("logit", "e"), ("logprob", None), ("probability", "e")])
def test_gradients_are_differences_and_effects_are_runs_without_a_neuron(case, of, other):
    found = hb.neuron_attribution(case.adapter, PROMPTS, ["c", 7], other, of=of, layers=[0, -1], top=3, random=3, seed=1)
    ids = case.adapter.tokenizer.convert_tokens_to_ids
    words = [[word, *([] if other is None else [ids(other)])] for word in (ids("c"), 7)]
    assert found.layers == (0, case.adapter.card.n_layers - 1) and len(found.entries) == 12
    special = set(case.adapter.tokenizer.all_special_ids)
    looked = [(i, p) for i, prompt in enumerate(found.prompts) for p, token in enumerate(prompt.ids) if token not in special]
    assert [*zip(found.token_rows.tolist(), found.token_positions.tolist(), strict=True)] == looked
    for t, (row, position) in enumerate(looked):
        for at, layer in enumerate(found.layers):
            site = hb.Site("mlp_act", layer)
            values = case.plain(found.prompts[row].ids, (), (site,))[1][site][position]
            assert (found.activations[t, at] - values).abs().max() < exact(case)
    for row, prompt in enumerate(found.prompts):
        assert abs(float(found.metric[row]) - metric(case, prompt, of, words[row])) < exact(case)
    step = 1e-4 if exact(case) < 1e-8 else 1e-2
    for (t, at, neuron), effect in zip(found.entries.tolist(), found.effects.tolist(), strict=True):
        row, position = looked[t]
        prompt, site = found.prompts[row], hb.Site("mlp_act", found.layers[at], neuron)
        gone = hb.Edit(site, 0.0, "set", position)
        assert abs(effect - (float(found.metric[row]) - metric(case, prompt, of, words[row], gone))) < exact(case)
        up, down = (metric(case, prompt, of, words[row], hb.Edit(site, sign * step, "add", position)) for sign in (1, -1))
        slope = float(found.gradients[t, at, neuron])
        assert abs(slope - (up - down) / (2 * step)) < (1e-6 if exact(case) < 1e-8 else 2e-3) * (1 + abs(slope))


def test_the_largest_and_others_are_measured():
    found = hb.neuron_attribution(toy(), PROMPTS, "c", top=6, random=5, seed=3)
    sizes = [int((found.token_rows == row).sum()) for row in (0, 1)]
    start = 0
    for row, size in enumerate(sizes):
        mine = found.entries[11 * row : 11 * (row + 1)]
        assert found.drawn[11 * row : 11 * (row + 1)].tolist() == [False] * 6 + [True] * 5
        assert len({tuple(entry) for entry in mine.tolist()}) == 11
        values = found.attributions[start : start + size].abs()
        largest = values.flatten().topk(6).values
        assert torch.equal(values[mine[:6, 0] - start, mine[:6, 1], mine[:6, 2]], largest)
        start += size
    again, other = (hb.neuron_attribution(toy(), PROMPTS, "c", top=6, random=5, seed=seed) for seed in (3, 4))
    assert torch.equal(again.entries, found.entries) and not torch.equal(other.entries, found.entries)
    alone = hb.neuron_attribution(toy(), PROMPTS, "c", top=0, random=5, seed=3)
    assert alone.drawn.all() and len(alone.effects) == 10 and not alone.effects.isnan().any()
    none = hb.neuron_attribution(toy(), PROMPTS, "c", top=0, random=0)
    assert len(none.to_frame()) == 0 and torch.equal(none.gradients, found.gradients)
    everything = hb.neuron_attribution(toy(), "ab", "c", layers=[1], position=-1, top=40, random=9)
    assert len(everything.entries) == 32 and not everything.drawn.any()


def test_correlations_are_of_the_entries_and_their_ranks():
    found = hb.neuron_attribution(toy(), PROMPTS, "c", top=20, random=20)
    frame = found.to_frame()
    assert frame.control.value_counts().to_dict() == {"largest": 40, "random": 40}
    for of, control in (("largest", "largest"), ("drawn", "random")):
        mine = frame[frame.control == control]
        x, y = torch.tensor(mine.attribution.to_numpy()), torch.tensor(mine.effect.to_numpy())
        assert found.correlation(of) == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]), abs=1e-6)
        ranks = torch.stack([(z[:, None] > z).double().sum(1) + (z[:, None] == z).double().sum(1) / 2 for z in (x, y)])
        assert found.correlation(of, ranks=True) == pytest.approx(float(torch.corrcoef(ranks)[0, 1]), abs=1e-6)
    assert found.correlation("drawn") > 0.9
    unmeasured = hb.neuron_attribution(toy(), PROMPTS, "c", top=20, random=20, exact=False)
    assert unmeasured.effects.isnan().all() and torch.isnan(torch.tensor(unmeasured.correlation()))
    assert torch.equal(unmeasured.entries, found.entries)
    top = found.top(1).iloc[0]
    assert abs(top.attribution) == pytest.approx(float(found.attributions.abs().max()))


def test_probability_and_log_probability_rank_alike():
    """dp = p d(log p)."""
    probability, logprob = (hb.neuron_attribution(toy(), PROMPTS, "c", of=of, exact=False) for of in ("probability", "logprob"))
    p = probability.metric[probability.token_rows][:, None, None]
    assert (probability.attributions - p * logprob.attributions).abs().max() < 1e-10


def test_a_plan_is_no_less_than_what_it_costs(case):
    ask: Any = {"answer": "c", "layers": [0], "top": 4, "random": 4}
    plan = hb.neuron_attribution.plan(case.adapter, PROMPTS, **ask)
    spent = hb.neuron_attribution(case.adapter, PROMPTS, **ask).settings["cost"]
    assert all(getattr(plan, name) >= spent[name] for name in ("climbs", "token_layers", "vjps"))


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        ({"answer": "c", "of": "loss"}, DataError, "'loss'"),
        ({"answer": ["c", "d"]}, DataError, "2 for 1"),
        ({"answer": "c", "other": ["d", "e"]}, DataError, "2 for 1"),
        ({"answer": "two words"}, TokenError, "two words"),
        ({"answer": "c", "layers": ["resid_post.0"]}, SiteError, "resid_post.0"),
        ({"answer": "c", "layers": ["mlp_act.0.3"]}, SiteError, "all neurons of a layer"),
        ({"answer": "c", "top": -1}, TokenError, "top"),
        ({"answer": "c", "random": -1}, TokenError, "random"),
        ({"answer": "c", "position": 20}, TokenError, "20"),
    ],
)
def test_bad_input_is_refused_before_work(more, error, match, monkeypatch):
    adapter = toy()
    monkeypatch.setattr(type(adapter), "forward", lambda *args, **kwargs: pytest.fail("something ran"))
    with pytest.raises(error, match=match):
        hb.neuron_attribution(adapter, "ab", **more)
