"""A report on one neuron, on every adapter: activity, words, effects and doses against naive loops of whole runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import hookbook as hb
from hookbook.errors import DataError, SiteError, TokenError
from hookbook.recipes.neurons.activity import beyond, quantiles
from hookbook.testing import toy
from tests.support.formulas import flat

TEXTS = ["a prompt", "another, longer", "x", "words and words"]
PROMPTS = ["a prompt", "another, longer"]
SITE = hb.Site("mlp_act", 1, 3)


def exact(case) -> float:
    return 1e-9 if case.name == "toy" or "gpt2" in case.name else 1e-6  # the others' norms compute in float32


def acts(case, tokens) -> torch.Tensor:
    """`[pos, neuron]` of the layer."""
    return case.plain(tokens.ids, (), (SITE.whole,))[1][SITE.whole]


def counted(case, tokens) -> list[int]:
    return [i for i, token in enumerate(tokens.ids) if token not in case.adapter.tokenizer.all_special_ids]


def test_effects_and_doses_are_loops_of_plain_runs(case):
    found = hb.neuron(case.adapter, SITE, TEXTS, ["c"], prompts=PROMPTS, random=2, matched=2, quantiles=[0.1, 0.9], seed=1)
    assert found.kinds == ("neuron", "random", "random", "matched", "matched") and len({*found.neurons.tolist()}) == 5
    assert found.names[0] == "mlp_act.1.3" and (found.values == 0).all()
    word = case.adapter.tokenizer.convert_tokens_to_ids("c"), int(found.promoted_ids[1, 0, 0])
    for p, prompt in enumerate(found.prompts):
        where = counted(case, prompt)
        assert found.positions[p] == tuple(where)
        plain = case.plain(prompt.ids, ())[0][-1].log_softmax(-1)
        assert int(found.plain_ids[p]) == int(plain.argmax())
        assert (found.plain_logprobs[p] - plain[[*word]]).abs().max() < exact(case)
        for c, neuron in enumerate(found.neurons.tolist()):
            said = [(0.0, found.kl[c, p], found.token_ids[c, p], found.changes[c, p])]
            said += zip(found.doses[c].tolist(), found.dose_kl[c, :, p], found.dose_ids[c, :, p], found.dose_changes[c, :, p], strict=True)
            for value, kl, top, changes in said:
                edit = hb.Edit(hb.Site("mlp_act", 1, neuron), value, "set", where)
                out = case.plain(prompt.ids, flat([edit], prompt))[0][-1].log_softmax(-1)
                assert abs(float(kl - (plain.exp() * (plain - out)).sum())) < exact(case) and int(top) == int(out.argmax())
                assert (changes - (out - plain)[[*word]]).abs().max() < exact(case)
                if c == 0 and value == 0:
                    falls = (plain.exp() - out.exp()).topk(5)
                    assert torch.equal(found.served_ids[p], falls.indices)
                    assert (found.served_effects[p] - falls.values).abs().max() < exact(case)
    assert found.kl.max() > 1e-6


def test_activity_is_that_of_plain_runs(case):
    found = hb.neuron(case.adapter, SITE, TEXTS, quantiles=[0, 0.25, 1], k=2, context=2, random=1, matched=1)
    coded = [case.adapter.encode(text) for text in TEXTS]
    runs = [acts(case, tokens)[counted(case, tokens)] for tokens in coded]
    every = torch.cat(runs)
    assert (found.n_texts, found.n_tokens) == (4, len(every))
    want = np.quantile(every[:, found.neurons].double().numpy(), [0, 0.25, 1], axis=0).T
    assert np.abs(found.quantiles.numpy() - want).max() < 1e-6
    assert found.beyond.tolist() == [1, math.floor(0.25 * (len(every) - 1)) + 1, 1]
    for sign, half in ((1, slice(0, 2)), (-1, slice(2, 4))):
        peaks = sorted(((sign * run[:, 3]).max().item() for run in runs), reverse=True)[:2]
        assert np.abs(sign * found.activations[half].numpy() - peaks).max() < 1e-6
    for at in range(4):
        text, place = int(found.example_texts[at]), int(found.example_positions[at])
        assert abs(float(acts(case, coded[text])[place, 3] - found.activations[at])) < 1e-6
        assert float(found.context_activations[at, 2]) == float(found.activations[at]) and found.contexts[at, 2] == coded[text].ids[place]
        for step in range(-2, 3):
            inside = 0 <= place + step < len(coded[text])
            assert int(found.contexts[at, 2 + step]) == (coded[text].ids[place + step] if inside else -1)
    # texts of which nothing was said are open: their first halves
    assert [p.ids for p in found.prompts] == [tokens.ids[: len(tokens) // 2 + 1] for tokens in coded]


def test_words_are_by_the_row_of_the_output_projection(case):
    """Against the stream's own change when the neuron alone moves by a little, which knows all norms."""
    found = hb.neuron(case.adapter, SITE, TEXTS, k=3, random=1, matched=0)
    prompt = case.adapter.encode(TEXTS[1])
    out = hb.Site("mlp_out", 1)
    value = float(acts(case, prompt)[-1, 3])

    def written(to: float) -> torch.Tensor:
        return case.plain(prompt.ids, flat([hb.Edit(SITE, to, "set")], prompt), (out,))[1][out][-1].double()

    adapter = case.adapter
    with torch.no_grad():
        if adapter.writer("mlp_act", 1)[1] is None:
            row = (written(value + 1) - written(value)).to(getattr(torch, adapter.card.dtype))
            for at, state in enumerate((row, adapter.final_norm(row[None])[0] - adapter.final_norm(torch.zeros_like(row[None]))[0])):
                logits = adapter.unembed(state[None])[0] - adapter.unembed(torch.zeros_like(state[None]))[0]
                assert (found.promoted_logits[at, 0] - logits.topk(3).values).abs().max() < 1e-4
                assert (found.promoted_logits[at, 1] - logits.topk(3, largest=False).values).abs().max() < 1e-4
        else:  # alone in the MLP, it is all that the norm sees: what is written is its row through the norm
            project, norm = adapter.writer("mlp_act", 1)
            one = torch.zeros(1, adapter.card.d_mlp, dtype=getattr(torch, adapter.card.dtype))
            one[0, 3] = 1
            assert norm is not None
            state = norm(1000 * project(one))  # far above the norm's epsilon
            state = adapter.final_norm(1000 * state)
            logits = adapter.unembed(state)[0]
            assert (found.promoted_logits[1, 0] - logits.topk(3).values).abs().max() < 1e-2 * logits.abs().max()
            assert set(found.promoted_ids[1, 0].tolist()) <= set(logits.topk(6).indices.tolist())


