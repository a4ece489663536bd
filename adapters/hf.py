"""What adapters over Hugging Face modules share: facts about the model, inputs, and the cache of keys and values."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer

from hookbook.climb import Climb
from hookbook.errors import ModelError

_own_tokenizers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def device(model: Any) -> torch.device:
    """Where the embedding is, so where tokens go; the hooks of one whose weights wait elsewhere move its input themselves."""
    where = model.get_input_embeddings().weight.device
    return torch.device("cpu") if where.type == "meta" else where


def dtype_name(model: Any) -> str:
    """The dtype of the stream, such as `float32`."""
    return str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")


def model_id(model: Any) -> str:
    """The name a model was loaded by, without the folders of a local path."""
    name = getattr(model.config, "_name_or_path", "") or getattr(model, "name_or_path", "") or type(model).__name__
    return name.rstrip("/").split("/")[-1] if name.startswith(("/", ".")) else name


def eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """The end tokens of the checkpoint and of the tokenizer; nothing else of the generation config is used."""
    found: set[int] = set()
    for value in (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config.get_text_config(), "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        found.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    return frozenset(found)


def own_tokenizer(tokenizer: Any) -> Any:
    """The checkpoint's tokenizer as it was before TransformerLens made it add a beginning-of-sequence token.

    Every backend must cut a prompt alike. A tokenizer that cannot be loaded again (it was made in memory) stays.
    """
    if tokenizer is None:
        raise ModelError("the model has no tokenizer", "prompts cannot be read", "pass one: hb.wrap(model, tokenizer=...)")
    if tokenizer not in _own_tokenizers:
        try:
            own = AutoTokenizer.from_pretrained(tokenizer.name_or_path, local_files_only=True)
        except (OSError, ValueError, TypeError):
            return tokenizer
        _own_tokenizers[tokenizer] = own
    own = _own_tokenizers[tokenizer]
    if own.get_vocab() != tokenizer.get_vocab():
        return tokenizer  # the user's own, or with tokens of their own
    own.chat_template = tokenizer.chat_template
    return own


class Names:
    """Where sites live in a Hugging Face module tree, as TransformerLens' architecture adapter for the model says."""

    def __init__(self, names: Any, module: Any) -> None:
        self.names, self.module = names, module
        aliases = names.component_mapping["blocks"].hook_aliases
        self.outputs = {
            name: target.removesuffix(".hook_out")
            for name in ("attn_out", "mlp_out")
            if isinstance(target := aliases.get(f"hook_{name}"), str) and target.endswith(".hook_out")
        }

    def path(self, name: str, layer: int | None) -> str | None:
        """The module whose output `embed`, `attn_out` or `mlp_out` is, whose input `head_z` or `mlp_act` is, or which computes `attn_pattern`; None if there is none."""
        inner = {"head_z": "attn.o", "mlp_act": "mlp.out", "attn_pattern": "attn"} | self.outputs
        try:
            found = self.names.translate_transformer_lens_path(name if layer is None else f"blocks.{layer}.{inner[name]}")
            self.module.get_submodule(found)
        except (KeyError, ValueError, AttributeError):
            return None
        return found

    def writer(self, name: str, layer: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
        """See `hookbook.adapter.Adapter.writer`."""
        part, out = ("attn", "attn_out") if name == "head_z" else ("mlp", "mlp_out")
        norm = None if self.outputs.get(out) in (part, None) else self.path(out, layer)
        return self.module.get_submodule(self.path(name, layer)), None if norm is None else self.module.get_submodule(norm)


@contextmanager
def eager(module: Any, wanted: bool) -> Iterator[None]:
    """Attention that computes its pattern, for one pass; the model's own choice is put back."""
    config = module.config
    before = config._attn_implementation
    if not wanted or before == "eager":
        yield
        return
    try:
        config._attn_implementation = "eager"
        yield
    finally:
        config._attn_implementation = before


def check_attention(config: Any) -> None:
    """Raise for blocks that keep something else than keys and values: their state cannot be forked yet."""
    text = config.get_text_config()
    other = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention", "chunked_attention"}
    other |= {"alibi"} if getattr(text, "alibi", False) else set()  # its biases come in a shape of batch times heads
    if other or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"a model with {', '.join(sorted(other)) or 'an encoder'} cannot be wrapped",
            "its blocks keep more than keys and values",
            "use a causal language model with attention in every block",
        )


def inputs(model: Any, tokens: Tensor, mask: Tensor | None, cache: Any) -> dict[str, Any]:
    """Arguments of a forward pass. Positions count a row's own tokens; without padding the model counts by itself."""
    where = device(model)
    found: dict[str, Any] = {"input_ids": tokens.to(where), "use_cache": cache is not None}
    if cache is not None:
        found["past_key_values"] = cache
    if mask is not None:
        found["attention_mask"] = mask.to(where)
        if "position_ids" in inspect.signature(model.forward).parameters:
            found["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :].to(where)
    return found


def cache_from(kept: list[Any] | None) -> Any:
    """A cache that holds `kept`. Without a config every layer keeps all tokens; sliding windows are in the masks."""
    cache = DynamicCache()
    for i, (keys, values) in enumerate(kept or ()):
        kept[i] = None  # type: ignore[index]  taken over
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def length(cache: Any) -> int:
    """How many tokens a cache holds."""
    return cache.layers[0].keys.shape[-2] if cache is not None and cache.layers else 0


def kept(cache: Any, n_layers: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the first layers, as `cache_from` takes them."""
    if len(cache.layers) < n_layers:
        raise ModelError(
            "a model whose blocks share or keep no keys and values", f"{n_layers} blocks kept {len(cache.layers)}", "use a model with attention in every block"
        )
    return [(layer.keys, layer.values) for layer in cache.layers[:n_layers]]


def widener(cache: Any, climb: Climb, keep: bool) -> Callable[[int], None]:
    """Called before each block: gives its kept keys and values the rows of the batch, and frees those below."""

    def widen(layer: int) -> None:
        if cache is None:
            return
        if layer < len(cache.layers):
            entry = cache.layers[layer]
            entry.keys, entry.values = climb.widen(entry.keys), climb.widen(entry.values)
        if layer and not keep:
            below = cache.layers[layer - 1]
            below.keys, below.values = below.keys[:0], below.values[:0]

    return widen
