"""What a user does to a model between calls: each call equals plain runs of the model as it is then, or refuses."""

from __future__ import annotations

import gc
import shutil
import warnings
import weakref
from dataclasses import replace
from itertools import product
from typing import Any

import peft
import pytest
import torch
from torch import nn

import hookbook as hb
from hookbook.engine import state as engine_state
from hookbook.engine.state import Parts
from hookbook.errors import EditError, ModelError, Refused, SiteError
from hookbook.request import Read, Readout, Request, Row
from hookbook.testing import toy
from tests.support.cases import Case
from tests.support.situations import HOWS, PROMPTS, adapted, again, asked, blocks, equal, in_threads, linear, moved, norm, part
from tests.support.tiny import DTYPE, build


@pytest.fixture
def own(request, tiny_folder, case) -> Case:
    """A model that the test may change."""
    return Case(case.name, toy(dtype=DTYPE) if case.name == "toy" else build(case.name, tiny_folder))


BACKENDS, DTYPES = ("transformer_lens", "nnsight"), ("float32", "bfloat16")


@pytest.mark.filterwarnings("ignore:.*is a hook on")
@pytest.mark.parametrize("block", [1, -1])
@pytest.mark.parametrize("how", HOWS)
def test_a_hook_that_is_added_later_is_followed(own, how, block):
    """Whatever it looks at: the last token, the batch, all tokens; also above all others. When it is gone, rows share again."""
    request = asked(own)
    before = own.adapter.run(request)
    equal(own, request, before)
    assert before.cost["climbs"] < len(request.rows)
    handle = blocks(own)[block].register_forward_hook(lambda module, args, out: moved(out, how))
    reply = own.adapter.run(request)
    equal(own, request, reply)
    assert reply.cost["climbs"] == len(request.rows)
    if block == 1 or how in ("all", "last", "tokens"):  # above all blocks another token sees nothing, and the norm no scale
        assert (reply.said.logits - before.said.logits).abs().max() > 0.01
    handle.remove()
    again = own.adapter.run(request)
    assert again.cost == before.cost and torch.equal(again.said.logits, before.said.logits)


def test_a_hook_is_said_once_by_its_name(own):
    def towards_the_end(module: Any, args: Any, out: Any) -> Any:
        return moved(out, "last")

    handle = blocks(own)[1].register_forward_hook(towards_the_end)
    with pytest.warns(UserWarning, match="towards_the_end at .*1 is a hook on"):
        own.adapter.run(asked(own))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own.adapter.run(asked(own))
    handle.remove()


@pytest.mark.filterwarnings("ignore:.*is a hook on")
def test_a_hook_above_the_blocks_is_followed_or_refused_by_name(own):
    """Of tokens alike it is the same for those that are looked at alone."""
    request = asked(own)

    def scale(module: Any, args: Any, out: Any) -> Any:
        return out * 1.5

    def last(module: Any, args: Any, out: Any) -> Any:
        return moved(out, "first")

    handle = norm(own).register_forward_hook(scale)
    equal(own, request, own.adapter.run(request))
    handle.remove()
    handle = norm(own).register_forward_hook(last)
    with pytest.raises(ModelError, match="last at .* does not do the same to each token"):
        own.adapter.run(request)
    handle.remove()
    equal(own, request, own.adapter.run(request))


@pytest.mark.filterwarnings("ignore:.*is a hook on")
@pytest.mark.parametrize("how", ["all", "third"])
@pytest.mark.parametrize("name", ["attn_out", "mlp_out"])
def test_what_a_block_adds_is_read_with_a_hook_on_its_part_or_refused(own, name, how):
    """Libraries see a part before such a hook, or after it. The stream is right, and so are the other blocks."""
    reads = [Read(site, slice(None)) for site in ("resid_pre.1", "attn_out.1", "mlp_out.1", "resid_post.1")]
    request = Request([own.adapter.encode([5, 9, 30, 77])], [Row(0)], reads, Readout(logits=True))
    handle = part(own, name, 1).register_forward_hook(lambda module, args, out: moved(out, how))
    equal(own, replace(request, reads=[reads[0], reads[3]]), own.adapter.run(replace(request, reads=[reads[0], reads[3]])))
    try:
        before, *added, after = (reading.values for reading in own.adapter.run(request).readings)
        assert own.name.startswith(("toy", "hooked")) and (before + sum(added) - after).abs().max() < 1e-9
    except Refused as refusal:
        assert not own.name.startswith(("toy", "hooked")) and "they are not what its blocks add to the stream" in str(refusal)
    elsewhere = [Read(site, -1) for site in ("resid_pre.0", "attn_out.0", "mlp_out.0", "resid_post.0")]
    before, *added, after = (reading.values for reading in own.adapter.run(replace(request, reads=elsewhere)).readings)
    assert (before + sum(added) - after).abs().max() < 1e-6
    handle.remove()
    assert own.adapter.run(request).readings


