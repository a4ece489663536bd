"""Neurons of the real models, against TransformerLens' own hooks."""

from __future__ import annotations

import pytest
import torch

import hookbook as hb
from hookbook.reproduce import neurons
from tests.support.real import real

PROMPT, WORDS = "The capital of the country that lies south of Belgium is", (" Paris", " Rome", " the")


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_drawn_neurons_do_what_hooks_of_transformerlens_do(name):
    """200 of each model, zeroed at the last token; and the same on nnsight."""
    adapter = real(name)
    card, generator = adapter.card, torch.Generator().manual_seed(0)
    drawn = [
        (int(torch.randint(card.n_layers, (), generator=generator)), int(torch.randint(card.d_mlp, (), generator=generator)))
        for _ in range(200)
    ]
    names = list(dict.fromkeys(f"mlp_act.{layer}.{i}" for layer, i in drawn))
    found = hb.neuron_sweep(adapter, PROMPT, WORDS, layers=names)
    ids = torch.tensor([found.prompts[0].ids])
    words = [adapter.tokenizer.encode(word, add_special_tokens=False)[0] for word in WORDS]
    with torch.no_grad():
        plain = adapter.model(ids)[0, -1, words]
        assert (found.wanted_logits[0] - plain).abs().max() < 1e-4
        for at in range(0, len(names), 50):
            some = range(at, min(at + 50, len(names)))
            hooks = []
            for row, n in enumerate(some):

                def zero(x, hook, row=row, i=int(found.neurons[n])):
                    x[row, -1, i] = 0
                    return x

                hooks.append((hb.Site("mlp_act", int(found.layers[n])).hook_name, zero))
            changed = adapter.model.run_with_hooks(ids.expand(len(some), -1), fwd_hooks=hooks, logits_to_keep=1)[:, -1, words]
            assert (found.changes[0, at : at + len(some)] - (changed - plain)).abs().max() < 1e-4
    other = hb.neuron_sweep(real(name, "nnsight"), PROMPT, WORDS, layers=names)
    assert (other.changes - found.changes).abs().max() < 1e-4 < found.changes.abs().max()


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_a_neuron_is_for_french_and_is_missed_where_it_is_taken_out(name):
    """By the suite's rules: told from four other languages; without it the next word is another one, without others of its layer not."""
    adapter, setup = real(name), neurons.SETUPS[name]
    _, lines = neurons.one(adapter, setup)
    assert [line.holds for line in lines if line.counts] == ["yes", "yes"]
    assert all(line.holds == "no" for line in lines if not line.counts)  # one for other languages, too
    found = hb.neuron(adapter, setup.neuron, neurons.half("language_french", "second"), quantiles=[0.5], random=2, matched=1)
    line = neurons.without_line("second", "zero", found, setup)
    assert line.rule[0][1] and line.rule[1][1] and line.controls["random"] < line.measured / 20
    assert float(found.changed[0]) >= 0.1 > float(found.changed[1:3].max()) and len(found.serves()) > 10
