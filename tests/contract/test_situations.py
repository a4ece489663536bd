"""What a user does to a model between calls: each call equals plain runs of the model as it is then, or refuses."""

from __future__ import annotations

import copy
import gc
import shutil
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from tokenizers import normalizers
from torch import nn

import hookbook as hb
from hookbook.engine import state as engine_state
from hookbook.engine.state import Parts
from hookbook.errors import EditError, ModelError, SiteError
from hookbook.reply import Reply
from hookbook.request import Read, Readout, Request, Row
from hookbook.testing import ToyAdapter, toy
from tests.support.cases import Case, assert_plain
from tests.support.tiny import DTYPE, build


@pytest.fixture
def own(request, tiny_folder, case) -> Case:
    """A model that the test may change."""
    return Case(case.name, toy(dtype=DTYPE) if case.name == "toy" else build(case.name, tiny_folder))


def blocks(case: Case) -> Any:
    """Its blocks, where hooks of users go."""
    model: Any = case.adapter.model
    if not case.name.startswith("nnsight"):
        return model.blocks
    return case.adapter.module.transformer.h if "gpt2" in case.name else case.adapter.module.model.layers  # type: ignore[union-attr]


def norm(case: Case) -> Any:
    """Its final norm."""
    model: Any = case.adapter.model
    if case.name == "toy":
        return model.norm
    if not case.name.startswith("nnsight"):
        return model.ln_final
    return case.adapter.module.transformer.ln_f if "gpt2" in case.name else case.adapter.module.model.norm  # type: ignore[union-attr]


def moved(x: Any, how: str) -> Any:
    """What a hook makes of a block's or a norm's output."""
    if isinstance(x, tuple):
        return (moved(x[0], how), *x[1:])
    x, by = x.clone(), torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
    if how == "last":
        x[:, -1] += by
    elif how == "first":
        x[:, 0] += by
    elif how == "third":
        x[:, 2:3] += by
    elif how == "batch":
        x += 0.5 * x.mean(0, keepdim=True)
    elif how == "tokens":
        x += 0.5 * x.mean(1, keepdim=True)
    else:
        x += by
    return x


BACKENDS, DTYPES = ("transformer_lens", "nnsight"), ("float32", "bfloat16")
HOWS = ("all", "last", "first", "third", "batch", "tokens")
PROMPTS = ([5, 9, 30, 77, 41, 8], [5, 9, 30, 77, 200], [66, 12, 99])


def asked(case: Case, layers: tuple[int, int] = (1, 2)) -> Request:
    """Rows that share prompts, of several lengths, and so could share prefixes and be packed. `resid_pre` is after what a hook makes of a
    block's output, in plain runs, too."""
    prompts = [case.adapter.encode(list(ids)) for ids in PROMPTS]
    vector = torch.linspace(-2, 2, case.adapter.card.d_model)
    rows = [Row(i, (hb.Edit(f"resid_pre.{layer}", vector, position=-1),)) for i in range(3) for layer in layers] + [Row(0), Row(2)]
    rows.append(Row(1, (hb.Edit("resid_pre.1", vector.roll(3), position=2),)))
    return Request(prompts, rows, [Read("resid_pre.2", slice(None))], Readout(k=2, logits=True))


def equal(case: Case, request: Request, reply: Reply) -> None:
    assert_plain(case, request, reply, 1e-9 if case.adapter.card.dtype == "float64" else 2e-3)


@pytest.mark.filterwarnings("ignore:.*is a hook on")
@pytest.mark.parametrize("how", HOWS)
def test_a_hook_that_is_added_later_is_followed(own, how):
    """Whatever it looks at: the last token, the batch, all tokens; when it is gone, rows share again."""
    request = asked(own)
    before = own.adapter.run(request)
    equal(own, request, before)
    assert before.cost["climbs"] < len(request.rows)
    handle = blocks(own)[1].register_forward_hook(lambda module, args, out: moved(out, how))
    reply = own.adapter.run(request)
    equal(own, request, reply)
    assert reply.cost["climbs"] == len(request.rows) and (reply.said.logits - before.said.logits).abs().max() > 0.01
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


def again(case: Case) -> hb.Adapter:
    """The same model in another wrapper."""
    return ToyAdapter(case.adapter.model) if case.name == "toy" else hb.wrap(case.adapter.model)


