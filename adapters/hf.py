"""What adapters over Hugging Face modules share: facts about the model, inputs, and the cache of keys and values."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

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
        blocks = names.component_mapping["blocks"]
        aliases, mlp = blocks.hook_aliases, blocks.submodules.get("mlp")
        self.outputs = {
            name: target.removesuffix(".hook_out")
            for name in ("attn_out", "mlp_out")
            if isinstance(target := aliases.get(f"hook_{name}"), str) and target.endswith(".hook_out")
        }
        self.mlp_in = "mlp.in" if mlp is not None and mlp.name is None else "mlp"
        """The part of a block whose input `mlp_in` is: where no module holds the MLP (OPT), its first projection."""

    def path(self, name: str, layer: int | None) -> str | None:
        """The module whose output `embed`, `attn_out` or `mlp_out` is, whose input `head_z`, `mlp_in` or `mlp_act` is, or which computes
        `attn_pattern`; None if there is none."""
        inner = {"head_z": "attn.o", "mlp_in": self.mlp_in, "mlp_act": "mlp.out", "attn_pattern": "attn"} | self.outputs
        try:
            found = self.names.translate_transformer_lens_path(name if layer is None else f"blocks.{layer}.{inner[name]}")
            self.module.get_submodule(found)
        except (KeyError, ValueError, AttributeError):
            return None
        return found

    def writer(self, name: str, layer: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
        """See `hookbook.adapter.Adapter.writer`."""
        path, norm = self.writer_paths(name, layer)
        return self.module.get_submodule(path), None if norm is None else self.module.get_submodule(norm)

    def writer_paths(self, name: str, layer: int) -> tuple[str, str | None]:
        """The modules of `writer`."""
        part, out = ("attn", "attn_out") if name == "head_z" else ("mlp", "mlp_out")
        return str(self.path(name, layer)), None if self.outputs.get(out) in (part, None) else self.path(out, layer)


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


def takes_positions(model: Any) -> bool:
    """Whether a forward pass takes position ids."""
    return "position_ids" in inspect.signature(model.forward).parameters
