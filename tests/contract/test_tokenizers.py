"""A user's tokenizer: every backend cuts texts as it does, and leaves it as it was."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.errors import HookbookError
from hookbook.request import Read, Readout, Request, Row
from hookbook.tasks import Task, Template
from hookbook.testing import toy_tokenizer
from tests.support.needs import marked, require
from tests.support.tiny import DTYPE, tiny_config, tiny_hooked

KINDS = ("bridge", "hooked", "nnsight")
TEXTS = ("The Cat sat", "a<mine>b", "Hi")


def plain_tokenizer(folder: Path, **more: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, **more)


def without_bos() -> Any:
    from tokenizers import processors

    tokenizer = copy.deepcopy(toy_tokenizer())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny Llama or GPT-2 beside a tokenizer that adds a beginning-of-sequence token, one that adds none, or one that has none."""
    import transformers

    def make(arch: str, bos: str) -> Path:
        folder = tmp_path_factory.mktemp(arch)
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(tiny_config(arch)).save_pretrained(folder)
        tokenizer = toy_tokenizer() if bos == "adds" else without_bos()
        if bos == "has none":
            tokenizer.bos_token = None
        tokenizer.save_pretrained(folder)
        return folder

    return make


def model_of(kind: str, folder: Path, tokenizer: Any) -> Any:
    """A raw model that was given a tokenizer as its users do it."""
    if kind == "hooked":
        model = tiny_hooked("llama", folder)
        model.set_tokenizer(tokenizer)
        return model
    if kind == "bridge":
        require("transformer_lens")
        from transformer_lens.model_bridge import TransformerBridge

        model = TransformerBridge.boot_transformers(str(folder), dtype=DTYPE, device="cpu")
        model.tokenizer = tokenizer
        return model
    require("nnsight")
    import transformers
    from nnsight import TransformersModel

    module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE, attn_implementation="eager").eval()
    return TransformersModel(module, tokenizer=tokenizer)


def lower(tokenizer: Any) -> Any:
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda t: t,
    "normaliser": lower,
    "template": lambda t: setattr(t, "chat_template", "{{ messages[0]['content'] }}!"),
    "token": lambda t: t.add_tokens(["<mine>"]),
    "end": lambda t: setattr(t, "eos_token", "<s>"),
}