def in_threads(case: Case, requests: list[Request]) -> list[Reply]:
    """What calls beside each other give, each through a wrapper of its own."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: again(case).run(request, progress=False), requests))


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


ACTIONS = (
    "hook",
    "hook",
    "norm",
    "off",
    "train",
    "eval",
    "dropout",
    "weights",
    "data",
    "replace",
    "float32",
    "float64",
    "padding",
    "tokenizer",
    "adapter",
    "adapter",
    "switch",
    "threads",
)


def linear(case: Case) -> list[str]:
    """Where adapters of PEFT can go; a HookedTransformer keeps its weights in other modules."""
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    modules = case.adapter.module.named_modules()  # type: ignore[union-attr]
    return [name for name, m in modules if isinstance(m, kinds) and "lora_" not in name and "head" not in name and "unembed" not in name]


def adapted(case: Case, n: int) -> None:
    """A low-rank adapter beside one matrix, as `peft` leaves it: with dropout, if `n` is odd, and in training mode."""
    places = [name for name in linear(case) if not name.endswith(".base_layer")]
    if not places:
        return
    config = peft.LoraConfig(r=2, target_modules=[places[n % len(places)]], init_lora_weights=False, lora_dropout=0.1 * (n % 2))
    peft.inject_adapter_in_model(config, case.adapter.module, f"mine{len(linear(case)) - len(places)}")  # type: ignore[arg-type]


def is_random(case: Case) -> bool:
    """In training mode, with dropout somewhere."""
    modules = [m for root in case.adapter.roots for m in root.modules() if m.training]
    return any(getattr(m, "attention_dropout", 0) or (isinstance(m, nn.Dropout) and m.p) for m in modules)


def situation(case: Case, steps: list[tuple[str, int]]) -> None:
    """Take steps, and compare a call after each with plain runs, or a refusal."""
    case.adapter.tokenizer = copy.deepcopy(case.adapter.tokenizer)  # others may share it
    handles: list[Any] = []
    places = [m for root in case.adapter.roots for m in root.modules() if hasattr(m, "attention_dropout")]
    tokenwise = True
    for action, n in steps:
        if action == "hook":
            handles.append(blocks(case)[n % 3].register_forward_hook(lambda module, args, out, n=n: moved(out, HOWS[n % len(HOWS)])))
        elif action == "norm":
            how = HOWS[n % 2]
            tokenwise = tokenwise and how == "all"
            handles.append(norm(case).register_forward_hook(lambda module, args, out, how=how: moved(out, how)))
        elif action == "off":
            while handles:
                handles.pop().remove()
            tokenwise = True
        elif action in ("train", "eval"):
            for root in case.adapter.roots:
                getattr(root, action)()
        elif action in ("float32", "float64"):
            for root in case.adapter.roots:
                root.to(getattr(torch, action))
        elif action == "dropout":
            for module in places[n % 3 : n % 3 + 1]:
                module.attention_dropout = 0.2 * (n % 2)
        elif action in ("weights", "data", "replace"):
            weights = [x for x in case.adapter.module.parameters() if x.dim() >= 2]  # type: ignore[union-attr]
            weight = weights[n % len(weights)]
            with torch.no_grad():
                if action == "weights":
                    weight.mul_(1.01)
                elif action == "data":
                    weight.data = weight.data.roll(1, 0)
                else:
                    some = torch.arange(weight.numel()) % max(1, weight.numel() // 50) == 0
                    weight.data.mul_(torch.where(some, 0.9, 1.0).view(weight.shape))
        elif action == "padding":
            case.adapter.tokenizer.padding_side = ("left", "right")[n % 2]
        elif action == "tokenizer":
            case.adapter.tokenizer.backend_tokenizer.normalizer = (normalizers.Lowercase(), normalizers.NFC())[n % 2]
            text = "Some WORDS"
            assert list(case.adapter.encode(text).ids) == case.adapter.tokenizer(text).input_ids
        elif action == "adapter":
            adapted(case, n)
        elif action == "switch":
            for module in case.adapter.module.modules():  # type: ignore[union-attr]
                if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                    module.enable_adapters(n % 2 == 1)
        request = asked(case, (n % 3, (n + 1) % 3))
        if is_random(case):
            with pytest.raises(ModelError, match="training mode"):
                case.adapter.run(request)
        elif not tokenwise:
            with pytest.raises(ModelError, match="does not do the same to each token"):
                case.adapter.run(request)
        elif action == "threads":
            got = in_threads(case, [request] * 3)
            case.adapter.look()
            for reply in got:
                equal(case, request, reply)
        else:
            equal(case, request, case.adapter.run(request))


@pytest.mark.filterwarnings("ignore:.*is a hook on")
def test_any_situation_equals_plain_runs_or_is_refused(case, tiny_folder, pytestconfig):
    examples = 500 if pytestconfig.getoption("--whole") else 30

    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 11)), min_size=1, max_size=4))
    def holds(steps: list[tuple[str, int]]) -> None:
        situation(Case(case.name, toy(dtype=DTYPE) if case.name == "toy" else build(case.name, tiny_folder)), steps)

    holds()


def test_a_module_in_training_that_cannot_be_random_is_no_ground(own):
    for root in own.adapter.roots:
        root.add_module("aside", nn.Dropout(0.0))
        root.train()
    if not any(hasattr(m, "attention_dropout") and m.attention_dropout for root in own.adapter.roots for m in root.modules()):
        equal(own, asked(own), own.adapter.run(asked(own)))


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
