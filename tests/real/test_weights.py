"""What users do to the real models between calls: which model a vector is of, hooks, modes, tokenizers, threads."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pandas as pd
import pytest
import torch
from tokenizers import normalizers

import hookbook as hb
from hookbook.adapters.hf import _told
from hookbook.errors import EditError, ModelError, ResultError, TokenError
from hookbook.request import Read, Readout, Request, Row
from tests.support.real import real, real_hooked

GEMMA, SMOLLM = "gemma-3-270m", "smollm2-135m-instruct"
BACKENDS = ("transformer_lens", "nnsight")


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
    model = real(SMOLLM)
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
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hook_on_the_last_token_is_what_plain_runs_show(backend):
    """Of 12 and 64 rows that share a prompt, as of none."""
    model = real(SMOLLM, backend)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_counts_where_there_is_dropout(backend):
    """SmolLM2 has places for it, all of rate zero."""
    model = real(SMOLLM, backend)
    module: Any = model.module
    place = module.model.layers[3].self_attn
    place = getattr(place, "_original_component", place)
    request = Request([model.encode("The capital of France is")], [Row(0)], readout=Readout(logits=True))
    want = model.run(request).said.logits
    module.train()
    try:
        assert torch.equal(model.run(request).said.logits, want)
        place.attention_dropout = 0.2
        with pytest.raises(ModelError, match=r"3\.self_attn is in training mode.*attention_dropout of 0\.2"):
            model.run(request)
        module.eval()
        assert torch.equal(model.run(request).said.logits, want)
    finally:
        place.attention_dropout = 0.0
        module.eval()


@pytest.mark.parametrize("backend", BACKENDS)
def test_texts_are_cut_by_the_users_tokenizer_or_it_is_said_to_be_gone(backend):
    """A bridge loads a tokenizer that adds no beginning again from its files."""
    model = real(SMOLLM, backend)
    raw: Any = model.model
    kept, mine = raw.tokenizer, copy.deepcopy(model.tokenizer)
    mine.backend_tokenizer.normalizer = normalizers.Lowercase()
    text, cut = "The capital of FRANCE is", tuple(mine("The capital of FRANCE is").input_ids)
    assert cut != model.encode(text).ids
    try:
        raw.tokenizer = mine
        if backend == "nnsight":
            given = hb.wrap(raw)
        else:
            _told.discard(raw)
            with pytest.warns(UserWarning, match="loads such a tokenizer again.*hb.wrap.model, tokenizer"):
                assert hb.wrap(raw).encode(text).ids == model.encode(text).ids
            given = hb.wrap(raw, mine)
        assert given.encode(text).ids == cut
        assert torch.equal(hb.logit_lens(given, text).logprobs, hb.logit_lens(model, list(cut)).logprobs)
    finally:
        if backend == "nnsight":
            raw.tokenizer = kept
        else:
            raw._tokenizer = kept


def test_prompts_are_what_holds_them():
    model = real(SMOLLM)
    texts = ["The capital of France is", "Hello"]
    want = hb.logit_lens(model, texts)
    for given in (model.tokenizer(texts), pd.DataFrame({"prompt": texts})["prompt"]):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(hb.logit_lens(model, given).logprobs, want.logprobs, strict=True))
    with pytest.raises(TokenError, match=r'df\["prompt"\]'):
        hb.logit_lens(model, pd.DataFrame({"prompt": texts}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_in_threads_are_as_if_one_came_after_the_other(backend):
    model = real(SMOLLM, backend)
    texts = ["The capital of France is", "Hello there", "A B C D", "1, 2, 3, 4,"]
    want = [hb.logit_lens(model, text).logprobs for text in texts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: hb.logit_lens(hb.wrap(model.model, model.tokenizer), text).logprobs, texts * 2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, want * 2, strict=True))