@pytest.mark.parametrize("bos", ["adds", "adds none", "has none"])
@pytest.mark.parametrize("kind", marked(KINDS))
def test_texts_are_cut_as_plain_transformers_cuts_them_whatever_the_user_changed_on_the_model(kind, bos, folders):
    """Also after the model was wrapped: the change counts from then on."""
    folder = folders("llama", bos)
    for name, change in CHANGES.items():
        model, plain = model_of(kind, folder, plain_tokenizer(folder)), plain_tokenizer(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hb.wrap(model)
            change(plain), change(model.tokenizer)
            adapter = hb.wrap(model)
        for text in TEXTS:
            assert list(adapter.encode(text).ids) == adapter.tokenizer(text).input_ids == plain(text).input_ids, (name, text)
        assert adapter.tokenizer.bos_token == plain.bos_token and adapter.tokenizer.chat_template == plain.chat_template, name
        assert adapter.tokenizer.eos_token == plain.eos_token and plain.eos_token_id in adapter.eos_ids, name
        if name == "template":
            assert adapter.encode("abc", chat=True).text == "abc!"


@pytest.mark.parametrize("kind", marked(KINDS))
def test_what_the_user_loaded_or_saved_with_a_tokenizer_counts(kind, folders, tmp_path):
    folder = folders("llama", "adds none")
    lower(plain_tokenizer(folder, bos_token="</s>")).save_pretrained(tmp_path)
    for where, more in ((folder, {"bos_token": "Z"}), (folder, {"chat_template": "{{ messages[0]['content'] }}?"}), (tmp_path, {})):
        plain = plain_tokenizer(where, **more)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter = hb.wrap(model_of(kind, folder, plain_tokenizer(where, **more)))
        assert adapter.tokenizer.bos_token == plain.bos_token and adapter.tokenizer.chat_template == plain.chat_template
        assert all(list(adapter.encode(text).ids) == plain(text).input_ids for text in TEXTS)


@pytest.mark.parametrize("kind", marked(KINDS))
def test_a_tokenizer_given_to_wrap_is_taken_as_it_is(kind, folders):
    folder = folders("llama", "adds none")
    mine = lower(plain_tokenizer(folder, add_bos_token=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = hb.wrap(model_of(kind, folder, plain_tokenizer(folder)), mine)
    assert adapter.tokenizer is mine and all(list(adapter.encode(text).ids) == mine(text).input_ids for text in TEXTS)


def test_a_tokenizer_that_cannot_be_loaded_again_is_taken_as_transformer_lens_made_it_which_is_said(folders):
    folder = folders("llama", "adds none")
    model = model_of("bridge", folder, plain_tokenizer(folder))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.warns(UserWarning, match="texts begin with <s>, as TransformerLens made the tokenizer"):
        assert hb.wrap(model).encode("ab").ids == (0, *without_bos()("ab").input_ids)


@pytest.mark.parametrize("bos", ["adds none", "has none", "adds"])
@pytest.mark.parametrize("name", marked(["bridge-gpt2", "bridge-llama", "hooked-llama"]))
def test_a_beginning_that_the_model_adds_and_the_checkpoint_does_not_is_said_once_for_each_model(name, bos, folders):
    kind, arch = name.split("-")
    folder = folders(arch, bos)
    for _ in range(2):  # each model by itself
        model = model_of(kind, folder, plain_tokenizer(folder))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            adapter = hb.wrap(model)
            again = hb.wrap(model)
            hb.logit_lens(model, "The cat")
        found = [str(one.message) for one in said if "hookbook begins texts" in str(one.message)]
        ids, theirs = plain_tokenizer(folder)("The cat").input_ids, model.to_tokens("The cat")[0].tolist()
        assert len(found) == (ids != theirs) == (bos != "adds")
        assert list(adapter.encode("The cat").ids) == list(again.encode("The cat").ids) == ids
        assert all(
            "without" in text.partition(",")[0] and f"to_tokens of this {type(model).__name__} begins them with it" in text
            for text in found
        )
        ours = adapter.run(Request([adapter.encode("The cat")], [Row(0)], (), Readout(logits=True))).readout.logits[0]  # type: ignore[union-attr]
        if kind == "bridge":
            import transformers

            module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE, attn_implementation="eager").eval()
            plain = module(torch.tensor([ids])).logits[0, -1].detach()
        else:
            plain = model(torch.tensor([ids]), prepend_bos=False)[0, -1].detach()
        assert (ours - plain).abs().max() < 1e-10
        assert list(adapter.encode(model.to_tokens("The cat")[0]).ids) == theirs  # what the warning says to do


@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_a_model_that_was_loaded_by_name_says_nothing_of_beginnings(backend, folders):
    require(backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert hb.load(str(folders("gpt2", "adds none")), backend, device="cpu").encode("ab").ids == tuple(without_bos()("ab").input_ids)


def state(tokenizer: Any) -> Any:
    """All that a tokenizer is: its attributes, and what its backend would write."""
    own = {key: repr(value) for key, value in sorted(vars(tokenizer).items()) if key != "_tokenizer"}
    return own, tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side, tokenizer.pad_token, tokenizer.special_tokens_map


TASK = Task(tuple((letter, letter.upper()) for letter in "abcdefghijklmnopqrst"), "letters", Template("{}>", "{}", ";"))
CALLS: dict[str, Callable[[Any], Any]] = {
    "lens": lambda model: hb.logit_lens(model, ["The cat", "Hi"]),
    "patchscope": lambda model: hb.patchscope(model, "The cat", target="cat -> cat; x", target_layers=[1], generate=2),
    "generate": lambda model: hb.generate(model, ["The cat", "Hi"], max_new_tokens=2),
    "task": lambda model: hb.task_vector(model, TASK, shots=2, n_prompts=2, queries=2, layers=[1]),
    "contrast": lambda model: hb.contrast_vector(model, ["good", "nice"], ["bad", "sad"], layers=[1], held_out=0),
    "jacobian": lambda model: hb.jacobian(model, ["The cat"], Read("resid_post.3"), [Read("resid_post.1")]),
    "error": lambda model: hb.logit_lens(model, ""),
    "chat": lambda model: hb.generate(model, "Hi", chat=True, max_new_tokens=1),  # there is no template
    "position": lambda model: hb.logit_lens(model, "Hi", position=99),
}


@pytest.mark.parametrize("side, pad", [("right", "</s>"), ("left", None), ("right", None)])
@pytest.mark.parametrize("kind", marked(KINDS))
def test_a_users_tokenizer_is_as_it_was_after_every_call_and_error(kind, side, pad, folders):
    folder = folders("llama", "adds")
    mine = plain_tokenizer(folder)
    model = model_of(kind, folder, mine)
    mine.padding_side, mine.pad_token = side, pad  # as the user wants it, whatever the library made of it
    before = state(mine)
    failed = set()
    for given in (model, hb.wrap(model), hb.wrap(model, mine)):
        assert state(mine) == before
        for name, call in CALLS.items():
            try:
                call(given)
            except HookbookError:
                failed.add(name)
            assert state(mine) == before, name
    assert failed == {"error", "chat", "position"}


def test_a_model_that_hookbook_dispatches_leaves_the_tokenizer_too(folders):
    require("nnsight")
    from nnsight import TransformersModel

    folder = folders("llama", "adds")
    mine = plain_tokenizer(folder)
    model = TransformersModel(str(folder), task="text-generation", tokenizer=mine, dtype="float32")
    mine.padding_side, mine.pad_token = "right", None
    before = state(mine)
    adapter = hb.wrap(model)
    assert model.tokenizer is mine and state(mine) == before
    assert adapter.encode("ab").ids == tuple(mine("ab").input_ids)


@pytest.mark.parametrize("bos", ["adds", "adds none", "has none"])
@pytest.mark.parametrize("backend", ["transformer_lens", "nnsight"])
def test_the_tokenizer_of_a_loaded_model_is_the_checkpoints(backend, bos, folders):
    require(backend)
    folder = folders("llama", bos)
    adapter, plain = hb.load(str(folder), backend, device="cpu"), plain_tokenizer(folder)
    assert state(adapter.tokenizer) == state(plain)
    adapter.run(Request([adapter.encode("The cat")], [Row(0)], (), Readout(logits=True), generate=2))
    assert state(adapter.tokenizer) == state(plain)
