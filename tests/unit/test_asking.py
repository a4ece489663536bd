"""When an answer is right: the tokens that match it, beside how the authors compare texts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import hookbook as hb
from hookbook.asking import right_tokens
from hookbook.errors import DataError
from hookbook.tasks import Question
from hookbook.testing import ToyModel, toy
from tests.contract.test_vectors import TASK, theirs

TEXTS = ["c", "ca", "cat", " cat", "cat\nx", "cats", " cats and", "Cat", "at", "dog", "do", "d\u00f6", "", " ", "\n", "\ncat"]


class Vocabulary(list[str]):
    def batch_decode(self, ids: list[list[int]], skip_special_tokens: bool = False) -> list[str]:
        assert skip_special_tokens
        return ["".join(self[i] for i in some) for some in ids]


@pytest.mark.parametrize("match", ["exact", "prefix"])
def test_tokens_match_an_answer_as_theirs_do(match):
    answers = [" cat", "dog", "cats", "b\u00e4r", " c"]
    questions, first = [Question("", answer) for answer in answers], torch.arange(5)
    found = right_tokens(SimpleNamespace(tokenizer=Vocabulary(TEXTS)), questions, first, match)  # pyright: ignore[reportArgumentType]
    for ids, answer in zip(found.tolist(), answers, strict=True):
        want = [i for i, text in enumerate(TEXTS) if theirs(text, answer, match)]
        assert sorted(i for i in ids if i >= 0) == want
    assert (found[3] == -1).all() and (found[0] >= 0).sum() > 2
    assert right_tokens(toy(), questions, first).tolist() == [[i] for i in range(5)]


@pytest.mark.parametrize("recipe", [hb.task_vector, hb.compose, hb.function_vector, hb.known])
def test_another_way_to_match_is_refused_before_anything_runs(recipe, monkeypatch):
    adapter = toy()
    monkeypatch.setattr(ToyModel, "forward", lambda *args: pytest.fail("the model was run"))
    with pytest.raises(DataError, match="match='text'.*use first_token, exact, prefix"):
        recipe(adapter, TASK, shots=2, match="text")
