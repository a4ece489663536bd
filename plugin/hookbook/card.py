"""What a model is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


@dataclass(frozen=True)
class ModelCard:
    """What a model is; every result carries one."""

    backend: str
    model_id: str
    architecture: str
    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    n_kv_heads: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    dtype: str
    device: str
    tokenizer: str
    """Fingerprint of the tokenizer, see `hookbook.tokens.fingerprint`."""
    remote: bool = False
    versions: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return getattr(torch, self.dtype).itemsize

    def same_model(self, other: ModelCard) -> bool:
        """Whether vectors of one mean anything in the other: the same name, whoever published it and whatever runs it."""
        return self.model_id.rsplit("/", 1)[-1].lower() == other.model_id.rsplit("/", 1)[-1].lower()

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of `packages` and of what every backend uses."""
    found = {}
    for package in ("hookbook", "torch", "transformers", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
