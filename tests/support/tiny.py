"""The toy, and tiny random models of three architectures on every backend."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

import hookbook as hb
from hookbook.testing import toy
from tests.support.needs import require

DTYPE = torch.float64

ARCHITECTURES = ("gpt2", "llama", "gemma3")

CASES = ["toy", *(f"{backend}-{arch}" for backend in ("bridge", "nnsight", "hooked") for arch in ARCHITECTURES)]
DIAGONAL = ("toy", "bridge-gemma3", "nnsight-llama", "hooked-gpt2")
"""Every backend and every architecture once: what a recipe is compared with a loop on. It meets a model through `Adapter.run` alone, which
the files of `ENGINE` compare on all of `CASES`; `--whole` tries recipes on all, too."""
ENGINE = frozenset(
    f"test_{name}"
    for name in "attention cells clean climbs devices documented_sites edits families forks fused gradients mlp_in properties sae".split()
    + ["sae_lens_models", "sampling", "sites"]
)
"""Files whose tests run on all cases."""


def tiny_config(arch: str) -> Any:
    """Small, but with what makes each family hard: learned positions; grouped queries; post-norms and a window shorter than the prompts."""
    import transformers

    common = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if arch == "gpt2":
        return transformers.GPT2Config(
            n_layer=3, n_embd=16, n_head=2, n_positions=64, initializer_range=0.25, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0, **common
        )
    shared = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.25,
        **common,
    )
    if arch == "llama":
        return transformers.LlamaConfig(head_dim=4, **shared)
    return transformers.Gemma3TextConfig(
        head_dim=8,
        sliding_window=4,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        **shared,
    )


def hash_of(text: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(text)) % 2**31


def build(name: str, tiny_folder: Any) -> hb.Adapter:
    """The adapter of a case."""
    if name == "toy":
        return toy(dtype=DTYPE)
    backend, arch = name.split("-")
    require("transformer_lens")
    if backend == "hooked":
        return hb.wrap(tiny_hooked(arch, tiny_folder(arch)))
    folder = tiny_folder(arch)
    if backend == "nnsight":
        require("nnsight")
        return hb.load(str(folder), "nnsight", dtype="float64", device="cpu")
    from transformer_lens.model_bridge import TransformerBridge

    return hb.wrap(TransformerBridge.boot_transformers(str(folder), dtype=DTYPE, device="cpu"))


def tiny_hooked(arch: str, folder: Path) -> Any:
    """A random HookedTransformer built from its own config."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformers import AutoTokenizer

    own = {
        "gpt2": dict(normalization_type="LN", positional_embedding_type="standard", act_fn="gelu"),
        "llama": dict(
            normalization_type="RMS",
            positional_embedding_type="rotary",
            rotary_dim=4,
            act_fn="silu",
            gated_mlp=True,
            n_key_value_heads=2,
            final_rms=True,
        ),
        "gemma3": dict(
            normalization_type="RMS",
            positional_embedding_type="rotary",
            rotary_dim=4,
            act_fn="gelu_pytorch_tanh",
            gated_mlp=True,
            n_key_value_heads=2,
            final_rms=True,
            use_normalization_before_and_after=True,
            use_local_attn=True,
            window_size=4,
            attn_types=["local", "global", "local", "local"],
        ),
    }[arch]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cfg = HookedTransformerConfig(
            n_layers=4,
            d_model=16,
            n_heads=4,
            d_head=4,
            d_mlp=32,
            n_ctx=64,
            d_vocab=258,
            dtype=DTYPE,
            seed=1,
            initializer_range=0.3,
            device="cpu",
            original_architecture="tiny",
            model_name=f"tiny-{arch}",
            **own,  # type: ignore[arg-type]
        )
        return HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder))
