"""Attention that computes no patterns, in passes where nobody looks at them: the same numbers, and nothing of it stays on the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.engine import selfcheck
from hookbook.engine.state import answers
from hookbook.errors import HookbookError
from hookbook.request import Read, Readout, Request, Row
from hookbook.testing import toy
from tests.contract.test_climbs import edit_at
from tests.contract.test_families import traced
from tests.support.cases import assert_plain

TEXTS = ("The cat sat on the mat.", "A cat, or a hat")


@pytest.fixture
def ran(case, monkeypatch) -> list[int]:
    """For each fused attention that ran, its queries. The model's own is eager, and requests are fused however short they are."""
    if config := getattr(case.adapter.module, "config", None):
        monkeypatch.setattr(config, "_attn_implementation", "eager")
    lengths, plain = [], torch.nn.functional.scaled_dot_product_attention

    def counted(query: Any, *args: Any, **kwargs: Any) -> Any:
        lengths.append(query.shape[2])
        return plain(query, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    monkeypatch.setattr("hookbook.engine.planning.FUSED_FROM", 1)
    return lengths


def request(adapter: hb.Adapter, *reads: Read, generate: int = 3) -> Request:
    rows = [Row(i % 2, (edit_at(adapter, ("resid_pre.1", "head_z.1", "mlp_out.0", "resid_post.0")[i // 2 % 4], i),)) for i in range(16)]
    return Request([adapter.encode(text) for text in TEXTS], [*rows, Row(0), Row(1)], reads, Readout(logits=True), generate=generate)


def attention(adapter: hb.Adapter) -> tuple[Any, ...]:
    """A model's setting, and the modules whose forward method is their own."""
    own = [name for root in adapter.roots for name, part in root.named_modules() if "forward" in vars(part)]
    return getattr(getattr(adapter.module, "config", None), "_attn_implementation", None), own


def expected(name: str) -> bool:
    """Whether a model of these tests has a fused attention: a bridge of GPT-2 and HookedTransformer compute theirs themselves."""
    return name.startswith("nnsight") or (name.startswith("bridge") and "gpt2" not in name)


def test_passes_are_fused_where_nobody_looks_at_patterns(case, ran, monkeypatch):
    adapter, before = case.adapter, attention(case.adapter)
    monkeypatch.setattr(type(adapter), "eos_ids", frozenset())
    asked = request(adapter, Read("resid_post.1", slice(None)), Read("attn_out.1", slice(None)), Read("head_z.0.1"))
    reply = adapter.run(asked)
    assert_plain(case, asked, reply)
    assert selfcheck.fuses(adapter) == bool(ran) == expected(case.name)
    assert attention(adapter) == before
    ran.clear()
    asked = request(adapter, Read("attn_pattern.1", slice(None)), generate=0)
    assert_plain(case, asked, adapter.run(asked))
    assert not ran, "somebody looks at patterns"


def test_short_passes_and_gradients_are_the_models_own(case, ran, monkeypatch):
    adapter = case.adapter
    selfcheck.fuses(adapter)
    ran.clear()
    one = Request([adapter.encode(TEXTS[0])], [Row(0)], [Read("resid_post.1")], grad=True)
    adapter.run(one)
    monkeypatch.setattr("hookbook.engine.planning.FUSED_FROM", 128)
    adapter.run(request(adapter))
    assert not ran


def test_a_model_is_as_it_was_after_an_error(case, ran):
    adapter, before = case.adapter, attention(case.adapter)
    selfcheck.fuses(adapter)

    def fails(done: int) -> None:
        raise KeyboardInterrupt

    bar: Any = type("Bar", (hb.engine.runs.tqdm,), {"update": lambda self, n=1: fails(n)})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("hookbook.engine.runs.tqdm", bar)
        adapter.run(request(adapter))
    assert attention(adapter) == before
    asked = request(adapter)
    assert_plain(case, asked, adapter.run(asked))


def test_attention_that_gives_other_numbers_is_not_used(case, ran, monkeypatch):
    """The control: the self-check sees a fused attention that leaves something out."""
    if not expected(case.name):
        assert not selfcheck.fuses(case.adapter)
        return
    answers(case.adapter).pop("fuses", None)
    whole = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: whole(*args, **kwargs) * 1.01)
    try:
        assert not selfcheck.fuses(case.adapter)
        asked = request(case.adapter, generate=0)
        assert_plain(case, asked, case.adapter.run(asked))
    finally:
        answers(case.adapter).pop("fuses", None)


def test_hooks_of_the_users_are_seen(case, ran):
    """On a hook inside attention nothing is fused: it would not run."""
    part = next(m for root in case.adapter.roots for name, m in root.named_modules() if name.endswith(("self_attn", "attn", "qkv")))
    handle = part.register_forward_hook(lambda module, args, output: None)
    ran.clear()
    try:
        case.adapter.run(Request([case.adapter.encode(TEXTS[0])], [Row(0)], (), Readout(k=1)))
    except HookbookError:
        pass
    finally:
        handle.remove()
    assert not ran


def test_after_a_fused_run_hooks_inside_attention_are_seen(case, ran):
    """What is asked of a model with hooks runs its own attention, whatever ran before."""
    adapter = case.adapter
    asked = Request([adapter.encode(TEXTS[0])], [Row(0)], (), Readout(logits=True))
    before = adapter.run(asked).readout.logits
    part = next(m for root in adapter.roots for name, m in root.named_modules() if name.endswith(("self_attn", "attn", "qkv")))
    seen = []
    handle = part.register_forward_hook(lambda module, args, output: seen.append(len(ran)))
    try:
        ran.clear()
        after = adapter.run(asked).readout.logits
    finally:
        handle.remove()
    assert not ran and (after - before).abs().max() < 1e-10 and (seen or adapter.module is None)


def test_a_model_is_asked_on_each_backend():
    """An answer of one wrapper says nothing of another that runs the same module in its own way."""
    adapter = toy()
    other = toy()
    other.model, other.card = adapter.model, replace(other.card, backend="another")
    answers(adapter)["fuses"] = True
    assert answers(other) == {} and answers(adapter)["fuses"] and not selfcheck.fuses(other)


def test_scores_with_a_soft_cap_are_not_fused(monkeypatch):
    """transformers' sdpa refuses the cap."""
    import transformers

    small = {
        "vocab_size": 258,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
    }
    more = {"intermediate_size": 32, "initializer_range": 0.5, "query_pre_attn_scalar": 4, "attn_logit_softcapping": 1.0}
    adapter = traced(transformers.Gemma2Config(**small, **more))
    with torch.no_grad():
        want = adapter.module(torch.tensor([adapter.encode(TEXTS[0]).ids])).logits[0, -1]
    monkeypatch.setattr("hookbook.engine.planning.FUSED_FROM", 1)
    reply = adapter.run(Request([adapter.encode(TEXTS[0])], [Row(0)], (), Readout(logits=True)))
    assert not selfcheck.fuses(adapter) and attention(adapter)[0] == "eager"
    assert (reply.readout.logits[0] - want).abs().max() < 1e-10
