"""The published effects on the real models, beside their controls. Numbers are printed with -s."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import hookbook as hb
from tests.support.real import real

DATA = Path(__file__).parent.parent / "data"
NEWS = hb.tasks.openings("news")
PERSONS = json.loads((DATA / "persons.json").read_text())


@pytest.mark.parametrize(("name", "layer"), [("gemma-3-270m", 12), ("smollm2-135m-instruct", 23)])
def test_token_identity_beats_the_logit_lens(name, layer):
    """Section 4.1 of the paper: precision@1 over 100 news prefixes, the same layer on both sides."""
    model = real(name)
    scope = hb.patchscope(model, NEWS, source_layers=[layer])
    lens = hb.logit_lens(model, NEWS, layers=[layer])
    assert scope.precision is not None and lens.precision is not None and scope.surprisal is not None and lens.surprisal is not None
    found, baseline = float(scope.precision.float().mean()), float(lens.precision.float().mean())
    shuffled = float((scope.token_ids[:, 0, 0] == scope.source_ids.roll(37)).float().mean())
    control = float((scope.control_ids[:, 0] == scope.source_ids).float().mean())
    print(
        f"{name} layer {layer}: token identity {found:.2f}, logit lens {baseline:.2f}, shuffled sources {shuffled:.2f}, unpatched "
        f"{control:.2f}"
    )
    assert found - baseline >= 0.3
    assert shuffled <= 0.08 and control <= 0.08
    assert scope.surprisal.mean() < lens.surprisal.mean()


def described(name: str, layers: list[int]) -> tuple[list[float], list[str]]:
    """The share of persons whose description names what they are known for, by layer; and the controls."""
    scope = hb.patchscope(
        real(name), [person for person, _ in PERSONS], target=hb.prompts.ENTITY_DESCRIPTION, source_layers=layers, generate=20, k=1
    )
    hits = torch.tensor(
        [[any(word in text.lower() for word in words) for text in texts] for texts, (_, words) in zip(scope.texts, PERSONS, strict=True)]
    )
    shares = hits.float().mean(0).tolist()
    print(f"{name}: " + ", ".join(f"layer {layer} {share:.2f}" for layer, share in zip(layers, shares, strict=True)))
    return shares, list(scope.control_texts)


def test_early_layers_describe_a_person_and_late_ones_do_not():
    """Section 4.3: the entity is resolved in early layers; late states already hold the next word instead."""
    (*early, late_1, late_2), controls = described("gemma-3-270m", [2, 4, 14, 16])
    assert min(early) >= 0.75
    assert max(late_1, late_2) <= 0.3
    assert not any(word in controls[0].lower() for _, words in PERSONS for word in words)


def test_a_small_chat_model_describes_fewer_persons_and_likewise_only_early():
    early, middle, late = described("smollm2-135m-instruct", [5, 10, 22])[0]
    assert min(early, middle) >= 0.3
    assert late <= 0.1


def test_an_attribute_is_read_out_of_the_middle_of_a_sentence():
    """Section 4.2 with one template: the currency of a country that a sentence only mentions."""
    model = real("gemma-3-270m")
    target = hb.prompts.attribute("The capital city of {}")
    scope = hb.patchscope(model, "She spent a summer in France", target=target, target_layers="all", generate=6, k=1)
    control = scope.control_texts[0]
    assert any("Paris" in text for text in scope.texts[0]) and "Paris" not in control
