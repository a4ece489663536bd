"""Questions that recipes ask, whether answers are right (their first token is the likeliest, or their text is in what is generated), and
other questions as controls."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookbook.adapter import Adapter
from hookbook.deferred import later
from hookbook.errors import DataError, check_counts
from hookbook.recipes.vectors.task_sweep import coded
from hookbook.request import Reply
from hookbook.tasks import Question
from hookbook.tokens import Tokens, decoded


@dataclass(frozen=True)
class Asked:
    """Questions as a model sees them, and the rule for their answers."""

    questions: tuple[Question, ...]
    prompts: list[Tokens]
    answers: Tensor
    """`[n]`: the first token of each answer, as it follows its prompt."""
    generate: int
    """0: right is that token as the likeliest; else that the answer is in so many generated tokens, in any case."""

    @property
    def rule(self) -> str:
        """In words."""
        return f"answer in {self.generate} generated tokens" if self.generate else "first token"

    def right(self, adapter: Adapter, reply: Reply, numbers: Sequence[int]) -> Any:
        """Which rows of a reply, with a readout of `k=1`, are right, `[row]`, or a promise of it; `numbers` are their questions."""
        if self.generate:
            return later(_contained, adapter, reply.tokens, [self.questions[i].answer.strip() for i in numbers])
        assert reply.readout is not None
        return reply.readout.topk_ids[:, 0] == self.answers[list(numbers)]


def ask(adapter: Adapter, questions: Sequence[Question], generate: int = 0, bos: bool | None = None) -> Asked:
    """Encode questions.

    Raises:
        DataError: There are none; or a rule by text for an answer of one character, which any text may hold.
        TokenError: An answer's first token depends on how it is cut; a negative `generate`.
    """
    if not questions:
        raise DataError("no questions", "there is nothing to ask", "give at least one")
    check_counts(0, generate=generate)
    short = [question.answer for question in questions if len(question.answer.strip()) < 2]
    if generate and short:
        raise DataError(f"the answer {short[0]!r} in generated text", "so short a text is found anywhere", "use generate=0")
    return Asked(tuple(questions), *coded(adapter, questions, bos), generate)


def as_question(item: Any) -> Question:
    """A question, or a text and its answer after a space."""
    if isinstance(item, Question):
        return item
    if isinstance(item, (tuple, list)) and len(item) == 2 and all(isinstance(text, str) and text for text in item):
        text, answer = item
        return Question(text, answer if answer[0].isspace() else " " + answer)
    raise DataError(f"{item!r} is not a question", "it is a text and an answer", "give (text, answer), or a Question")


def others(questions: Sequence[Question], draw: random.Random, *facts: str) -> list[int]:
    """For each question another one that differs in all these facts: of the same two relations, if there is one.

    Raises:
        DataError: There is none.
    """
    found = []
    for question in questions:
        others = [j for j, other in enumerate(questions) if all(getattr(other, fact) != getattr(question, fact) for fact in facts)]
        alike = [j for j in others if getattr(questions[j], "chain", "") == getattr(question, "chain", "")]
        if not others:
            what = f"no other {' and '.join(facts)} than that of {question.text[-40:]!r}"
            raise DataError(what, "the control takes those of another question", "give more questions, or leave this control out")
        found.append(draw.choice(alike or others))
    return found


def _contained(adapter: Adapter, tokens: Tensor, answers: Sequence[str]) -> Tensor:
    return torch.tensor([answer.lower() in text.lower() for answer, text in zip(answers, decoded(adapter, tokens), strict=True)])
