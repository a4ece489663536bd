"""A bridge computes from the parts of a joint projection: they are what its fingerprint is of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.cases import Case
from tests.support.needs import marked
from tests.support.situations import asked, equal
from tests.support.tiny import build


@pytest.mark.parametrize("edited", ["the joint one", "a part"])
@pytest.mark.parametrize("name", marked(["bridge-gpt2"]))
def test_what_a_bridge_computes_from_is_what_its_fingerprint_is_of(name, edited, tiny_folder):
    """Written to in place, either changes the answers, as plain runs have them, and the fingerprint."""
    case = Case(name, build(name, tiny_folder))
    request, attention = asked(case), case.adapter.model.blocks[1].attn  # type: ignore[union-attr]
    free, before = case.adapter.run(request).said.logits, case.adapter.card
    joint: Any = attention._modules["_original_component"].c_attn
    with torch.no_grad():
        (getattr(joint, "_original_component", joint) if edited == "the joint one" else attention.q.original_component).weight.mul_(1.5)
    reply = case.adapter.run(request)
    equal(case, request, reply)
    assert (reply.said.logits - free).abs().max() > 1e-6 and not case.adapter.card.same_model(before)
