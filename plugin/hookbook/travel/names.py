"""Functions of torch by name."""

import torch


def find(name):
    """What a name such as `torch.Tensor.add` names, or None."""
    found = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found
