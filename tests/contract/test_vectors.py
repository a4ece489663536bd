"""Task vectors on every adapter, against a loop; and vectors handed back to the user's own tools."""

from __future__ import annotations

import pytest
import torch

import hookbook as hb
from hookbook.request import Readout, Request, Row
from hookbook.tasks import Task, Template

PAIRS = tuple((letter, letter.upper()) for letter in "abcdefghijklmnopqrst")
TASK = Task(PAIRS, "letters", Template("{}>", "{}", ";"))


@pytest.mark.parametrize("mode", ["replace", "difference"])
def test_task_vectors_are_what_a_loop_finds(case, mode):
    adapter, n_layers = case.adapter, case.adapter.card.n_layers
    found = hb.task_vector(adapter, TASK, mode=mode, shots=2, n_prompts=4, queries=3, seed=5)
    parts, sites = TASK.split(5), [hb.Site("resid_post", layer) for layer in range(n_layers)]

    def mean(questions):
        states = []
        for question in questions:
            _, read = case.plain(adapter.encode(question.text).ids, (), tuple(sites))
            states.append(torch.stack([read[site][-1] for site in sites]))
        return torch.stack(states).mean(0)

    def accuracy(vectors, questions, layer):
        right = 0
        for question in questions:
            tokens = adapter.encode(question.text)
            answer = adapter.encode(question.text + question.answer).ids[len(tokens)]
            edit = hb.Edit(sites[layer], vectors[layer], "set" if mode == "replace" else "add")
            logits, _ = case.plain(tokens.ids, ((sites[layer], len(tokens) - 1, edit, []),))
            right += int(logits[-1].argmax()) == answer
        return right / len(questions)

    vectors = mean(parts.train.questions(shots=2, n=4, seed=5))
    wrong = mean(parts.train.questions(shots=2, n=4, seed=5, shuffled=True))
    if mode == "difference":
        without = mean(parts.train.questions(n=4, seed=5))
        vectors, wrong = vectors - without, wrong - without
    assert (found.values.double() - vectors).abs().max() < 1e-5 * vectors.abs().max()
    for name, part, values in (
        ("validation", parts.validation, vectors),
        ("accuracy", parts.test, vectors),
        ("shuffled labels", parts.test, wrong),
    ):
        ours = found.controls[name] if name in found.controls else getattr(found, name)
        assert ours.tolist() == [accuracy(values, part.questions(n=3, seed=5), layer) for layer in range(n_layers)], name
    assert torch.allclose(found.best.values, found.values[int(found.validation.argmax())])
    assert len(found.to_frame()) == n_layers and found.plot() is not None


def theirs(said: str, answer: str, match: str) -> bool:
    """How the code of Hendel et al. compares a predicted token with an answer."""
    said, answer = said.split("\n")[0].strip(), answer.strip()
    if match == "exact":
        return said == answer
    return len(said) > 0 and (said.startswith(answer) or answer.startswith(said))


@pytest.mark.parametrize("match", ["exact", "prefix"])
def test_answers_are_matched_as_texts(case, match):
    """Answers are what the model says, what begins with it, what it begins, and something else."""
    adapter, pairs = case.adapter, []
    for at, letter in enumerate("abcdefghijklmnopqrstuvwxyz"):
        said = adapter.tokenizer.decode([int(case.plain(adapter.encode(f"{letter}>").ids)[0][-1].argmax())])
        said = said if said.strip() and said.isprintable() and "\ufffd" not in said else "?"
        pairs.append((letter, (said, said + "x", said[0], "~")[at % 4]))
    task = Task(tuple(pairs), "said", Template("{}>", "{}", ";"))
    found = hb.task_vector(adapter, task, layers=[0], shots=2, n_prompts=2, queries=6, match=match)
    asked = task.split(0).test.questions(n=6)
    right = []
    for question in asked:
        logits, _ = case.plain(adapter.encode(question.text).ids)
        right.append(theirs(adapter.tokenizer.decode([int(logits[-1].argmax())], skip_special_tokens=True), question.answer, match))
    assert float(found.zero_shot) == pytest.approx(sum(right) / 6) and found.settings["match"] == match


def test_a_vector_goes_through_a_file_back_into_hooks_and_traces(case, tmp_path):
    adapter = case.adapter
    made = hb.Vector.of(adapter.model if case.name != "toy" else adapter, "resid_post.1", torch.linspace(-2, 2, adapter.card.d_model))
    vector = hb.Vector.load(made.save(tmp_path / "v.safetensors"))
    tokens = adapter.encode("abcd")
    want = adapter.run(Request([tokens], [Row(0, (vector.edit("add", 1.5),))], (), Readout(logits=True))).readout.logits
    ids = torch.tensor([tokens.ids])
    if case.name.startswith(("bridge", "hooked")):
        more = {"prepend_bos": False} if case.name.startswith("hooked") else {}
        logits = adapter.model.run_with_hooks(ids, fwd_hooks=vector.fwd_hooks(strength=1.5), **more)
    elif case.name.startswith("nnsight"):
        with adapter.model.trace(ids):
            vector.apply(adapter.model, strength=1.5)
            logits = adapter.model.output.logits.save()
    else:
        with pytest.raises(hb.errors.EditError, match="only the stream's sites"):
            hb.Vector.of(adapter, "mlp_out.1", torch.ones(16)).apply(None)
        return
    assert (logits[0, -1] - want[0]).abs().max() < 1e-4


def test_a_vector_steers_what_is_given_the_model_of_a_bridge(case):
    """Harnesses take Hugging Face models, such as lm-eval's `HFLM(pretrained=bridge.original_model)`."""
    if not case.name.startswith("bridge"):
        return
    adapter, vector = case.adapter, hb.Vector.of(case.adapter, "resid_post.1", torch.linspace(-2, 2, case.adapter.card.d_model))
    tokens = adapter.encode("abcd")
    want = adapter.run(Request([tokens], [Row(0, (vector.edit(position=slice(None)),))], (), Readout(logits=True))).readout.logits
    model, ids = adapter.model.original_model, torch.tensor([tokens.ids])
    with torch.no_grad():
        before = model(ids).logits
        with adapter.model.hooks(fwd_hooks=vector.fwd_hooks(position=slice(None))):
            steered = model(ids).logits
        assert torch.equal(model(ids).logits, before)
    assert (steered[0, -1] - want[0]).abs().max() < 1e-10 and (steered - before).abs().max() > 0.1
