"""What adapters over Hugging Face modules share: facts about the model, inputs, and the cache of keys and values."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from hookbook.errors import ModelError
from hookbook.tokens import adds_bos

_own: weakref.WeakKeyDictionary[Any, tuple[int, Any]] = weakref.WeakKeyDictionary()
"""Of tokenizers that TransformerLens changed: what they were when they were looked at, and a copy that is changed back."""
_told: weakref.WeakSet[Any] = weakref.WeakSet()
"""Models whose beginning-of-sequence token was spoken of."""


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


def has(tokenizer: Any) -> Any:
    """A tokenizer, or `ModelError` if there is none."""
    if tokenizer is None:
        raise ModelError("the model has no tokenizer", "prompts cannot be read", "pass one: hb.wrap(model, tokenizer=...)")
    return tokenizer


@contextmanager
def as_it_was(tokenizer: Any) -> Iterator[None]:
    """Put a tokenizer's side of padding and padding token back after nnsight, which sets both whenever it loads a model."""
    before = {} if tokenizer is None else {name: getattr(tokenizer, name) for name in ("padding_side", "pad_token")}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(tokenizer, name, value)


def own_tokenizer(model: Any) -> Any:
    """The tokenizer of a TransformerLens model as it is now, without what TransformerLens changed.

    It loads a tokenizer that adds no beginning-of-sequence token again, so that it adds one, and takes the end token for that token where
    there is none. Every backend must cut a prompt alike, so both are undone. One for which the user asked so (`add_bos_token=True`) looks
    the same: if texts then begin otherwise than the model's own `to_tokens` has them, a warning says so, once for each model.
    """
    tokenizer = has(model.tokenizer)
    own, bos = _undone(tokenizer), getattr(tokenizer, "bos_token_id", None)
    theirs = bos is not None and bool(getattr(model.cfg, "default_prepend_bos", True))
    if theirs != adds_bos(own) and model not in _told:
        _told.add(model)
        ours, else_ = ("without", "with") if theirs else ("with", "without")
        warnings.warn(
            f"hookbook begins texts {ours} {tokenizer.bos_token}, as the checkpoint's tokenizer does; to_tokens of this "
            f"{type(model).__name__} begins them {else_} it, so that numbers differ. For its tokens give model.to_tokens(text)[0] as the "
            "prompt. TransformerLens loads such a tokenizer again from its files, without what you may have changed of yours: to say which "
            "is meant, hb.wrap(model, tokenizer).",
            stacklevel=2,
        )
    return own


def _undone(tokenizer: Any) -> Any:
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer
    kwargs = {key: value for key, value in tokenizer.init_kwargs.items() if key not in ("add_bos_token", "local_files_only")}
    name = kwargs.pop("name_or_path", "")
    added = name and tokenizer.init_kwargs.get("add_bos_token") and tokenizer.add_bos_token
    taken = tokenizer.bos_token is not None and kwargs.get("bos_token") is None
    taken = taken and tokenizer.bos_token in (tokenizer.eos_token, str(kwargs.get("eos_token")))
    if not added and not taken:
        return tokenizer
    backend = tokenizer.backend_tokenizer
    parts = pickle.dumps([backend.normalizer, backend.pre_tokenizer, backend.post_processor, backend.decoder])
    state = hash((parts, len(tokenizer), str(tokenizer.chat_template), str(tokenizer.special_tokens_map)))
    if _own.get(tokenizer, (None,))[0] != state:
        _own[tokenizer] = state, _changed_back(tokenizer, name if added else "", kwargs, taken)
    return _own[tokenizer][1] or tokenizer


def _changed_back(tokenizer: Any, name: str, kwargs: dict[str, Any], taken: bool) -> Any:
    """A copy as it was before, or None if it is that already. A post-processor that is not the one TransformerLens made is the user's."""
    now, before = tokenizer.backend_tokenizer.post_processor, None
    if name:
        try:
            before = AutoTokenizer.from_pretrained(name, local_files_only=True, **copy.deepcopy(kwargs)).backend_tokenizer.post_processor
        except (OSError, ValueError, TypeError) as error:
            warnings.warn(
                f"texts begin with {tokenizer.bos_token}, as TransformerLens made the tokenizer; whether the checkpoint's does so is not "
                f"known, as {name!r} cannot be loaded again ({type(error).__name__}). Give yours: hb.wrap(model, tokenizer).",
                stacklevel=2,
            )
    if not taken and (before is None or pickle.dumps(before) == pickle.dumps(now)):
        return None
    own = copy.deepcopy(tokenizer)
    if taken:
        own.bos_token = None
    if before is not None:
        own.add_bos_token = True  # which makes the post-processor again
        if pickle.dumps(own.backend_tokenizer.post_processor) == pickle.dumps(now):
            own.add_bos_token = False
            own.backend_tokenizer.post_processor = before
        else:
            own.backend_tokenizer.post_processor = now
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
