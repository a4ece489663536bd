"""The weights of a model by names and shapes that every backend shares, so that one checkpoint has one fingerprint.

Names are TransformerLens' where its architecture adapter has one (`blocks.3.attn.q.weight`), matrices are `[out, in]`, and joint
projections are apart. Numbers are the checkpoint's, but for what `HookedTransformer.from_pretrained_no_processing` makes of them: Gemma's
embedding times its scale, and one more in its norms.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hookbook.engine.weights import Weight, plain, tensors

HOOKED = {
    "embed.W_E": "embed.weight",
    "pos_embed.W_pos": "pos_embed.weight",
    "unembed.W_U": "unembed.weight",
    "unembed.b_U": "unembed.bias",
    **{f"attn.{kv}W_{x.upper()}": f"attn.{x}.weight" for x in "qkvo" for kv in ("", "_")},
    **{f"attn.{kv}b_{x.upper()}": f"attn.{x}.bias" for x in "qkvo" for kv in ("", "_")},
    **{f"mlp.W_{x}": f"mlp.{x}.weight" for x in ("in", "gate", "out")},
    **{f"mlp.b_{x}": f"mlp.{x}.bias" for x in ("in", "gate", "out")},
}
"""HookedTransformer's names, after `blocks.3.`, and the shared ones; those of norms end in `.w` and `.b`."""


def of_hooked(model: Any) -> Iterator[Weight]:
    """Of a HookedTransformer."""
    for name, x in model.named_parameters(remove_duplicate=False):
        parts = name.split(".", 2) if name.startswith("blocks.") else [name]
        inner = parts[-1]
        known = str(HOOKED.get(inner, inner))
        if known.endswith((".w", ".b")):
            known = known[:-1] + {"w": "weight", "b": "bias"}[known[-1]]
        if inner == "attn.W_O":
            x = x.flatten(0, 1).T
        elif x.dim() == 3:
            x = x.transpose(1, 2).flatten(0, 1)
        elif inner.startswith("mlp.W_") or inner == "unembed.W_U":
            x = x.T
        elif inner.startswith("attn.") and x.dim() == 2:
            x = x.flatten()
        yield Weight(".".join([*parts[:-1], known]), x)


def of_module(names: Any, module: Any) -> Iterator[Weight]:
    """Of a Hugging Face model, wrapped or not; `names` is TransformerLens' architecture adapter for it."""
    plus_one = bool(getattr(names.cfg, "rmsnorm_uses_offset", False))
    attention = names.component_mapping["blocks"].submodules.get("attn")
    split = getattr(attention, "split_qkv_matrix", None)
    done: set[str] = set()
    for path, owner, name, x in tensors(module):
        known = names.convert_hf_key_to_tl_key(f"{path}.{name}" if path else name)
        if split is not None and ".attn.qkv." in known:
            before, inside = known.split(".qkv.", 1)  # `inside`: what an adapter that wraps it calls its own
            deep = inside.count(".")
            holder = _at(module, ".".join(path.split(".")[: -1 - deep]))
            copies = "_original_component" in holder._modules  # a bridge computes from its parts, on which an adapter may be
            if copies and before in done:
                continue
            if copies or not deep:
                done.add(before)
                for letter, linear in zip("qkv", [getattr(holder, x) for x in "qkv"] if copies else split(plain(holder)), strict=True):
                    for inner, _, own, y in tensors(linear) if copies else [("", None, name, getattr(linear, name))]:
                        yield Weight(".".join(filter(None, (before, letter, inner, own))), y)
                continue
        after = None
        if type(owner).__name__ == "Conv1D" and x.dim() == 2:
            x = x.T
        elif known == "embed.weight" and (scale := getattr(owner, "embed_scale", None)) is not None:
            after = partial(_times, float(scale))
        elif plus_one and x.dim() == 1 and "RMSNorm" in type(owner).__name__:
            after = partial(torch.add, 1)
        yield Weight(known, x, after)


def _times(scale: float, x: Tensor) -> Tensor:
    return x * torch.tensor(scale, dtype=x.dtype)


def _at(module: Any, path: str) -> Any:
    """The module at a path of the checkpoint, with what wraps it."""
    for name in path.split("."):
        module = plain(module)._modules[name]
    return module
