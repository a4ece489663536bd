"""Maps between the streams of two layers or two models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hookbook.sites import Site

Map = Callable[[Tensor, Site, Site], Tensor]
"""A function of states `[n, d_source]`, where they were read and where they go, to `[n, d_target]`."""


@dataclass(frozen=True, eq=False)
class Affine:
    """The map `f(h) = h A^T + b` between the streams of two layers or two models.

    `weight` is `[d_target, d_source]`, `bias` is `[d_target]`.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, x: Tensor, y: Tensor) -> Affine:
        """Least squares from states `x` `[n, d_source]` to `y` `[n, d_target]`, with a bias, in float64."""
        ones = torch.ones(len(x), 1, dtype=torch.float64)
        solution = torch.linalg.lstsq(torch.cat([x.double().cpu(), ones], 1), y.double().cpu(), driver="gelsd").solution
        return cls(solution[:-1].T.contiguous(), solution[-1].contiguous())

    def __call__(self, x: Tensor, source: Site, target: Site) -> Tensor:
        weight, bias = self.weight.to(x.device, x.dtype), self.bias.to(x.device, x.dtype)
        return x @ weight.T + bias
