"""What docs/how-to/come-from-other-tools.md says of numbers, beside the real libraries."""

from __future__ import annotations

import sys
from unittest.mock import MagicMock

import pytest

import hookbook as hb
from tests.support.needs import require
from tests.support.tiny import build

PAIRS = [("I am happy", "I am sad"), ("What joy", "What grief"), ("good", "bad")]


@pytest.mark.parametrize("arch", ["gpt2", "llama", "gemma3"])
def test_steering_vectors_trains_our_contrast_vector(arch, tiny_folder, monkeypatch):
    require("steering_vectors")
    for module in ("sklearn.decomposition", "sklearn.linear_model"):  # of other ways to train
        monkeypatch.setitem(sys.modules, module, MagicMock())
    from steering_vectors import train_steering_vector

    model = build(f"bridge-{arch}", tiny_folder)
    happy, sad = (list(side) for side in zip(*PAIRS, strict=True))
    ours = hb.contrast_vector(model, happy, sad, layers=[1], held_out=0).vector(1)
    tokenizer = model.tokenizer
    theirs = train_steering_vector(model.model.original_model, tokenizer, PAIRS, layers=[1]).layer_activations[1]
    assert ours.site == hb.Site("resid_post", 1)
    assert theirs.abs().max() > 1e-3 and (ours.values - theirs).abs().max() < 1e-6 * theirs.abs().max()
