"""Function vectors and sums of task vectors on real models: the published effects against their controls, and a scan against plain
hooks."""

from __future__ import annotations

import pytest
import torch

import hookbook as hb
from hookbook.asking import encode_questions
from tests.support.real import real


def tasks(*names: str) -> list[hb.Task]:
    return [hb.tasks.load(name) for name in names]


def test_effects_equal_plain_hooks_on_transformers():
    """The whole scan on few prompts, and some heads again on plain transformers, prompt by prompt, the hook on the output projection's
    input."""
    adapter, (task,) = real("smollm2-135m-instruct", "nnsight"), tasks("singular_plural")
    shots, seed = 3, 2
    found = hb.head_effects(adapter, task, shots=shots, n_prompts=6, n_trials=3, known=False, seed=seed)
    train, module = task.split(seed).train, adapter.module
    projections = [layer.self_attn.o_proj for layer in module.model.layers]

    def run(ids, layer=None, head=None, value=None, seen=None):
        def hook(at):
            def pre(m, args):
                x = args[0]
                if seen is not None:
                    seen[at].append(x[0, -1].clone())
                if at == layer:
                    x = x.clone()
                    x[0, -1, head * 64 : (head + 1) * 64] = value
                return (x,)

            return pre

        handles = [projection.register_forward_pre_hook(hook(at)) for at, projection in enumerate(projections)]
        try:
            with torch.no_grad():
                return module(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        finally:
            for handle in handles:
                handle.remove()

    seen: list[list[torch.Tensor]] = [[] for _ in projections]
    for prompt in encode_questions(adapter, train.questions(shots=shots, n=6, seed=seed))[0]:
        run(prompt.ids, seen=seen)
    means = [torch.stack(some).mean(0) for some in seen]
    prompts, answers = encode_questions(adapter, train.questions(shots=shots, n=3, seed=seed + 1, shuffled=True))
    clean = [run(prompt.ids)[answer] for prompt, answer in zip(prompts, answers.tolist(), strict=True)]
    heads = [*found.top(4), (0, 0), (7, 3), (20, 5), (29, 8)]
    for layer, head in heads:
        value = means[layer][head * 64 : (head + 1) * 64]
        effects = [run(p.ids, layer, head, value)[a] - c for p, a, c in zip(prompts, answers.tolist(), clean, strict=True)]
        assert abs(float(found.mean[layer, head]) - float(torch.stack(effects).mean())) < 1e-4
    assert found.mean.abs().max() > 0.01, "there is something to compare"


def test_two_heads_of_gemma_carry_tasks():
    found = hb.head_effects(real("gemma-3-270m"), tasks("country_capital", "singular_plural", "present_past"), n_prompts=16, n_trials=6)
    (first, second, third) = found.top(3)
    assert (first, second) == ((9, 3), (11, 2))
    assert found.mean[first] >= 0.2 and found.mean[second] >= 0.08 and found.mean[third] <= 0.1


def test_ten_heads_of_smollm2_answer_without_examples():
    model, some = real("smollm2-135m-instruct"), tasks("singular_plural", "present_past")
    effects = hb.head_effects(model, some, shots=6, n_prompts=16, n_trials=6)
    assert effects.top(1) == [(20, 5)]
    for task in some:
        found = hb.function_vector(model, task, heads=10, effects=effects, strength=4.0, layers=[12, 14], shots=6, n_prompts=16, queries=30)
        at = found.best_index
        assert found.accuracy[at] >= 0.55 and found.controls["random heads"][at] <= 0.2 and found.controls["random"][at] <= 0.05
        assert found.zero_shot <= 0.1 and found.misled["vector"][at] > found.misled["none"][0]


@pytest.mark.parametrize(
    ("name", "layer", "least"), [pytest.param("gemma-3-270m", 11, 0.35, marks=pytest.mark.whole), ("smollm2-135m-instruct", 21, 0.6)]
)
def test_vectors_of_lists_add_up(name, layer, least):
    found = hb.compose(real(name), hb.tasks.load("capitalize"), layers=[layer], shots=6, n_prompts=24, queries=30)
    assert found.accuracy[0] >= least
    assert all(found.controls[part][0] <= found.accuracy[0] - 0.25 for part in ("first answer", "last copy", "first copy"))
    assert found.controls["random"][0] <= 0.05 and found.zero_shot <= 0.1
