"""Two hops: does a model that knows both facts also answer the question that needs both?

A composed answer counts for little where a shortcut gives it too: the second relation asked of the entity itself, or the question without
its entity. So every question is asked in five ways, and the four cells (first hop known or not, second hop known or not) are
told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookbook.asking import pose
from hookbook.errors import DataError
from hookbook.hops import TwoHop
from hookbook.recipe import ModelCard, later, recipe, wrap
from hookbook.request import Readout, Request, Row
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.show.plots import heat_map
from hookbook.show.tidy import spelled, tidy
from hookbook.tasks import Question
from hookbook.tokens import Tokens, vocabulary

WAYS = ("composed", "first", "second", "entity_shortcut", "relation_shortcut")
"""The question itself, its two hops, the second relation of the entity, and the question without the entity."""


@dataclass(frozen=True, eq=False)
class TwoHops(Result):
    """How a model answers `n` questions in two hops, and their parts."""

    card: ModelCard
    prompts: tuple[Tokens, ...]
    """`[n]`"""
    chains: tuple[str, ...]
    """`[n]`: the two relations of each question."""
    entities: tuple[str, ...]
    """`[n]`"""
    bridges: tuple[str, ...]
    """`[n]`"""
    answers: tuple[str, ...]
    """`[n]`"""
    right: dict[str, Tensor]
    """Of each of `WAYS` `[n]`: whether it is answered."""
    token_ids: dict[str, Tensor]
    """Of each of `WAYS` `[n]`: the likeliest next token."""
    vocab: dict[int, str]
    settings: dict[str, Any]

    @property
    def shortcut(self) -> Tensor:
        """`[n]`: whether a shortcut gives the answer."""
        return self.right["entity_shortcut"] | self.right["relation_shortcut"]

    def select(
        self, *, first: bool | None = True, second: bool | None = True, composed: bool | None = None, shortcut: bool | None = None
    ) -> list[int]:
        """The numbers of the questions whose parts are answered or not, such as `select(composed=False)`: both hops are known, and the
        question is not answered. None: either way. The paper's sets leave out those with a shortcut (`shortcut=False`)."""
        asked = (
            (first, self.right["first"]),
            (second, self.right["second"]),
            (composed, self.right["composed"]),
            (shortcut, self.shortcut),
        )
        chosen = torch.ones(len(self.answers), dtype=torch.bool)
        for want, found in asked:
            chosen &= found == want if want is not None else True
        return chosen.nonzero()[:, 0].tolist()

    def cells(self, by_chain: bool = False) -> DataFrame:
        """The four cells: `first`, `second`, `n` (questions), `answered` (how many of them), `rate`, and of those without a shortcut
        `n_clean`, `answered_clean`, `rate_clean`.

        Args:
            by_chain: For each pair of relations, too.
        """
        import pandas as pd

        rows = []
        for chain in sorted(set(self.chains)) if by_chain else [None]:
            for first in (True, False):
                for second in (True, False):
                    mine = [i for i in self.select(first=first, second=second) if chain in (None, self.chains[i])]
                    row: dict[str, Any] = {"chain": chain} if by_chain else {}
                    row |= {"first": first, "second": second}
                    for name, some in (("", mine), ("_clean", [i for i in mine if not self.shortcut[i]])):
                        answered = int(self.right["composed"][some].sum())
                        row |= {
                            f"n{name}": len(some),
                            f"answered{name}": answered,
                            f"rate{name}": answered / len(some) if some else float("nan"),
                        }
                    rows.append(row)
        return pd.DataFrame(rows)

    def to_frame(self) -> DataFrame:
        """One row for each question: `chain`, `prompt`, `entity`, `bridge`, `answer`, and for each of `WAYS` whether it is answered and,
        as `said NAME`, the likeliest token."""
        questions = [*zip(self.chains, self.prompts, self.entities, self.bridges, self.answers, strict=True)]
        columns: dict[str, Any] = {}
        for way in WAYS:
            columns |= {way: self.right[way], f"said {way}": spelled(self.token_ids[way], self.vocab)}
        return tidy({"chain prompt entity bridge answer": questions}, **columns)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The four cells: the share of composed questions that are answered, and how many."""
        cells = self.cells()
        words = [f"{answered} of {n}" for answered, n in zip(cells["answered"], cells["n"], strict=True)]
        values = torch.tensor(cells["rate"].tolist()).view(2, 2)
        labels, names = (["known", "not known"], ("first hop", "second hop", "composed questions answered"))
        return heat_map(ax, values, [words[:2], words[2:]], labels, labels, names, title=f"Two hops, {self.card.model_id}")

    def view(self) -> View:
        """The cells, of all questions and of each pair of relations."""
        return View.table(self.cells(), "Composed questions, by which hops are known") + View.table(
            self.cells(by_chain=True), "Of each pair of relations"
        )


@recipe
def two_hops(model: Any, questions: Sequence[TwoHop], *, generate: int = 0, progress: bool | None = None) -> TwoHops:
    """Ask questions in two hops, their single hops and their shortcuts.

    Args:
        model: Any model `hookbook.wrap` takes.
        questions: Of `hookbook.hops`.
        generate: 0: an answer is right if its first token is the likeliest; else, as in the paper, if it is in so many greedily generated
            tokens, in any case (the paper: 10).
        progress: Show a progress bar; None: for long work only.

    Returns:
        `TwoHops`.

    Raises:
        DataError: No questions, or one that is not in two hops.
        TokenError: An answer's first token depends on how it is cut.

    Source: Biran et al. 2024, arXiv:2406.12775, sections 3 and 4. The relation shortcut is the prompt with the entity's text removed, as
        theirs.

    Differs: answers have no aliases here.

    Example:
        >>> from hookbook import hops
        >>> from hookbook.testing import toy
        >>> found = two_hops(toy(n_ctx=128), hops.chain("city_country", "country_capital", 3))
        >>> int(found.cells()["n"].sum())
        3
    """
    adapter = wrap(model)
    ways = [
        [question, question.first, question.second, question.entity_shortcut, question.relation_shortcut]
        for question in check_hops(questions)
    ]
    distinct = list(dict.fromkeys(Question(way.text, way.answer) for some in ways for way in some))
    place = {question: i for i, question in enumerate(distinct)}
    numbers = [[place[Question(way.text, way.answer)] for way in some] for some in ways]
    asked = pose(adapter, distinct, generate)
    rows = [Row(i) for i in range(len(distinct))]
    reply = adapter.run(Request(asked.prompts, rows, (), Readout(k=1), generate), progress=progress)
    ids = reply.said.topk_ids
    return TwoHops(
        card=adapter.card,
        prompts=tuple(asked.prompts[some[0]] for some in numbers),
        chains=tuple(question.chain for question in questions),
        entities=tuple(question.entity for question in questions),
        bridges=tuple(question.bridge for question in questions),
        answers=tuple(question.answer for question in questions),
        right=later(_by_way, asked.right(adapter, reply, range(len(rows))), numbers),
        token_ids=later(_by_way, ids[:, 0], numbers),
        vocab=later(vocabulary, adapter, ids),
        settings={"rule": asked.rule},
    )


def _by_way(found: Tensor, numbers: list[list[int]]) -> dict[str, Tensor]:
    return dict(zip(WAYS, found[torch.tensor(numbers)].unbind(1), strict=True))


def check_hops(questions: Sequence[Any]) -> Sequence[TwoHop]:
    """The questions; `DataError` unless they are in two hops."""
    other = [question for question in questions if not isinstance(question, TwoHop)]
    if other or not questions:
        raise DataError(f"{other[0]!r} as a question in two hops" if other else "no questions", "", "give questions of hookbook.hops")
    return questions
