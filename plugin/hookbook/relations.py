"""Relations: subjects and their objects, the sentences that state them, and where in a prompt the subject is.

Those that ship are the pairs in `data/pairs` that have sentences: facts (country_capital, landmark_city, ...), words
(present_past, antonym, ...) and translations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hookbook import storage, tasks
from hookbook.errors import DataError
from hookbook.tasks import Question, Task, Template
from hookbook.tokens import Tokens, covering

SOURCE = "Hernandez et al. 2023, arXiv:2308.09124"


@dataclass(frozen=True)
class Statement(Question):
    """A question that knows where its subject is."""

    start: int
    """The subject's first character in `text`."""
    end: int
    """The character after its last."""

    def subject_at(self, tokens: Tokens) -> int:
        """The subject's last token: the last that holds one of its characters, wherever else the same text occurs."""
        return covering(tokens, self.start, self.end)[-1]


@dataclass(frozen=True)
class Relation(Task):
    """A task whose inputs are subjects and whose prompts are sentences, one on each line.

    Args:
        pairs: Subjects and their objects.
        name: What it is called.
        templates: Sentences that end where the object begins, with `{}` for the subject; the first is used.
        phrase: Words that mean the object, such as `"the capital of {}"`, to ask about it in turn.
        answer: How the object follows the sentence.

    Raises:
        DataError: As `Task`; or no template, or one without a single `{}`.

    Example:
        >>> capitals = Relation((("Peru", "Lima"), ("Cuba", "Havana")), templates=("The capital of {} is",))
        >>> capitals.ask("Cuba", capitals.pairs).text
        'The capital of Peru is Lima\\nThe capital of Cuba is'
    """

    templates: tuple[str, ...] = ()
    phrase: str = ""
    answer: str = " {}"

    def __post_init__(self) -> None:
        templates = (self.templates,) if isinstance(self.templates, str) else tuple(self.templates)
        if not templates:
            raise DataError(
                f"the relation {self.name!r} has no templates", "a subject needs a sentence", "give such as 'The capital of {} is'"
            )
        for text in (*templates, *([self.phrase] * bool(self.phrase))):
            if text.count("{}") != 1:
                raise DataError(f"the template {text!r} of {self.name!r}", "the subject is in it once", "write {} where it goes")
        object.__setattr__(self, "templates", templates)
        object.__setattr__(self, "template", Template(templates[0], self.answer, "\n", SOURCE))
        super().__post_init__()

    def with_sentence(self, template: str) -> Relation:
        """The same pairs in another sentence."""
        return replace(self, templates=(template,))

    def with_template(self, template: Template) -> Task:
        """The same pairs as a plain task."""
        return Task(self.pairs, self.name, template)

    def object_of(self, subject: str) -> str:
        """What a subject's object is; `DataError` if it is not in this relation."""
        for x, y in self.pairs:
            if x == subject:
                return y
        raise DataError(f"no subject {subject!r} in {self.name!r}", "", "use one of its pairs, or a Relation with this pair added")

    def ask(self, subject: str, shown: Sequence[tuple[str, str]] = (), answer: str = "") -> Statement:
        """A prompt about a subject, behind statements about others; pairs of the same subject are not shown.

        Args:
            subject: Any text.
            shown: Pairs to state before.
            answer: Its object; empty: the one in this relation, which must have it then.
        """
        text = self.template.prompt([pair for pair in shown if pair[0] != subject], "{}")
        start = text.rindex("{}")
        answer = self.template.answer.format(answer or self.object_of(subject))
        return Statement(text[:start] + subject + text[start + 2 :], answer, start, start + len(subject))


def names() -> list[str]:
    """The relations that ship."""
    return [name for name in tasks.names() if "templates" in tasks.data(name)]


def load(
    source: Any,
    templates: str | Sequence[str] = (),
    *,
    phrase: str = "",
    header: bool | None = None,
    columns: Sequence[str | int] | None = None,
) -> Relation:
    """A relation by name, from a file, or from pairs of any kind.

    Args:
        source: A name of `names()`; whatever else `hookbook.tasks.load` takes, of which a JSON object or a dict with `pairs` may have
            `templates` and a `phrase`; or a relation.
        templates: Sentences; none: those of the source.
        phrase: Words for the object; empty: those of the source.
        header, columns: See `hookbook.tasks.load`.

    Raises:
        DataError: No such relation, or what was found are no pairs, or there are no templates.
    """
    if isinstance(source, Relation):
        return replace(source, templates=templates or source.templates, phrase=phrase or source.phrase)
    task = tasks.load(source, header=header, columns=columns)
    found: Any = tasks.data(task.name) if isinstance(source, str) and source in names() else source
    if isinstance(source, (str, Path)) and Path(source).suffix.lower() == ".json":
        found = storage.load_json(source)
    found = found if isinstance(found, Mapping) else {}
    templates = templates or found.get("templates", ())
    return Relation(
        task.pairs,
        task.name,
        templates=(templates,) if isinstance(templates, str) else tuple(templates),
        phrase=phrase or found.get("phrase", ""),
    )
