"""What a model is."""

from __future__ import annotations

import re
import warnings
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
    weights: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Fingerprints of the weights, by dtype, see `hookbook.engine.weights`; nothing is known of those on a server."""
    versions: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return getattr(torch, self.dtype).itemsize

    def same_model(self, other: ModelCard) -> bool:
        """Whether vectors of one mean anything in the other: the same weights, whatever runs them and in whatever dtype. Where they are not
        known, the same name, whoever published it."""
        mine, theirs = dict(self.weights), dict(other.weights)
        both = [dtype for dtype in mine if dtype in theirs]
        if both:
            return mine[both[0]] == theirs[both[0]]
        return _name(self.model_id) == _name(other.model_id)

    def unlike(self, other: ModelCard) -> str:
        """Why vectors of one mean nothing in the other, or nothing."""
        if self.same_model(other):
            if (self.remote or other.remote) and self.weights != other.weights:
                warnings.warn(f"vectors of {self.model_id} go by its name: the weights on a server are not seen", stacklevel=3)
            return ""
        return "they have other weights" if self.model_id == other.model_id else "they are different spaces"

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def _name(model_id: str) -> str:
    """Without who published it, and without what tells conversions of a package's model apart (`hookbook.models.packages`)."""
    return re.sub(r"-[0-9a-f]{12}$", "", model_id.rsplit("/", 1)[-1].lower())


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of `packages` and of what every backend uses."""
    found = {}
    for package in ("hookbook", "torch", "transformers", *packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
