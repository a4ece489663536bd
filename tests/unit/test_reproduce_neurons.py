"""The rules of `hookbook reproduce neurons` on planted results, and the texts it is judged on."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook import prompts, tasks
from hookbook.errors import DataError
from hookbook.reproduce import neurons
from hookbook.reproduce.neurons import CONCEPTS, DRAWS, LANGUAGES, SETUPS, WORDS, half
from tests.makers import result

SETUP = SETUPS["smollm2-135m-instruct"]


def report(**fields: Any) -> hb.NeuronReport:
    """Of one neuron, two random and two matched ones, on two prompts."""
    ask: Any = {"prompts": ["ab", "c"], "random": 2, "matched": 2, "generate": 1}
    found = hb.neuron(hb.testing.toy(), "mlp_act.1.3", ["abc", "d e", "f"], ["a", "b", "c", "d", "e"], **ask)
    return replace(found, **fields)


@pytest.mark.parametrize(
    ("kl", "holds"),
    [
        ((0.3, 0.001, 0.0, 0.01, 0.1), "yes"),
        ((0.05, 0.001, 0.0, 0.01, 0.01), "no"),
        ((0.3, 0.01, 0.0, 0.01, 0.1), "partly"),  # random neurons do something
        ((0.3, 0.001, 0.0, 0.01, 0.2), "partly"),  # one that adds as much does as much
    ],
)
def test_a_neuron_matters_if_others_do_not(kl, holds):
    line = neurons.without_line("first", "zero", report(kl=torch.tensor(kl)[:, None].expand(5, 2)), SETUP)
    assert line.holds == holds and line.counts and line.measured == pytest.approx(kl[0])
    assert line.controls == pytest.approx({"random": max(kl[1:3]), "as large": max(kl[3:])})
    drawn = neurons.without_line("first", "mean", report(kl=torch.tensor(kl)[:, None].expand(5, 2)), SETUP)
    assert drawn.rule[0][1] == (kl[0] >= 10 * max(kl[1:3])) and not drawn.counts


@pytest.mark.parametrize(
    ("slopes", "holds"),
    [((1.0, 0.1, -0.1, 0.5, 0.5), "yes"), ((-1.0, 0.0, 0.0, 0.0, 0.0), "no"), ((1.0, -0.5, 0.1, 0.0, 0.0), "partly")],
)
def test_a_dose_is_followed_if_it_reaches_further_than_random_ones(slopes, holds, monkeypatch):
    monkeypatch.setattr(neurons, "WORDS", ("a", "b", "c", "d", "e"))
    doses = torch.arange(7.0).expand(5, 7).clone()
    changes = (torch.tensor(slopes)[:, None] * doses)[:, :, None, None].expand(5, 7, 2, 6)
    line = neurons.dose_line("first", report(doses=doses, dose_changes=changes))
    assert line.holds == holds and abs(line.measured) == pytest.approx(1)
    assert line.controls["reach"] == pytest.approx(6 * slopes[0]) and line.controls["reach of random"] == pytest.approx(
        6 * max(map(abs, slopes[1:3]))
    )


@pytest.mark.parametrize(
    ("text", "holds"),
    [("le chat est dans la rue", "yes"), ("the cat is in the street", "no"), ("pour pour pour pour pour pour", "partly")],
)
def test_a_word_said_again_and_again_is_no_text(text, holds):
    said = tuple(tuple((text if who == 0 and dose == 2 else "the cat is in",) * 2 for dose in range(3)) for who in range(3))
    line = neurons.generated_line("first", report(texts=said, plain_texts=("the cat is",) * 2))
    assert line.holds == holds and not line.counts and line.controls["16x"] == line.measured == float(holds != "no")


def test_a_flip_counts_where_the_word_is_likeliest():
    made = hb.cumulative_ablation(hb.testing.toy(), ["ab", "cd", "ef", "gh"], "c", ks=[1], random=1)
    ks = torch.tensor(hb.recipes.neurons.cumulative.KS)
    word, other = 3, 5
    plain = torch.tensor([word, word, word, other])
    at = {1: [other, word, word, word]}
    ids = torch.tensor([at.get(int(k), [other, other, word, word]) for k in ks]).T
    random_ids = plain[:, None, None].expand(4, 1, len(ks))
    found = replace(made, ks=ks, answers=("w",) * 4, plain_ids=plain, token_ids=ids, random_ids=random_ids, vocab={3: "w", 5: "v"})
    one, many = neurons.one_job_lines("first", found)
    assert one.measured == pytest.approx(1 / 3) and one.holds == "no"
    assert many.measured == pytest.approx(2 / 3) and many.holds == "yes"
    (unknown,) = neurons.one_job_lines("first", replace(found, plain_ids=torch.tensor([word, word, other, other])))
    assert unknown.holds == "not run" and "only 2 words" in unknown.note


def test_attribution_is_judged_by_its_ranks_and_by_random_ones():
    found: Any = result("NeuronAttribution")
    line = neurons.gradient_line("first", replace(found, effects=found.attributions[found.entries.unbind(1)]), SETUP)
    assert line.holds == "yes" and line.measured == pytest.approx(1)
    assert neurons.gradient_line("first", replace(found, effects=-found.attributions[found.entries.unbind(1)]), SETUP).holds == "no"
    assert neurons.metrics_line("first", found, replace(found, gradients=3 * found.gradients), SETUP).holds == "yes"
    assert neurons.metrics_line("first", found, replace(found, gradients=found.gradients.flip(2)), SETUP).holds == "no"


def test_what_is_attributed_most_is_taken_out_together():
    adapter = hb.testing.toy()
    found = hb.neuron_attribution(adapter, ["ab", "cde"], "f", of="logprob", exact=False)
    line = neurons.joint_line("first", adapter, found, [adapter.encode("f", bos=False).ids[0]] * 2, SETUP)
    falls = []
    word = torch.tensor([[adapter.encode("f", bos=False).ids[0]]])
    for i in range(2):
        tokens = (found.token_rows == i).nonzero()[:, 0].tolist()
        places = [(token, layer, unit) for token in tokens for layer in range(3) for unit in range(32)]
        most = sorted(places, key=lambda at: -float(found.attributions[at]))[:20]
        edits = tuple(hb.Edit(f"mlp_act.{layer}.{unit}", 0.0, "set", int(found.token_positions[token])) for token, layer, unit in most)
        request = hb.request.Request(found.prompts, [hb.request.Row(i, edits)], (), hb.request.Readout(tokens=word))
        falls.append(1 - float(adapter.run(request).said.token_logprobs[0, 0].exp() / found.metric[i].exp()))
    assert line.measured == pytest.approx(sum(falls) / 2, abs=1e-9) and line.controls["random"] < line.measured


def test_texts_are_two_draws_of_matched_pairs():
    english = tasks.contrast(LANGUAGES[0]).negative
    for name in (*LANGUAGES, *CONCEPTS):
        positive, negative = tasks.contrast(name)
        assert len(positive) == len(negative) == 66 == len({*positive}) == len({*negative}) and not {*positive} & {*negative}
        assert negative == english or name in CONCEPTS
        first, second = (half(name, draw) for draw in DRAWS)
        assert len(first) == len(second) == 33 and not {*first} & {*second}
    digits = tasks.contrast("digits")
    assert all(re.search(r"\d", text) for text in digits.positive) and not any(re.search(r"\d", text) for text in digits.negative)
    for source in tasks.contrast("code").positive:
        ast.parse(source)
    jobs = [prompts.one_job(draw) for draw in DRAWS]
    assert [len(some) for some in jobs] == [20, 20] and not {*jobs[0]} & {*jobs[1]}
    assert {word for some in jobs for _, word in some} == {" these", " those", " both", " this", " that", " one"}
    with pytest.raises(DataError, match="first, second"):
        prompts.one_job("third")
    assert len(WORDS) == 5
