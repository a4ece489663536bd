"""Linear relations of real models beside their controls, edits along them, and the map itself against autograd on plain transformers."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import hookbook as hb
from tests.support.real import real

LESSER = ("logit lens", "bias", "least squares", "random")


@cache
def comparatives() -> hb.LinearRelation:
    return hb.linear_relation(real("gemma-3-270m"), hb.relations.load("adjective_comparative"), layers=[8, 12])


def test_the_map_says_comparatives_below_layer_12():
    found = comparatives()
    assert found.faithfulness[0] >= 0.75 and found.faithfulness[1] <= 0.1 and found.best_index == 0
    assert all(found.controls[name][0] <= 0.15 for name in LESSER)
    assert int(found.test_known.sum()) >= 15


def test_edits_along_the_map_change_the_answer():
    found = hb.edit_relation(real("gemma-3-270m"), comparatives(), layers=8, ranks=[150, 640], changes=35, n_unrelated=1)
    assert found.success[0, 0] >= 0.6 and found.success[0, 1] <= 0.15 and found.random[0].max() <= 0.05
    assert found.best == (hb.Site("resid_post", 8), 150)


@pytest.mark.whole
def test_a_verb_map_is_no_least_squares():
    found = hb.linear_relation(real("smollm2-135m-instruct"), hb.relations.load("present_past"), layers=[9])
    assert found.faithfulness[0] >= 0.7 and all(found.controls[name][0] <= 0.15 for name in LESSER)


def test_the_map_is_autograd_on_plain_transformers():
    """Of one prompt: all later blocks again from the subject's state, in transformers alone."""
    adapter = real("smollm2-135m-instruct", "nnsight")
    found = hb.linear_relation(adapter, hb.relations.load("present_past"), layers=[21], n_train=1, queries=12)
    asked = found.ask(found.train[0][0])
    prompt = adapter.encode(asked.text)
    place, module = asked.subject_at(prompt), adapter.module
    blocks, tokens = module.model.layers, torch.tensor([prompt.ids])

    def output(state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The subject's state, and what the last block gives at the last token."""
        seen: list[torch.Tensor] = []

        def put(block, args, out):
            seen.append(out[0, place])
            if state is None:
                return out
            where = torch.arange(out.shape[1])[:, None] == place
            return torch.where(where, state, out)

        hooks = [blocks[21].register_forward_hook(put), blocks[-1].register_forward_hook(lambda block, args, out: seen.append(out[0, -1]))]
        try:
            module.model(tokens, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return seen[0], seen[1]

    with torch.no_grad():
        state, said = output(None)
    want = torch.autograd.functional.jacobian(lambda s: output(s)[1], state, vectorize=True)
    assert (found.weight[0] - want).norm() <= 1e-3 * want.norm()
    assert (found.bias[0] - (said - want @ state)).norm() <= 1e-3 * said.norm()
    assert (found.weight[0] @ state + found.bias[0] - said).norm() <= 1e-3 * said.norm()
