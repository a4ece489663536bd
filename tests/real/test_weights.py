"""Which model a vector is of, and what a hook does to the real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.errors import EditError, ResultError
from hookbook.request import Read, Readout, Request, Row
from tests.support.real import real, real_hooked

GEMMA = "gemma-3-270m"


@pytest.mark.hooked
def test_gemma_is_one_model_on_three_backends():
    models = [real(GEMMA), real(GEMMA, "nnsight"), real_hooked()]
    assert len({model.card.weights[0] for model in models}) == 1 and len({model.card.model_id for model in models}) > 1
    vectors = [
        hb.contrast_vector(model, ["I love it", "So good"], ["I hate it", "So bad"], layers=[9], held_out=0).vector(9) for model in models
    ]
    for model in models:
        for vector in vectors:
            assert vector.cosine(vectors[0]) > 0.999
            model.run(Request([model.encode("The film")], [Row(0, (vector.edit(),))], readout=Readout(logits=True)))


def test_a_small_edit_makes_another_model_until_it_is_undone(tmp_path):
    """What rank-one editing does to one matrix, at a thousandth; a checkpoint of before is refused, and so is a vector."""
    model = real("smollm2-135m-instruct")
    vector = hb.Vector.of(model, "resid_post.9", torch.ones(576))
    request = Request([model.encode("The capital of France is")], [Row(0, (vector.edit(),))], [Read("resid_post.20")])
    want = model.run(request, checkpoint=tmp_path).readings[0].values
    weight: Any = model.model.original_model.model.layers[5].mlp.down_proj.weight  # type: ignore[union-attr]
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight += 1e-3 * weight.std() * torch.outer(torch.randn(576), torch.randn(weight.shape[1])) / 24
        with pytest.raises(EditError, match="other weights"):
            model.run(request)
        plain = Request(request.prompts, [Row(0)], request.reads)
        assert (model.run(plain).readings[0].values - want).abs().max() > 0
        with pytest.raises(ResultError, match="other weights"):
            model.run(Request(request.prompts, [Row(0, (vector.on(model).edit(),))], request.reads), checkpoint=tmp_path)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert torch.equal(model.run(request, checkpoint=tmp_path).readings[0].values, want)


@pytest.mark.filterwarnings("ignore:.*is a hook on")
@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_a_hook_on_the_last_token_is_what_plain_runs_show(backend):
    """Of 12 and 64 rows that share a prompt, as of none."""
    model = real("smollm2-135m-instruct", backend)
    module: Any = model.module
    tokens = model.encode("The Eiffel Tower is in the city of")
    by = torch.randn(576, generator=torch.Generator().manual_seed(0))

    def last(block: Any, args: Any, out: Any) -> Any:
        x = (out[0] if isinstance(out, tuple) else out).clone()
        x[:, -1] += by
        return (x, *out[1:]) if isinstance(out, tuple) else x

    vector = torch.randn(576, generator=torch.Generator().manual_seed(1))
    for n in (12, 64):
        rows = [Row(0, (hb.Edit(f"resid_pre.{12 + i % 16}", (1 + i / n) * vector, position=-2),)) for i in range(n)] + [Row(0)]
        request = Request([tokens], rows, readout=Readout(logits=True))
        free = model.run(request).said.logits
        handle = module.model.layers[10].register_forward_hook(last)
        try:
            logits = model.run(request).said.logits
            plain = model.plain_logits(torch.tensor([tokens.ids]))[0, -1]
        finally:
            handle.remove()
        assert (logits[-1] - plain).abs().max() < 1e-3 < 1 < (free[-1] - plain).abs().max()
        assert (logits[:-1] - logits[-1]).abs().amax(-1).min() > 0.01  # each row's edit acts, too
        assert torch.equal(model.run(request).said.logits, free)
