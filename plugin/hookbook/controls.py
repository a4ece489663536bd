"""Controls that recipes share: noise as long as what it stands beside, and other questions.

What is drawn depends on the seed alone. Where several things are drawn, each recipe says which seed each has, so that published numbers
stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from hookbook.errors import DataError
from hookbook.tasks import Question


def noise(*shape: int, seed: int) -> Tensor:
    """Normal random numbers of a shape, in float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_like(values: Tensor, seed: int, *, whole: bool = False) -> Tensor:
    """Noise as long as `values` `[..., width]`.

    Args:
        seed: One for all of it.
        whole: Its norm as a whole is that of `values`, whose dtype it has; otherwise each vector is as long as its own.

    Example:
        >>> random_like(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), seed=0).norm(dim=-1).tolist()
        [5.0, 1.0]
    """
    drawn = noise(*values.shape, seed=seed)
    if whole:
        drawn = drawn.to(values.dtype)
        return drawn * (values.norm() / drawn.norm())
    return drawn / drawn.norm(dim=-1, keepdim=True) * values.norm(dim=-1, keepdim=True)


def other_questions(questions: Sequence[Question], draw: random.Random, *facts: str) -> list[int]:
    """For each question the number of another one that differs in all these facts: of the same two relations, if there is one.

    Raises:
        DataError: There is none.
    """
    chosen = []
    for question in questions:
        others = [j for j, other in enumerate(questions) if all(getattr(other, fact) != getattr(question, fact) for fact in facts)]
        alike = [j for j in others if getattr(questions[j], "chain", "") == getattr(question, "chain", "")]
        if not others:
            what = f"no other {' and '.join(facts)} than that of {question.text[-40:]!r}"
            raise DataError(what, "the control takes those of another question", "give more questions, or leave this control out")
        chosen.append(draw.choice(alike or others))
    return chosen


def check_controls(controls: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """Which controls to run, each once.

    Raises:
        DataError: One that is not known, or a text in place of a list.
    """
    if isinstance(controls, str) or not set(controls) <= set(known):
        raise DataError(f"controls={controls!r}", "", f"give a list of some of {', '.join(known)}")
    return tuple(dict.fromkeys(controls))
