"""The rules of `hookbook reproduce patchscopes`, on planted texts, and the data that ships for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import hookbook as hb
from hookbook.errors import DataError
from hookbook.reproduce import patchscopes
from hookbook.reproduce.patchscopes import Setup
from hookbook.testing import toy

MODEL = toy(n_layers=9)
EARLY, LATE = (1, 2), (7, 8)


def planted(kind, early, late, control=False):
    """Descriptions that have a word of the entity for the first `early` and `late` of them; all others have none of anybody."""
    known = hb.tasks.entities(kind)

    def patchscope(model, source, *, source_layers, **more):
        assert [name for name, _ in known] == source and more["target"] is hb.prompts.ENTITY_DESCRIPTION
        found = hb.patchscope(MODEL, ["ab"] * len(source), target="cd", source_layers=source_layers, generate=1)
        said = {layer: early if layer in EARLY else late if layer in LATE else 0 for layer in source_layers}
        texts = tuple(
            tuple(f"It is {words[-1].upper()}." if i < said[layer] else "?" for layer in source_layers)
            for i, (_, words) in enumerate(known)
        )
        return replace(found, texts=texts, control_texts=tuple(words[0] if control else "?" for _, words in known))

    return patchscope


@pytest.mark.parametrize(
    ("early", "late", "control", "holds"), [(14, 4, False, "yes"), (12, 4, False, "no"), (14, 8, False, "partly"), (14, 4, True, "partly")]
)
def test_entities_are_described_early_and_not_late(monkeypatch, early, late, control, holds):
    monkeypatch.setattr(patchscopes, "KINDS", ("company",))
    monkeypatch.setattr(patchscopes, "patchscope", planted("company", early, late, control))
    results, (line,) = patchscopes.entities(MODEL, Setup(early=EARLY, late=LATE, described=0.8))
    assert line.holds == holds and line.measured == pytest.approx(early / 16) and line.controls["late"] == pytest.approx(late / 16)
    assert line.controls["unpatched"] == control and line.what == "company, layers 1 and 2" and set(results) == {"describe_company"}


def test_a_pair_is_judged_on_the_prompts_that_did_not_choose_it():
    right = torch.tensor(
        [[1.0, 0, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1]]
    )  # the first half chooses pair 0, which is right once of twice in the second
    assert patchscopes.judged(right) == pytest.approx(0.5 * (0.5 + 0.0)) and float(right.amax(1).mean()) == 1


def test_a_text_says_a_word_in_any_case():
    found = replace(
        hb.patchscope(MODEL, ["ab", "cd"], target="ef", source_layers=[0, 1], generate=1), texts=(("An APPLE pie", "x"), ("pie", "apple"))
    )
    assert patchscopes.said(found, [("apple",), ("pie", "cake")]).tolist() == [[1, 0], [1, 0]]


def test_token_identity_stands_beside_the_lens_and_other_sentences(monkeypatch):
    """On the toy no number is large; each is what its definition gives."""
    texts = ("ab", "cd", "ef", "gh")
    monkeypatch.setattr("hookbook.tasks.openings", lambda name: texts * 10)
    _, (line,) = patchscopes.identity(MODEL, Setup())
    scope, lens = hb.patchscope(MODEL, texts * 10, source_layers=[6]), hb.logit_lens(MODEL, texts * 10, layers=[6])
    assert line.what == "precision, layer 6" and line.measured == pytest.approx(float(scope.precision.double().mean()))
    assert line.controls["logit lens"] == pytest.approx(float(lens.precision.double().mean()))
    others = [float(scope.token_ids[i, 0, 0] == scope.source_ids[i - 37]) for i in range(40)]
    assert line.controls["other sentences"] == pytest.approx(sum(others) / 40)


def test_the_data_that_ships():
    news = hb.tasks.openings("news")
    assert len(set(news)) == 100 and all(len(text.split()) >= 5 for text in news)
    for kind in patchscopes.KINDS:
        known = hb.tasks.entities(kind)
        assert len(dict(known)) == len(known) >= 16 and all(words and all(word == word.lower() for word in words) for _, words in known)
        assert not [name for name, words in known if any(word in name.lower() for word in words)], "a name would describe itself"
    with pytest.raises(DataError, match="use one of person, company, country"):
        hb.tasks.entities("river")