def test_matched_neurons_add_as_much(case):
    """Of all neurons the ones whose mean contribution is nearest by its ratio, from the rows and plain runs."""
    found = hb.neuron(case.adapter, SITE, TEXTS, prompts=PROMPTS, random=1, matched=3)
    project, norm = case.adapter.writer("mlp_act", 1)
    with torch.no_grad():
        eye = torch.eye(case.adapter.card.d_mlp, dtype=getattr(torch, case.adapter.card.dtype))
        rows = (project(eye) - project(eye[:1] * 0)).double()
        if norm is not None:
            scale = norm(1000 * rows.to(eye.dtype)).double() * rows.pow(2).mean(-1, keepdim=True).sqrt()
            rows = scale
    coded = [case.adapter.encode(text) for text in PROMPTS]
    mean = torch.cat([acts(case, tokens)[counted(case, tokens)] for tokens in coded]).double().abs().mean(0)
    sizes = mean * rows.norm(dim=-1)
    assert (found.contributions - sizes[found.neurons]).abs().max() < 1e-3 * sizes.max()
    far = (sizes / sizes[3]).log().abs()
    far[[3, *(i for i, kind in zip(found.neurons.tolist(), found.kinds, strict=True) if kind == "random")]] = math.inf
    assert found.neurons[2:].tolist() == far.argsort()[:3].tolist()


