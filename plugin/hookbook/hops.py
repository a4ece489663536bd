"""Questions in two hops: chains of two relations, the single hops, and the shortcuts that reach the answer without the entity between."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hookbook import relations
from hookbook.errors import DataError, check_counts
from hookbook.relations import Relation, Statement
from hookbook.tasks import Question
from hookbook.tokens import Tokens, covering

CHAINS = tuple(
    (first, second)
    for first in ("city_country", "landmark_country", "person_country")
    for second in ("country_capital", "country_language", "country_currency")
)
"""The relations that ship and make natural questions: those whose objects are countries, and those of countries."""


@dataclass(frozen=True)
class TwoHop(Statement):
    """A question such as "The capital of the country of Lyon is": from an entity over a bridge, which the text does not name, to the
    answer.

    `start` and `end` are the phrase of the first hop ("the country of Lyon"), so that `subject_at` is the token at which the bridge can be
    known.
    """

    entity: str
    bridge: str
    chain: str
    """The two relations."""
    entity_start: int
    entity_end: int
    first: Question
    """Entity to bridge."""
    second: Question
    """Bridge to answer."""
    entity_shortcut: Question
    """The second relation of the entity itself."""
    relation_shortcut: Question
    """The question without the entity."""

    def entity_at(self, tokens: Tokens) -> tuple[int, ...]:
        """The entity's tokens."""
        return covering(tokens, self.entity_start, self.entity_end)


def chain(first: Any, second: Any, n: int | None = None, *, shots: int = 0, seed: int = 0) -> list[TwoHop]:
    """Questions of two relations, of which the first leads to subjects of the second.

    Prompts are the second relation's first template with the first one's phrase as its subject. A question is left out if its text holds
    the answer or the bridge, or if one of these holds the other.

    Args:
        first: Of entities and bridges, with a `phrase`: a relation, or whatever `hookbook.relations.load` takes.
        second: Of bridges and answers.
        n: At most so many, drawn; None: all, in the order of the first relation.
        shots: Other questions with their answers before each, and likewise before its hops and shortcuts; their bridges and answers are
            others.
        seed: Of the drawing.

    Raises:
        DataError: The first relation has no phrase, it does not lead to subjects of the second, or there are too few questions to show.

    Source: Biran et al. 2024, arXiv:2406.12775, sections 3 and 4. The questions are made of relations of our own.

    Example:
        >>> country = Relation((("Lyon", "France"),), "country", templates=("{} is in",), phrase="the country of {}")
        >>> capital = Relation((("France", "Paris"),), "capital", templates=("The capital of {} is",))
        >>> found, = chain(country, capital)
        >>> found.text, found.answer, found.first.text
        ('The capital of the country of Lyon is', ' Paris', 'The country of Lyon is')
    """
    first, second = (relations.load(source) for source in (first, second))
    if not first.phrase:
        raise DataError(
            f"the relation {first.name!r} has no phrase", "its object has to be named in another prompt", "give phrase='the country of {}'"
        )
    check_counts(0, shots=shots)
    if n is not None:
        check_counts(n=n)
    answers = dict(second.pairs)
    triples = [(entity, bridge, answers[bridge]) for entity, bridge in first.pairs if bridge in answers]
    triples = [triple for triple in triples if not _given(*triple, second.ask(first.phrase.format(triple[0]), answer=triple[2]).text)]
    if not triples:
        raise DataError(
            f"no questions of {first.name!r} and {second.name!r}",
            f"no object of the first, such as {first.pairs[0][1]!r}, is a subject of the second, such as {second.pairs[0][0]!r}, whose "
            f"answer is not told",
            "choose relations that follow each other",
        )
    draw = random.Random(f"{seed} {first.name} {second.name}")
    asked = triples if n is None or n >= len(triples) else draw.sample(triples, n)
    return [_question(first, second, triple, _shown(triples, triple, shots, draw)) for triple in asked]


def questions(n: int | None = None, *, shots: int = 0, seed: int = 0) -> list[TwoHop]:
    """Questions of all `CHAINS`: all of them, or at most so many of each; see `chain`."""
    return [question for first, second in CHAINS for question in chain(first, second, n, shots=shots, seed=seed)]


Triple = tuple[str, str, str]


def _given(entity: str, bridge: str, answer: str, text: str) -> bool:
    """Whether a question's text tells its answer or its bridge, or one of these tells the other, as Germany does German, and Mexico City
    Mexico."""
    text, bridge, answer = text.lower(), bridge.lower(), answer.lower()
    return answer in text or bridge in text or answer in bridge or bridge in answer


def _shown(triples: Sequence[Triple], asked: Triple, shots: int, draw: random.Random) -> list[Triple]:
    """Other questions; nothing of the bridge or the answer is in them, nor they in what is asked."""
    entity, bridge, answer = (text.lower() for text in asked)
    others = [triple for triple in triples if not any(told in part.lower() for part in triple for told in (entity, bridge, answer))]
    if len(others) < shots:
        raise DataError(f"{shots} questions to show", f"there are {len(others)} with another bridge and another answer", "show fewer")
    return draw.sample(others, shots)


def _question(first: Relation, second: Relation, triple: Triple, shown: Sequence[Triple]) -> TwoHop:
    entity, bridge, answer = triple
    hop = replace(first, templates=(first.phrase[:1].upper() + first.phrase[1:] + " is",))
    whole = second.ask(first.phrase.format(entity), [(first.phrase.format(e1), e3) for e1, _, e3 in shown], answer)
    start = whole.start + first.phrase.index("{}")
    return TwoHop(
        whole.text,
        whole.answer,
        whole.start,
        whole.end,
        entity=entity,
        bridge=bridge,
        chain=f"{first.name} > {second.name}",
        entity_start=start,
        entity_end=start + len(entity),
        first=hop.ask(entity, [(e1, e2) for e1, e2, _ in shown], bridge),
        second=second.ask(bridge, [(e2, e3) for _, e2, e3 in shown], answer),
        entity_shortcut=second.ask(entity, [(e1, e3) for e1, _, e3 in shown], answer),
        relation_shortcut=second.ask(
            " ".join(first.phrase.replace("{}", "").split()), [(first.phrase.format(e1), e3) for e1, _, e3 in shown], answer
        ),
    )
