"""The two real models: every backend gives plain transformers' numbers, and so each other's."""

from __future__ import annotations

import itertools

import pytest
import torch

import hookbook as hb
from hookbook.models import packages
from hookbook.models.doctor import check
from hookbook.request import Read, Readout, Request, Row
from tests.support.needs import HOOKED, require
from tests.support.real import real, real_hooked

MODELS = ("gemma-3-270m", "smollm2-135m-instruct")
TEXTS = ("The Eiffel Tower is located in the city of", "cat -> cat\n1135 -> 1135\nhello -> hello\n?", "Hi")


def adapters(name: str) -> list[hb.Adapter]:
    found = [real(name), real(name, "nnsight")]
    return [*found, real_hooked()] if HOOKED and name == MODELS[0] else found  # HookedTransformer has no SmolLM2


@pytest.mark.parametrize("name", [pytest.param(MODELS[0], marks=pytest.mark.whole), *MODELS[1:]])
def test_doctor_finds_every_adapter_equal_to_plain_transformers(name):
    from hookbook.models.packages import PACKAGES

    require(PACKAGES[name].module)
    findings = list(check(name))
    judged = [finding for finding in findings if finding.ok is not None]
    assert len(judged) == (9 if HOOKED and name == MODELS[0] else 6)  # logits, stream and continuation of each adapter
    assert all(finding.ok for finding in judged), [f for f in judged if not f.ok]


@pytest.mark.parametrize("name", MODELS)
def test_every_pair_of_adapters_agrees_under_edits(name):
    replies = []
    for adapter in adapters(name):
        prompts = [adapter.encode(text) for text in TEXTS]
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(6, adapter.card.d_model, generator=generator) * 10
        sites = ["resid_post.3", "attn_out.5", "mlp_out.8", "resid_pre.9", "resid_post.12"]
        rows = [Row(i) for i in range(3)]
        rows += [
            Row(i % 3, (hb.Edit(site, vectors[i], op, i - 2 if i % 3 < 2 else -1),))
            for i, (site, op) in enumerate(zip(sites, ("set", "add", "project_out", "add", "set"), strict=True))
        ]
        replies.append(
            adapter.run(
                Request(
                    prompts, rows, [Read(hb.Site("resid_post", 14)), Read(hb.Site("attn_out", 10))], Readout(logits=True, k=1), generate=5
                )
            )
        )
    for one, other in itertools.combinations(replies, 2):
        # float32, three implementations of attention: rounding grows along the layers
        assert (one.readout.logits - other.readout.logits).abs().max() < 2e-3
        for a, b in zip(one.readings, other.readings, strict=True):
            assert (a.values - b.values).norm() / a.values.norm() < 1e-4
        assert torch.equal(one.readout.topk_ids, other.readout.topk_ids)
        assert one.generated == other.generated


def test_a_readout_in_parts_of_the_vocabulary_is_that_of_all_logits():
    """Of both models: tied weights, a softcap or none, a bias of the bridge's; and a hook of the user's on the unembedding acts."""
    for name in MODELS:
        for adapter in adapters(name):
            resid = 20 * torch.randn(40, adapter.card.d_model, generator=torch.Generator().manual_seed(0))
            wanted = torch.randint(adapter.card.d_vocab, (40, 3), generator=torch.Generator().manual_seed(1))
            found, whole = adapter.readout(resid, k=4, tokens=wanted), adapter.readout(resid, logits=True).logits.log_softmax(-1)
            assert adapter.splits() > 0
            assert (found.topk_logprobs - whole.topk(4).values).abs().max() < 1e-4
            assert (whole.gather(-1, found.topk_ids) - found.topk_logprobs).abs().max() < 1e-4
            assert (found.token_logprobs - whole.gather(-1, wanted)).abs().max() < 1e-4
    bridge = real(MODELS[0])
    with bridge.model.hooks(fwd_hooks=[("unembed.hook_out", lambda x, hook: -x)]):
        assert not bridge.splits()
        some = 20 * torch.randn(2, bridge.card.d_model, generator=torch.Generator().manual_seed(2))
        assert torch.equal(bridge.readout(some, k=1, normed=True).topk_ids[:, 0], bridge.unembed(some).argmax(-1))


def test_a_prompt_is_cut_alike_on_every_backend():
    """TransformerLens gives every tokenizer a beginning-of-sequence token; SmolLM2's own adds none, Gemma's does."""
    for name, added in zip(MODELS, (True, False), strict=True):
        from transformer_lens.model_bridge import TransformerBridge

        nnsight = real(name, "nnsight")
        module, folder = nnsight.module, packages.find(name)  # type: ignore[attr-defined]
        raw = TransformerBridge.boot_transformers(str(folder), device="cpu")  # as a user boots it
        ids = hb.wrap(raw).encode("Paris is").ids
        assert ids == nnsight.encode("Paris is").ids
        assert (ids[0] == nnsight.tokenizer.bos_token_id) is added
        assert module.config.vocab_size >= max(ids)


def test_patchscope_is_the_same_on_every_backend():
    grids = [hb.patchscope(adapter, TEXTS[0], target_layers=[2, 9, 14], generate=3, tokens=[" Paris"]) for adapter in adapters(MODELS[0])]
    for one, other in itertools.combinations(grids, 2):
        assert torch.equal(one.token_ids[..., 0], other.token_ids[..., 0])
        assert (one.logprobs - other.logprobs).abs().max() < 1e-3
        assert (one.wanted_logprobs - other.wanted_logprobs).abs().max() < 1e-3
        assert one.texts == other.texts
