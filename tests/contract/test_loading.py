"""`hb.load` of models that take pictures, too: what they say of texts, and nothing is started or installed on the way."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.errors import ModelError
from hookbook.request import Readout, Request, Row
from hookbook.testing import toy_tokenizer
from tests.support.needs import require
from tests.support.tiny import DTYPE

BACKENDS = ("transformer_lens", "nnsight")
TEXT = dict(
    vocab_size=258,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    initializer_range=0.25,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)
PICTURES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)


def with_pictures(kind: str, folder: Path) -> Any:
    """A tiny model of texts and pictures, without the processor that cuts pictures up."""
    import transformers

    torch.manual_seed(0)
    if kind == "gemma3":
        more = dict(mm_tokens_per_image=4, image_token_index=257, boi_token_index=256, eoi_token_index=255)
        config: Any = transformers.Gemma3Config(text_config=dict(head_dim=8, **TEXT), vision_config=PICTURES, **more)  # type: ignore[arg-type]
        model: Any = transformers.Gemma3ForConditionalGeneration(config)
    else:
        vision = dict(model_type="clip_vision_model", **PICTURES)
        config = transformers.LlavaConfig(text_config=dict(model_type="llama", **TEXT), vision_config=vision, image_token_index=257)
        model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return model.to(DTYPE).eval()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Every process that something wanted to start, and every call of pip; none is let."""
    found: list[Any] = []

    def refused(*args: Any, **more: Any) -> Any:
        found.append(args)
        raise OSError("a test lets nothing be started")

    names = "execv execve execvp execvpe execl execlp fork forkpty posix_spawn posix_spawnp spawnv spawnve spawnvp system popen"
    for name in names.split():
        monkeypatch.setattr(os, name, refused)
    monkeypatch.setattr(subprocess, "Popen", refused)
    if importlib.util.find_spec("pip") is not None:
        monkeypatch.setattr("pip._internal.cli.main.main", refused)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # so that it is missing wherever this runs
    yield found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_of_pictures_too_says_what_it_says_of_texts_and_nothing_is_installed(backend, tmp_path, started):
    require(backend)
    plain = with_pictures("gemma3", tmp_path)
    adapter = hb.load(str(tmp_path), backend, dtype="float64", device="cpu")
    tokens, value = adapter.encode("The cat"), torch.linspace(-2, 2, 16, dtype=DTYPE)
    request = Request([tokens], [Row(0), Row(0, (hb.Edit("resid_post.0", value, "add"),))], (), Readout(logits=True))
    ours = adapter.run(request).readout.logits  # type: ignore[union-attr]
    assert started == []
    ids = torch.tensor([tokens.ids])

    def last(layer: int | None) -> torch.Tensor:
        def push(module: Any, args: Any, out: Any) -> Any:
            x = (out[0] if isinstance(out, tuple) else out).clone()
            x[:, -1] += value
            return (x, *out[1:]) if isinstance(out, tuple) else x

        handles = [] if layer is None else [plain.model.language_model.layers[layer].register_forward_hook(push)]
        with torch.no_grad():
            logits = plain(ids).logits[0, -1]
        for handle in handles:
            handle.remove()
        return logits

    assert (ours - torch.stack([last(None), last(0)])).abs().max() < 1e-10 and (ours[0] - ours[1]).abs().max() > 0.1


def test_what_load_does_not_use_would_install(tmp_path, started):
    """Why it makes the bridge otherwise; should this end, `hb.load` may as well call it."""
    require("transformer_lens")
    from transformer_lens.model_bridge import TransformerBridge

    with_pictures("gemma3", tmp_path)
    TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    assert any("torchvision" in str(args) for args in started)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_that_is_no_causal_language_model_is_refused_in_words(backend, tmp_path, started):
    require(backend)
    with_pictures("llava", tmp_path)
    with pytest.raises(ModelError, match="cannot be loaded: transformers takes it for no causal language model"):
        hb.load(str(tmp_path), backend, device="cpu")
    assert started == []
