"""Knowledge neurons, on every adapter: the authors' sum by plain autograd, completeness, selection and every set by plain runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.errors import DataError, SiteError, TokenError
from hookbook.recipes.neurons.knowledge import SETS, _refined
from hookbook.testing import toy
from tests.support.formulas import flat

RELATION = hb.relations.Relation(
    (("a", "x"), ("be", "y"), ("cd", "z"), ("d", "w")), name="letters", templates=("the {} is", "of {}:", "one {} and"), answer="{}"
)


def exact(case) -> float:
    return 1e-9 if case.name == "toy" or "gpt2" in case.name else 1e-5  # the others' norms compute in float32


def integrated(case, prompt, site, word, steps) -> tuple[torch.Tensor, float]:
    """Slopes by autograd of whole plain runs, one for each step, and the probability's rise."""
    ids, last = prompt.ids, len(prompt) - 1
    acts = case.plain(ids, (), (site,))[1][site][last].detach()
    slopes, ends = torch.zeros_like(acts), []
    for step in range(steps + 1):
        leaf = (acts * (step / steps)).clone().requires_grad_()
        logits = case.plain(ids, flat([hb.Edit(site, leaf, "set", last)], prompt), grad=True)[0]
        p = logits[-1].softmax(-1)[word]
        (slope,) = torch.autograd.grad(p, leaf)
        slopes += slope * (0.5 if step in (0, steps) else 1) / steps
        ends.append(float(p.detach()))
    return acts * slopes, ends[-1] - ends[0]


def test_attributions_are_the_sum_and_sets_are_plain_runs(case):
    found = hb.knowledge_neurons(case.adapter, RELATION, facts=["a", "be"], steps=4, threshold=0.5, share=0.6, wanted=(1, 3))
    assert found.prompts[1].text.endswith("of a:") and len(found.prompts) == 6 and found.sets == SETS
    words = [case.adapter.tokenizer.convert_tokens_to_ids(answer) for answer in ("x", "y") for _ in range(3)]
    scores = []
    for i, prompt in enumerate(found.prompts):
        plain = case.plain(prompt.ids, ())[0][-1].softmax(-1)
        assert abs(float(found.probabilities[i] - plain[words[i]])) < exact(case) and int(found.token_ids[i]) == int(plain.argmax())
        layers = []
        for at, layer in enumerate(found.layers):
            want, rise = integrated(case, prompt, hb.Site("mlp_act", layer), words[i], 4)
            assert abs(float(found.sums[i, at]) - float(want.sum())) < exact(case) and abs(float(found.ends[i, at]) - rise) < exact(case)
            layers.append(want.detach())
        scores.append(torch.stack(layers))
    neurons, share = _refined(torch.stack(scores), 3, 0.5, 0.6, (1, 3))
    assert share == found.share
    listed = [(fact, found.layers[place], unit) for fact, some in enumerate(neurons) for place, unit in some]
    assert found.neurons.tolist() == [list(one) for one in listed] and len(listed)
    means = torch.stack(scores).unflatten(0, (2, 3)).mean(1)
    for score, (fact, layer, unit) in zip(found.scores.tolist(), listed, strict=True):
        assert abs(score - float(means[fact, found.layers.index(layer), unit])) < exact(case)
    own = {fact: [(layer, unit) for f, layer, unit in listed if f == fact] for fact in (0, 1)}
    for i, prompt in enumerate(found.prompts):
        acts = {layer: case.plain(prompt.ids, (), (hb.Site("mlp_act", layer),))[1][hb.Site("mlp_act", layer)][-1] for layer in found.layers}
        for at, some in ((0, own[i // 3]), (1, own[1 - i // 3])):
            for j, factor in enumerate(found.factors):
                edits = [hb.Edit(hb.Site("mlp_act", layer, unit), float(factor * acts[layer][unit]), "set") for layer, unit in some]
                if factor and len({layer for layer, _ in some}) > 1:
                    continue  # twice what a later neuron is then, not what it was
                out = case.plain(prompt.ids, flat(edits, prompt))[0][-1].softmax(-1)
                assert abs(float(found.changed[at, j, i] - out[words[i]])) < exact(case)
                assert int(found.changed_ids[at, j, i]) == int(out.argmax())


def test_the_trapezoid_is_complete():
    """With more steps the sum comes to the rise."""
    errors = [float(hb.knowledge_neurons(toy(), RELATION, facts=2, steps=steps).completeness.median()) for steps in (2, 8, 32)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2] and errors[2] < 1e-4


@pytest.mark.parametrize(
    ("share", "wanted", "want"),
    [
        (0.7, (1, 1), [[(0, 1)], [(1, 0)]]),
        (0.7, (2, 2), [[(0, 1), (0, 0)], [(1, 0), (1, 1)]]),
        (0.34, (0, 9), [[(0, 1), (0, 0)], [(1, 0), (1, 1)]]),
    ],
)
def test_the_share_moves_until_the_number_is_wanted(share, wanted, want):
    scores = torch.zeros(6, 2, 2)
    scores[:3, 0, 1] = 1.0  # in all prompts of the first fact
    scores[:2, 0, 0] = 0.5  # in two of three
    scores[3:, 1, 0] = 2.0
    scores[3:5, 1, 1] = 0.5
    scores[0, 1, 1] = 0.1  # below the threshold
    found, moved = _refined(scores, 3, 0.2, share, wanted)
    assert found == want and (moved > 2 / 3) == (wanted == (1, 1))


def test_controls_are_as_many_of_the_same_layers():
    found: Any = hb.knowledge_neurons(toy(), RELATION, facts=4, steps=4, threshold=0.3)
    plain = hb.knowledge_neurons(toy(), RELATION, facts=4, steps=4, threshold=0.3, seed=1)
    assert found.changed.shape == (5, 2, 12) and (found.changed >= 0).all()
    assert torch.equal(found.effects, (found.changed / found.probabilities - 1).view(5, 2, 4, 3).mean(3))
    assert {*plain.subjects} == {*found.subjects}
    summary = found.summary()
    assert summary.effect.iloc[0] == pytest.approx(-float(found.effects[0, 0].mean())) and list(summary.control.unique()) == list(SETS)
    of: Any = found.of(found.subjects[0])
    assert of.attribution.is_monotonic_decreasing and len(of) == int((found.neurons[:, 0] == 0).sum())
    assert len(found.to_frame()) == 5 * 2 * 12


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        ({"facts": 5}, DataError, "has 4"),
        ({"facts": 1}, TokenError, "facts"),
        ({"facts": ["a", "nobody"]}, DataError, "nobody"),
        ({"facts": ["a"]}, DataError, "two different"),
        ({"threshold": 0}, DataError, "above 0"),
        ({"share": 1.5}, DataError, "at most 1"),
        ({"steps": 0}, TokenError, "steps"),
        ({"layers": "resid_post.0"}, SiteError, "neurons are numbers"),
    ],
)
def test_bad_input_is_refused_before_work(more, error, match, monkeypatch):
    adapter = toy()
    monkeypatch.setattr(type(adapter), "run", lambda *args, **kwargs: pytest.fail("it was run"))
    with pytest.raises(error, match=match):
        hb.knowledge_neurons(adapter, RELATION, **more)