@pytest.mark.filterwarnings("ignore:.*is a hook on")
def test_generation_under_a_hook_is_that_of_single_steps(own):
    prompts = [own.adapter.encode(list(ids)) for ids in PROMPTS]
    handle = blocks(own)[1].register_forward_hook(lambda module, args, out: moved(out, "all"))
    reply = own.adapter.run(Request(prompts, [Row(0), Row(1), Row(2)], generate=4))
    for i, tokens in enumerate(prompts):
        ids = list(tokens.ids)
        for chosen in reply.generated[i]:
            assert int(own.plain(tuple(ids))[0][-1].argmax()) == chosen
            ids.append(chosen)
    handle.remove()


def test_dropout_in_training_is_refused_by_name_before_each_run(own):
    request, places = asked(own), [m for root in own.adapter.roots for m in root.modules() if hasattr(m, "attention_dropout")]
    own.adapter.run(request)
    for module in places[:1]:
        module.attention_dropout = 0.3
    for root in own.adapter.roots:
        root.train()
    if not places:  # a model without dropout gives the same in either mode
        equal(own, request, own.adapter.run(request))
        return
    with pytest.raises(ModelError, match="training mode.*attention_dropout of 0.3.*eval"):
        own.adapter.run(request)
    with pytest.raises(ModelError, match="training mode"):
        again(own).look()
    for root in own.adapter.roots:
        root.eval()
    equal(own, request, own.adapter.run(request))


def test_the_card_says_what_the_model_runs_in_now(own):
    request, vector = asked(own), hb.Vector.of(own.adapter, "resid_post.1", torch.ones(own.adapter.card.d_model))
    own.adapter.run(request)
    for root in own.adapter.roots:
        root.to(torch.float32)
    reply = own.adapter.run(replace(request, rows=[*request.rows, Row(0, (vector.edit(),))]))  # and the vector is still its own
    assert own.adapter.card.dtype == "float32" and reply.readings[0].values.dtype == torch.float32
    equal(own, replace(request, rows=[*request.rows, Row(0, (vector.edit(),))]), reply)


@pytest.mark.parametrize("change", ["head", "rows of the embedding", "one number", "data"])
def test_a_vector_is_of_the_weights(own, change):
    """Another fingerprint, and vectors of before are refused, unless the user means it; the names are the same."""
    vector = hb.Vector.of(own.adapter, "resid_post.1", torch.ones(own.adapter.card.d_model))
    before = own.adapter.card
    weights = sorted((x for x in own.adapter.module.parameters() if x.dim() >= 2 and x.any()), key=lambda x: -x.numel())  # type: ignore[union-attr]
    with torch.no_grad():
        if change == "head":
            weights[0].copy_(weights[0].roll(1, 0))
        elif change == "rows of the embedding":
            weights[0][:2] = weights[0][:2].flip(0)
        elif change == "one number":
            weights[-1].view(-1)[3] += 1e-6
        else:
            weights[-1].data = weights[-1].data.clone().mul_(1.0001)
    own.adapter.look()
    assert not own.adapter.card.same_model(before) and own.adapter.card.model_id == before.model_id
    request = Request([own.adapter.encode([5, 6])], [Row(0, (vector.edit(),))], readout=Readout(logits=True))
    with pytest.raises(EditError, match="they have other weights"):
        own.adapter.run(request)
    now = hb.Vector.of(own.adapter, "resid_post.1", torch.ones(own.adapter.card.d_model))
    for use in (lambda: vector + now, lambda: vector.cosine(now), lambda: now.project_out(vector)):
        with pytest.raises(SiteError, match="they have other weights"):
            use()
    meant = vector.on(own.adapter)
    assert meant.cosine(now) == pytest.approx(1.0)
    own.adapter.run(replace(request, rows=[Row(0, (meant.edit(),))]))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_a_checkpoint_is_one_model_whatever_runs_it(tiny_folder, arch, tmp_path):
    """On a bridge and in nnsight, in another folder, in another dtype; a tuned copy is another, and a folded one."""
    from transformer_lens.model_bridge import TransformerBridge

    shutil.copytree(tiny_folder(arch), tmp_path / "copy")
    folders = [str(tiny_folder(arch)), str(tmp_path / "copy")]
    models = [
        hb.load(folder, backend, dtype=dtype, device="cpu") for folder, (backend, dtype) in product(folders, product(BACKENDS, DTYPES))
    ]
    for one, other in product(models, models):
        assert one.card.same_model(other.card) and dict(one.card.weights)["bfloat16"] == dict(other.card.weights)["bfloat16"]
    assert len({model.card.model_id for model in models}) == 2 and {model.card.dtype for model in models} == set(DTYPES)
    vectors = [hb.Vector.of(model, "resid_post.1", torch.ones(16)) for model in models]
    for model, vector in product(models, vectors):
        assert hb.generate(model, "ab", edits=[vector.edit()], max_new_tokens=1).texts
    tuned = models[0]
    with torch.no_grad():
        list(tuned.module.parameters())[3].mul_(1.001)  # type: ignore[union-attr]
    tuned.look()
    for model, vector in zip(models[1:], vectors[1:], strict=True):
        assert not tuned.card.same_model(model.card)
        with pytest.raises(EditError, match="they have other weights|they are different spaces"):
            hb.generate(tuned, "ab", edits=[vector.edit()], max_new_tokens=1)
    folded = models[1].model if isinstance(models[1].model, TransformerBridge) else models[0].model
    before = hb.wrap(folded).card
    folded.enable_compatibility_mode()
    assert not hb.wrap(folded).card.same_model(before)


