"""Keys and values of neurons, on every adapter, against plain runs token by token; and a planted memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.errors import DataError, SiteError, TokenError
from hookbook.testing import toy

TEXTS = ["a prompt", "another, longer", "x", "words and words"]


def tokens_of(case) -> list[tuple[int, int]]:
    """Text and position of every token that counts."""
    coded = [case.adapter.encode(text) for text in TEXTS]
    special = case.adapter.tokenizer.all_special_ids
    return [(i, p) for i, tokens in enumerate(coded) for p in range(len(tokens) - 1) if tokens.ids[p] not in special]


def test_triggers_and_agreement_are_those_of_plain_runs(case, monkeypatch):
    found = hb.mlp_memories(case.adapter, TEXTS, layers=[0, 1], neurons=6, triggers=3, k=2, context=4, seed=3)
    coded, places = [case.adapter.encode(text) for text in TEXTS], tokens_of(case)
    assert (found.n_texts, found.n_tokens) == (4, len(places))
    nexts = torch.tensor([coded[i].ids[p + 1] for i, p in places])
    for at, layer in enumerate(found.layers):
        site = hb.Site("mlp_act", layer)
        runs = [case.plain(tokens.ids, (), (site,))[1][site] for tokens in coded]
        acts = torch.stack([runs[i][p] for i, p in places])[:, found.neurons[at]].double()  # [token, s]
        top = acts.topk(3, dim=0).values.T
        assert (found.activations[at] - top).abs().max() < 1e-6
        for n in range(6):
            for t in range(3):
                i, p = int(found.trigger_texts[at, n, t]), int(found.trigger_positions[at, n, t])
                assert abs(float(runs[i][p, found.neurons[at, n]]) - float(top[n, t])) < 1e-6
                assert int(found.next_ids[at, n, t]) == coded[i].ids[p + 1]
                assert found.prefixes[at, n, t].tolist() == [coded[i].ids[q] if q >= 0 else -1 for q in range(p - 3, p + 1)]
        first, words = found.next_ids[at, :, 0], found.value_ids[at, :, 0]
        assert float(found.agreement[at]) == pytest.approx(float((first == words).double().mean()))
        others = [float(words[i] == first[j]) for i in range(6) for j in range(6) if i != j]
        assert float(found.shuffled[at]) == pytest.approx(sum(others) / len(others))
        assert float(found.random[at]) == pytest.approx(sum(float((nexts == word).double().mean()) for word in words) / 6)
        project, _ = case.adapter.writer("mlp_act", layer)
        with torch.no_grad():
            one = torch.nn.functional.one_hot(found.neurons[at], case.adapter.card.d_mlp).to(getattr(torch, case.adapter.card.dtype))
            rows = project(one) - project(0 * one)
            logits = case.adapter.unembed(rows) - case.adapter.unembed(0 * rows)
        assert torch.equal(found.value_ids[at], logits.topk(2).indices)
        assert found.ranks[at].tolist() == [int((line > line[word]).sum()) for line, word in zip(logits, first, strict=True)]
    assert found.activations.abs().max() > 1e-3
    monkeypatch.setattr("hookbook.recipes.neurons.ablation.HELD", 1)  # a text at a time
    again = hb.mlp_memories(case.adapter, TEXTS, layers=[0, 1], neurons=6, triggers=3, k=2, context=4, seed=3)
    assert (again.activations - found.activations).abs().max() < 1e-6 and torch.equal(again.next_ids[..., 0], found.next_ids[..., 0])


def test_a_planted_memory_agrees():
    """A neuron that is high after `q` alone, and whose row is a direction that says `z`, in texts where z follows q."""
    adapter = toy()
    texts = ["abqz", "cqzd", "efgh", "xqzy"]
    site = hb.Site("mlp_in", 1)
    coded = [adapter.encode(text) for text in texts]
    reply = adapter.run(hb.request.Request(coded, [hb.request.Row(i) for i in range(4)], [hb.request.Read(site, slice(1, None))]))
    after_q = torch.tensor([token == adapter.encode("q", bos=False).ids[0] for tokens in coded for token in tokens.ids[1:]])
    states, mlp, block = reply.readings[0].values, adapter.model.blocks[1].mlp, 7
    apart = torch.linalg.pinv(states) @ (2.0 * after_q - 1).to(states.dtype)  # fewer tokens than dimensions
    says_z = torch.linalg.pinv(adapter.model.unembed.weight)[:, adapter.encode("z", bos=False).ids[0]]
    with torch.no_grad():
        names = dict(mlp.named_parameters())
        reads = next(p for name, p in names.items() if p.dim() == 2 and p.shape == (adapter.card.d_mlp, adapter.card.d_model))
        writes = next(p for name, p in names.items() if p.dim() == 2 and p.shape == (adapter.card.d_model, adapter.card.d_mlp))
        reads[block] = 5 * apart
        writes[:, block] = 5 * says_z
    found = hb.mlp_memories(adapter, texts, layers=[1], neurons=[block, 3], triggers=3)
    at = found.neurons[0].tolist().index(block)
    frame: Any = found.triggers(1, block)
    assert all(context.endswith("q") for context in frame.context) and {*frame.next_token} == {"z"}
    assert found.vocab[int(found.value_ids[0, at, 0])] == "z" and int(found.ranks[0, at]) == 0 and float(found.agreement[0]) >= 0.5


def test_frames_and_pictures(plt):
    found = hb.mlp_memories(toy(), TEXTS, neurons=5, triggers=2)
    assert len(found.to_frame()) == 3 * 5 and len(found.layers_frame()) == 3 and len(found.triggers(0, int(found.neurons[0, 0]))) == 2
    ax = found.plot()
    assert [line.get_label() for line in ax.lines] == ["agreement", "through the norms", "other neurons", "any next token"]
    assert ax.lines[2].get_ydata().tolist() == pytest.approx(found.shuffled.tolist())
    with pytest.raises(DataError, match="not looked at"):
        found.triggers(0, 99)


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        ({"texts": []}, TokenError, "no source prompts"),
        ({"texts": ["a"], "layers": ["resid_post.0"]}, SiteError, "neurons are numbers"),
        ({"texts": [[5]]}, TokenError, "nothing comes next"),
        ({"neurons": 0}, TokenError, "neurons"),
        ({"neurons": [32]}, DataError, "0 to 31"),
        ({"neurons": "all"}, DataError, "a number or a list"),
        ({"triggers": 0}, TokenError, "triggers"),
    ],
)
def test_bad_input_is_refused_before_work(more, error, match, monkeypatch):
    adapter = toy()
    monkeypatch.setattr(type(adapter), "run", lambda *args, **kwargs: pytest.fail("it was run"))
    ask: dict[str, Any] = {"texts": TEXTS} | more
    with pytest.raises(error, match=match):
        hb.mlp_memories(adapter, **ask)