def test_generation_is_that_of_edited_runs(case):
    found = hb.neuron(case.adapter, SITE, TEXTS, prompts=PROMPTS, doses=[-3.0, 4.0], generate=3, random=1, matched=0)
    assert len(found.texts) == 2 and [len(each) for each in found.texts] == [2, 2]
    for who, neuron in enumerate(found.neurons.tolist()):
        for dose, value in enumerate((-3.0, 4.0)):
            for p, prompt in enumerate(found.prompts):
                ids = list(prompt.ids)
                for _ in range(3):
                    where = [i for i in range(len(ids)) if i >= len(prompt) or i in found.positions[p]]
                    edit = hb.Edit(hb.Site("mlp_act", 1, neuron), value, "set", where)
                    tokens = hb.tokens.Tokens("", tuple(ids), tuple(map(str, ids)))
                    out = case.plain(tuple(ids), flat([edit], tokens))[0][-1]
                    if int(out.argmax()) in case.adapter.eos_ids:
                        break
                    ids.append(int(out.argmax()))
                assert found.texts[who][dose][p] == case.adapter.tokenizer.decode(ids[len(prompt) :])
    assert found.doses.tolist() == [[-3.0, 4.0]] * 2


def test_quantiles_say_on_how_many_tokens_they_rest():
    values = torch.randn(101, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = (0.0, 0.001, 0.333, 0.5, 0.999, 1.0)
    assert np.abs(quantiles(values, levels).numpy() - np.quantile(values.numpy(), levels, axis=0).T).max() < 1e-12
    for level, n in zip(levels, beyond(levels, 101), strict=True):
        value = float(quantiles(values, [level])[0, 0])
        rarer = min(int((values[:, 0] <= value + 1e-12).sum()), int((values[:, 0] >= value - 1e-12).sum()))
        assert n - 1 <= rarer <= n
    assert beyond((0.001, 0.5, 0.999), 1001) == [2, 501, 2]


def test_a_dose_that_raises_a_word_is_monotone():
    """In the last block a neuron writes straight at the words."""
    adapter = toy()
    found = hb.neuron(adapter, "mlp_act.2.5", TEXTS, quantiles=[0.1, 0.3, 0.5, 0.7, 0.9], matched=0)
    assert float(found.monotonicity()[0]) > 0.99  # of what it promotes through the norms
    assert found.wanted[-1] == found.vocab[int(found.promoted_ids[1, 0, 0])]
    constant = hb.neuron(adapter, "mlp_act.2.5", TEXTS, doses=[1.0, 1.0], matched=0)
    assert math.isnan(float(constant.monotonicity()[0]))


def test_frames_and_pictures(plt, tmp_path):
    found = hb.neuron(toy(), SITE, TEXTS, ["c"], prompts=PROMPTS, generate=2, random=2, matched=1)
    frame = found.to_frame()
    assert len(frame) == 4 * 2 and list(frame.control.unique()) == ["neuron", "random", "matched"]
    assert frame["change c"].iloc[0] == pytest.approx(float(found.changes[0, 0, 0]))
    dose: Any = found.dose()
    assert len(dose) == 4 * 7 and dose.dose.iloc[8] == pytest.approx(float(found.doses[1, 1]))
    assert dose.kl.iloc[8] == pytest.approx(float(found.dose_kl[1, 1].mean()))
    assert len(found.activity()) == 4 * 7 and len(found.promotes()) == 4 * found.promoted_ids.shape[2]
    serves: Any = found.serves()
    assert serves.effect.is_monotonic_decreasing and serves.effect.sum() == pytest.approx(float(found.served_effects.clamp(min=0).sum()))
    context: Any = found.examples().context
    assert "«" in context.iloc[0] and len(context) == len(found.activations)
    ax = found.plot(token="c")
    assert [line.get_label() for line in ax.lines] == ["1.3", "random", "matched"]
    assert ax.lines[0].get_ydata()[0] == pytest.approx(float(found.dose_changes[0, 0, :, 0].mean()))
    page = found.report(tmp_path / "neuron.html").read_text(encoding="utf-8")
    assert all(word in page for word in ("What it serves", "What is generated", "Quantiles", "What it promotes"))
    with pytest.raises(TokenError, match="nobody asked"):
        found.plot(token="d")


def test_doses_that_are_given_are_drawn_as_such(plt, tmp_path):
    found = hb.neuron(toy(), SITE, TEXTS, doses=[-40, 0, 80], random=0, matched=0)
    again = hb.NeuronReport.load(found.save(tmp_path / "found.safetensors"))
    for one in (found, again):
        ax = one.plot()
        assert ax.get_xlabel() == "set to" and [tick.get_text() for tick in ax.get_xticklabels()] == ["-40", "0", "80"]
    assert "quantile" in hb.neuron(toy(), SITE, TEXTS, random=0, matched=0).plot().get_xlabel()


def test_words_of_one_spelling_stay_apart(case):
    """Two ids that are decoded alike have a column each; and what serves one is not counted to the other."""
    vocab = case.adapter.card.d_vocab
    texts: dict[str, list[int]] = {}
    for i in range(vocab):
        texts.setdefault(case.adapter.tokenizer.decode([i]), []).append(i)
    same = next(ids for ids in texts.values() if len(ids) > 1)[:2]
    found = hb.neuron(case.adapter, SITE, TEXTS, same, random=1, matched=0)
    assert len({*found.wanted}) == 3 and all(str(i) in name for i, name in zip(same, found.wanted, strict=False))
    frame: Any = found.to_frame()
    for at, name in enumerate(found.wanted[:2]):
        assert frame[f"change {name}"].iloc[0] == pytest.approx(float(found.changes[0, 0, at]))
    serves: Any = found.serves()
    assert serves.n.sum() == int((found.served_effects > 0).sum()) and serves.n.max() <= len(TEXTS)


def test_half_precision_is_kept_as_float32():
    adapter = toy()
    adapter.model.to(torch.bfloat16)
    found = hb.neuron(adapter, SITE, TEXTS, random=1, matched=1)
    assert {found.quantiles.dtype, found.activations.dtype, found.context_activations.dtype, found.doses.dtype} == {torch.float32}


@pytest.mark.parametrize(
    ("more", "error", "match"),
    [
        ({"site": "mlp_act.1"}, SiteError, "on one neuron"),
        ({"site": "resid_post.1"}, SiteError, "neurons are numbers"),
        ({"site": "mlp_act.1.999"}, SiteError, "999"),
        ({"texts": []}, TokenError, "no source prompts"),
        ({"quantiles": [1.5]}, DataError, "a share"),
        ({"doses": [math.nan]}, DataError, "finite"),
        ({"doses": []}, DataError, "finite"),
        ({"doses": 5}, DataError, "a list of numbers"),
        ({"doses": [None]}, DataError, "a list of numbers"),
        ({"quantiles": 0.5}, DataError, "a list of numbers"),
        ({"random": -1}, TokenError, "random"),
        ({"random": 40}, DataError, "ask for fewer"),
        ({"ablate": "mean"}, DataError, "without reference"),
        ({"tokens": "c"}, TokenError, "a list"),
        ({"texts": [[1]], "prompts": ["a"]}, TokenError, "special tokens alone"),
    ],
)
def test_what_cannot_be_asked_is_refused(more, error, match, monkeypatch):
    adapter = toy()
    monkeypatch.setattr(type(adapter), "run", lambda *args, **kwargs: pytest.fail("it was run"))
    ask: dict[str, Any] = {"site": SITE, "texts": TEXTS} | more
    with pytest.raises(error, match=match):
        hb.neuron(adapter, **ask)