def test_an_adapter_is_part_of_the_model_until_it_is_switched_off(own):
    if own.name.startswith("hooked"):
        assert not linear(own)  # peft knows none of its modules
        return
    request, vector = asked(own), hb.Vector.of(own.adapter, "resid_post.1", torch.ones(own.adapter.card.d_model))
    edited = Request([own.adapter.encode([5, 6])], [Row(0, (vector.edit(),))], readout=Readout(logits=True))
    free, before = own.adapter.run(edited), own.adapter.card
    adapted(own, 1)
    with pytest.raises(ModelError, match="training mode.*dropout of 0.1"):
        own.adapter.run(request)
    for root in own.adapter.roots:
        root.eval()
    equal(own, request, own.adapter.run(request))
    assert not own.adapter.card.same_model(before)
    with pytest.raises(EditError, match="they have other weights"):
        own.adapter.run(edited)
    layers = [m for m in own.adapter.module.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]  # type: ignore[union-attr]
    for layer in layers:
        layer.enable_adapters(False)
    assert torch.equal(own.adapter.run(edited).said.logits, free.said.logits) and own.adapter.card.same_model(before)
    for layer in layers:
        layer.enable_adapters(True)
        layer.merge()
    equal(own, request, own.adapter.run(request))
    assert not own.adapter.card.same_model(before)


def test_threads_take_turns(own):
    """Several wrappers of one model are one model: as if one call after the other."""
    requests = [asked(own, layers) for layers in ((0, 1), (1, 2), (0, 2), (2, 1))]
    wanted = [own.adapter.run(request) for request in requests]
    for reply, want in zip(in_threads(own, [requests[i % 4] for i in range(12)]), wanted * 3, strict=True):
        assert torch.equal(reply.said.logits, want.said.logits)


def test_a_model_is_let_go(own):
    own.adapter.run(asked(own))
    module = weakref.ref(own.adapter.module)
    own.adapter = None  # type: ignore[assignment]
    gc.collect()
    assert module() is None


def test_parts_are_all_modules_and_tensors(own):
    for root in own.adapter.roots:
        parts = Parts((root,))
        assert set(map(id, parts.modules)) == set(map(id, root.modules()))
        assert {id(x) for x in (*root.parameters(), *root.buffers())} == set(map(id, parts.tensors))


def test_a_module_in_training_that_cannot_be_random_is_no_ground(own):
    for root in own.adapter.roots:
        for module in root.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        root.add_module("aside", nn.Dropout(0.0))
        root.train()
    request = asked(own)
    equal(own, request, own.adapter.run(request))
    assert all(root.training and root.aside.training for root in own.adapter.roots)  # and it was left so


def test_a_call_of_several_runs_looks_once_and_the_next_one_again(own, monkeypatch):
    """A change between two calls is seen by the second, however soon it comes."""
    looked: list[Any] = []
    plain = engine_state.look
    monkeypatch.setattr(engine_state, "look", lambda *args, **more: (looked.append(args[0]), plain(*args, **more))[1])
    monkeypatch.setattr(engine_state, "AGAIN", 1000.0)
    first = hb.patchscope(own.adapter, [5, 9, 30], target_layers="all", progress=False)
    assert len(looked) == 1
    with torch.no_grad():
        for weight in own.adapter.module.parameters():  # type: ignore[union-attr]
            weight.mul_(1.02)
    again = hb.patchscope(own.adapter, [5, 9, 30], target_layers="all", progress=False)
    assert len(looked) == 2 and not again.target_card.same_model(first.target_card)
    monkeypatch.setattr(engine_state, "AGAIN", 0.0)
    hb.patchscope(own.adapter, [5, 9, 30], target_layers="all", progress=False)
    assert len(looked) > 4  # once for each run
