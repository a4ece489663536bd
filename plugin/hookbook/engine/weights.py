"""A fingerprint of weights: the same for the same numbers, on any device, in any process, whatever library holds them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
"""Widest first. Two models are compared in the widest that both were hashed in, so that a checkpoint is known in another dtype."""

BLOCK = 1 << 15


class Weight(NamedTuple):
    """A tensor of a model's weights."""

    name: str
    numbers: Tensor
    after: Callable[[Tensor], Tensor] | None = None
    """What is made of the numbers, in any dtype, before they are hashed."""


def tensors(module: Any, path: str = "") -> Iterator[tuple[str, Any, str, Tensor]]:
    """Parameters and kept buffers as the checkpoint has them: where, in which module, name and numbers. Parts of TransformerLens and
    adapters that are switched off are left out."""
    module = plain(module)
    for name, x in {**module._parameters, **module._buffers}.items():
        if x is not None and name not in module._non_persistent_buffers_set:
            yield path, module, name, x
    for name, child in module._modules.items():
        if child is not None:
            yield from tensors(child, f"{path}.{name}".lstrip("."))


def plain(module: Any) -> Any:
    """The module that a part of TransformerLens or an adapter without effect wraps."""
    while True:
        if "_original_component" in module._modules:
            module = module._modules["_original_component"]
        elif "base_layer" in module._modules and (module.disable_adapters or not module.active_adapters):
            module = module._modules["base_layer"]
        else:
            return module


def digests(weights: Iterable[Weight]) -> tuple[tuple[str, str], ...]:
    """For the dtype of most of the weights and each narrower one of `DTYPES`, a fingerprint of the weights in it.

    Each block of 32,768 words of 64 bits is multiplied with fixed random ones and summed modulo 2**64, where the weights are; the sums,
    names and shapes are hashed with SHA-256. Biases of zero, which some libraries add, are left out. Nothing is said of weights that wait
    elsewhere or are packed (4 or 8 bits).
    """
    found = sorted(weights, key=lambda one: one.name)
    if any(x.device.type == "meta" or (x.dim() > 1 and not x.is_floating_point()) for _, x, _ in found):
        return ()
    size: Counter[torch.dtype] = Counter()
    for _, x, _ in found:
        size[x.dtype] += x.numel()
    most = max(size, key=lambda dtype: size[dtype])
    hashes = {dtype: hashlib.sha256() for dtype in (DTYPES[DTYPES.index(most) :] if most in DTYPES else (most,))}
    with torch.no_grad():
        for name, x, after in found:
            if name.endswith("bias") and not x.any():
                continue
            for dtype, one in hashes.items():
                numbers = x.detach().to(dtype) if x.is_floating_point() else x
                numbers = numbers if after is None else after(numbers)
                one.update(f"{name} {list(numbers.shape)} ".encode())
                one.update(_sums(numbers).numpy().tobytes())
    return tuple((str(dtype).removeprefix("torch."), one.hexdigest()[:32]) for dtype, one in hashes.items())


@cache
def _words(device: torch.device) -> Tensor:
    drawn = hashlib.shake_256(b"hookbook").digest(8 * BLOCK)
    return (torch.frombuffer(bytearray(drawn), dtype=torch.int64) | 1).to(device)


def _sums(x: Tensor) -> Tensor:
    """`[blocks]`"""
    raw = x.contiguous().flatten().view(torch.uint8)
    raw = torch.nn.functional.pad(raw, (0, -len(raw) % 8)).view(torch.int64) if len(raw) % 8 else raw.view(torch.int64)
    words, sums = _words(x.device), []
    for block in raw.split(BLOCK * 8):  # what stays in a processor's cache
        mixed = (block >> 31).bitwise_xor_(block)  # a change of high bits changes low ones, which a product keeps
        n = len(mixed) // BLOCK * BLOCK
        sums.append(mixed[:n].view(-1, BLOCK).mul_(words).sum(1))
        if n < len(mixed):
            sums.append(mixed[n:].mul_(words[: len(mixed) - n]).sum()[None])
    return torch.cat(sums).cpu() if sums else torch.empty(0, dtype=torch.long)
