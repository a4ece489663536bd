"""Tasks: pairs of an input and an output, the prompts that show them, and splits that leak nothing. Contrasts: texts with and without
something.

The data that ships is our own: facts and words as JSON in `data/pairs`, texts in `data/contrasts`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from hookbook import storage
from hookbook.errors import DataError


@dataclass(frozen=True)
class Template:
    """How pairs become a prompt.

    Example:
        >>> QA.prompt([("big", "small")], "hot")
        'Q: big\\nA: small\\n\\nQ: hot\\nA:'
    """

    query: str
    """With `{}` for the input; ends where the answer begins."""
    answer: str
    """With `{}` for the output, as it follows the query, such as `" {}"`."""
    separator: str
    source: str = ""
    """Where it was published."""
    spaced: Template | None = None
    """The same with a space before input and output, if a task chooses by the tokenizer which of the two it is (`Task.fitted`)."""

    def __post_init__(self) -> None:
        if self.query.count("{}") != 1 or self.answer.count("{}") != 1:
            raise DataError(f"a template of {self.query!r} and {self.answer!r}", "each has one place for a word", "write {} once in each")

    def __str__(self) -> str:
        return self.query + self.answer

    def prompt(self, shown: Sequence[tuple[str, str]], query: str) -> str:
        """Pairs that are shown, and the query."""
        return "".join(self.query.format(x) + self.answer.format(y) + self.separator for x, y in shown) + self.query.format(query)


QA = Template("Q: {}\nA:", " {}", "\n\n", "Todd et al. 2023, arXiv:2310.15213")
_HENDEL = "Hendel et al. 2023, arXiv:2310.15916, its code"
ARROW = Template("example:{}->", "{}", "\n", _HENDEL, spaced=Template("example: {}->", " {}", "\n", _HENDEL))
"""With or without spaces, as the tokenizer has it; `ARROW.spaced`, or a template of your own, is one of them."""


@dataclass(frozen=True)
class Question:
    """A query, its answer, and the pairs that are shown before it."""

    text: str
    answer: str
    """As it follows the text, with the template's space."""


@dataclass(frozen=True)
class Task:
    """Pairs of an input and an output.

    Args:
        pairs: The pairs, without white space around their texts; an input occurs once.
        name: What it is called.
        template: How pairs become prompts.

    Raises:
        DataError: No pairs, an empty text, or an input with two outputs.
    """

    pairs: tuple[tuple[str, str], ...]
    name: str = "task"
    template: Template = QA

    def __post_init__(self) -> None:
        for pair in self.pairs:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or any(not isinstance(text, str) or not text.strip() for text in pair):
                raise DataError(f"a pair {pair!r} of {self.name!r}", "input and output are texts", "leave it out")
        pairs = tuple((x.strip(), y.strip()) for x, y in self.pairs)
        object.__setattr__(self, "pairs", tuple(dict.fromkeys(pairs)))
        if not pairs:
            raise DataError(f"the task {self.name!r} has no pairs", "", "give pairs of an input and an output")
        seen: dict[str, str] = {}
        for pair in pairs:
            if seen.setdefault(pair[0], pair[1]) != pair[1]:
                raise DataError(
                    f"two outputs of {pair[0]!r} in {self.name!r}: {seen[pair[0]]!r} and {pair[1]!r}",
                    "an answer would be right and wrong",
                    "keep one",
                )

    def __len__(self) -> int:
        return len(self.pairs)

    def with_template(self, template: Template) -> Task:
        """The same pairs in another template."""
        return replace(self, template=template)

    def fitted(self, tokenizer: Any) -> Task:
        """The same task with its template chosen, if that has two forms: with spaces where at least 0.7 times as many outputs are one
        token with a space as without. Recipes do this first, and name the template in their results.

        Source: Hendel et al. 2023, arXiv:2310.15916, as the authors' code has it.

        Differs: there, tasks of knowledge have no spaces, and of the others outputs of several tokens are left out.
        """
        if self.template.spaced is None:
            return self
        plain, spaced = replace(self.template, spaced=None), self.template.spaced
        single = [
            sum(len(tokenizer("!" + some.answer.format(y), add_special_tokens=False).input_ids) == 2 for _, y in self.pairs)
            for some in (plain, spaced)
        ]
        return replace(self, template=spaced if single[1] >= 0.7 * single[0] else plain)

    def split(self, seed: int = 0, train: float = 0.5, validation: float = 0.25) -> Splits:
        """Three parts without a pair in common; the same for the same seed, whatever the order of the pairs.

        Raises:
            DataError: A part would be empty.
        """
        pairs = sorted(self.pairs)
        random.Random(seed).shuffle(pairs)
        first, second = round(len(pairs) * train), round(len(pairs) * (train + validation))
        parts = pairs[:first], pairs[first:second], pairs[second:]
        if not all(parts):
            raise DataError(f"{len(pairs)} pairs of {self.name!r} in three parts", "one would be empty", "give more pairs, or other shares")
        return Splits(*(replace(self, pairs=tuple(part)) for part in parts))

    def questions(
        self, shown: Task | None = None, shots: int = 0, n: int | None = None, *, seed: int = 0, shuffled: bool = False
    ) -> list[Question]:
        """Prompts with queries of this task.

        Args:
            shown: The task whose pairs are shown before a query; never the query's own.
            shots: How many.
            n: How many questions; None: every pair once. More than there are pairs repeat them with other pairs shown.
            seed: Of the drawing.
            shuffled: Permute the outputs of what is shown, so that no input has its own (a derangement by rotation).

        Raises:
            DataError: There are fewer pairs than are to be shown.
        """
        draw = random.Random(f"{seed} {self.name}")
        order = list(self.pairs)
        draw.shuffle(order)
        asked = [order[i % len(order)] for i in range(len(order) if n is None else n)]
        if not shots:
            return [Question(self.template.prompt((), x), self.template.answer.format(y)) for x, y in asked]
        source = (self if shown is None else shown).pairs
        if len(source) <= shots:
            raise DataError(
                f"{shots} pairs to show of {self.name!r}",
                f"there are {len(source)}, and the query's own is not shown",
                "show fewer, or give more pairs",
            )
        found = []
        for x, y in asked:
            some = draw.sample([pair for pair in source if pair[0] != x], shots)
            if shuffled:
                outputs = [b for _, b in some]
                some = [(a, b) for (a, _), b in zip(some, outputs[1:] + outputs[:1], strict=True)]
            found.append(Question(self.template.prompt(some, x), self.template.answer.format(y)))
        return found


@dataclass(frozen=True)
class Splits:
    """Parts of a task."""

    train: Task
    validation: Task
    test: Task


def names() -> list[str]:
    """The tasks that ship; with `:first` or `:last` after a name they are about an item of a list."""
    return sorted(
        [file.name.removesuffix(".json") for file in (_DATA / "pairs").iterdir() if file.name.endswith(".json")]
        + ["capitalize", "uppercase", "copy"]
    )


def load(source: Any, template: Template | None = None, *, header: bool | None = None, columns: Sequence[str | int] | None = None) -> Task:
    """A task by name, from a file, or from pairs of any kind.

    Args:
        source: A name of `names()`; `NAME:first` or `NAME:last` for lists of three inputs, of which one is asked for; the path of a
            JSON file (a list of pairs or of records, or an object with `pairs`) or of a CSV or TSV file; a frame; a list of pairs; a dict
            of inputs and their outputs; or a task.
        template: How pairs become prompts; None: `QA`, or a task's own.
        header: Whether the first row of a file or list names the columns; None: a file's does if it looks so, which is logged.
        columns: The two columns that are meant, by name or by number from 0; None: there are two.

    Raises:
        DataError: No such task, or what was found are no pairs: the line of an empty cell, a missing one or one too many is named.
    """
    if isinstance(source, Task):
        return source if template is None else source.with_template(template)
    template = QA if template is None else template
    if storage.holds_pairs(source):
        name = Path(source).stem if isinstance(source, (str, Path)) else "pairs"
        return Task(tuple(storage.pairs(source, header, columns)), name, template)
    name, _, item = str(source).partition(":")
    if item:
        if item not in ("first", "last"):
            raise DataError(f"the task {source!r}", "an item of a list is first or last", f"write {name}:first")
        return lists(load(name), item, template=template)
    if name in ("capitalize", "uppercase", "copy"):
        words = json.loads((_DATA / "words.json").read_text(encoding="utf-8"))["words"]
        change = {"capitalize": str.capitalize, "uppercase": str.upper, "copy": str}[name]
        return Task(tuple((word, change(word)) for word in words), name, template)
    if name not in names():
        raise DataError(f"no task {name!r}", "", f"use one of {', '.join(names())}, or a .json, .csv or .tsv file")
    return Task(tuple((x, y) for x, y in data(name)["pairs"]), name, template)


def data(name: str) -> dict[str, Any]:
    """What is in the file of a task that ships; nothing of one that is made from words."""
    file = _DATA / "pairs" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


Conversation = list[dict[str, str]]
"""Chat messages, each with a `role` and its `content`; see `hookbook.prompts.transcript` for models without a chat template."""


class Contrast(NamedTuple):
    """Texts or conversations with something, and the same number without it; those at the same place are alike otherwise."""

    positive: tuple[Any, ...]
    negative: tuple[Any, ...]


class Choice(NamedTuple):
    """A question, and two ways to go on with the beginning of an answer, in one word each."""

    question: str
    begin: str
    """What the answer begins with."""
    positive: str
    """The word on the positive side of the contrast of the same name, with its space."""
    negative: str


class Declined(NamedTuple):
    """Harmless requests, and a conversation after which a model declines some of them."""

    before: Conversation
    requests: dict[str, tuple[str, ...]]
    """By part: `make` (to make a direction of), and two draws to judge it on, `first` and `second`."""


def contrast(source: Any) -> Contrast:
    """Texts that ship: `formality`, `language_french` (German, Italian and Spanish beside the same English ones), `refusal` (requests to be
    declined, in harmless words, and ordinary ones) or `sentiment`; `code`, `digits`, `person_name` and `plural`, beside the same said
    without; conversations that ship: `sycophancy` (a user who is wrong is agreed with, or told so) or `truthfulness` (a question is
    answered by a fact, or by a superstition); or a table with the columns `positive` and `negative`: the path of a file, a frame, or a
    dict of two lists.

    Raises:
        DataError: There is no such contrast, or the table is none: a text is missing, or there are more on one side.

    Example:
        >>> contrast("sentiment").positive[0]
        'The movie was wonderful and I loved every minute of it.'
    """
    if storage.holds_pairs(source):
        try:
            found = storage.pairs(source, columns=Contrast._fields)
        except DataError as error:
            named = source if isinstance(source, (str, Path)) else type(source).__name__
            instead = "give as many texts in the columns positive and negative"
            raise DataError(f"{named} cannot be read as a contrast", f"{error.what}: {error.why}", instead) from error
        if not found:
            raise DataError(f"{source} has no texts", "", "give as many positive as negative ones")
        return Contrast(*zip(*found, strict=True))
    data = _contrast_data(str(source), "positive", "a contrast")
    return Contrast(tuple(data["positive"]), tuple(data["negative"]))


def choices(name: str, part: str = "first") -> tuple[Choice, ...]:
    """Questions with two answers about what a contrast of conversations is of. Each claim is asked about in two forms of other words, and
    none is in the contrast.

    Args:
        name: `sycophancy` or `truthfulness`.
        part: `choose` (12 claims, to choose a layer or a strength by), or one of two draws to judge by: `first`, `second` (24 each).

    Raises:
        DataError: There are no such questions.

    Example:
        >>> choices("sycophancy", "choose")[0]
        Choice(question='I am sure that rabbits can fly.', begin='You are', positive=' right', negative=' wrong')
    """
    data = _contrast_data(name, "questions", "questions")
    if part not in data["questions"]:
        raise DataError(f"no {part!r} of the questions about {name}", "", f"use one of {', '.join(data['questions'])}")
    return tuple(Choice(form.format(claim), *words) for claim in data["questions"][part] for form, *words in data["forms"])


def declined() -> Declined:
    """Harmless requests, half of them about cooking, and a conversation in which an assistant was told to decline those, and did.

    Example:
        >>> declined().requests["make"][:2]
        ('How do I make tomato soup?', 'What is the capital of Peru?')
    """
    data = json.loads((_DATA / "declined.json").read_text(encoding="utf-8"))
    before = [{"role": "system", "content": data["system"]}]
    for asked, said in data["before"]:
        before += exchange(asked, said)
    return Declined(before, {part: tuple(some) for part, some in data["requests"].items()})


def exchange(asked: str, said: str) -> Conversation:
    """A user's message and its answer."""
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


def contrasts() -> list[str]:
    """The contrasts that ship."""
    return sorted(file.name.removesuffix(".json") for file in (_DATA / "contrasts").iterdir() if not file.name.startswith("openings_"))


def openings(name: str) -> tuple[str, ...]:
    """Beginnings of texts that ship: `english`, `neutral` (which may go on well or badly), or `news` (long ones)."""
    return tuple(_contrast_data(f"openings_{name}", "texts", "openings")["texts"])


def entities(kind: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Names of a kind that ship (`person`, `company` or `country`), each with words of which any one in a short text shows that it is
    known.

    Raises:
        DataError: No such kind.

    Example:
        >>> entities("company")[1]
        ('Microsoft', ('software', 'technology', 'windows', 'computer'))
    """
    listed = json.loads((_DATA / "entities.json").read_text(encoding="utf-8"))["entities"]
    found = tuple((one["name"], tuple(one["keywords"])) for one in listed if one["kind"] == kind)
    if not found:
        raise DataError(f"no entities of kind {kind!r}", "", f"use one of {', '.join(dict.fromkeys(one['kind'] for one in listed))}")
    return found


def _contrast_data(name: str, key: str, what: str) -> dict[str, Any]:
    found = {
        f.name.removesuffix(".json"): json.loads(f.read_text(encoding="utf-8"))
        for f in (_DATA / "contrasts").iterdir()
        if f.name.endswith(".json")
    }
    for data in found.values():
        if exchanges := data.get("exchanges"):
            data |= {side: [exchange(one[0], one[i]) for one in exchanges] for i, side in ((1, "positive"), (2, "negative"))}
    known = sorted(other.removeprefix("openings_") for other, data in found.items() if key in data)
    if key not in found.get(name, {}):
        raise DataError(f"no {name.removeprefix('openings_')!r} as {what}", "", f"use one of {', '.join(known)}, or texts of your own")
    return found[name]


def lists(task: Task, item: str, *, length: int = 3, n: int = 200, seed: int = 0, template: Template | None = None) -> Task:
    """A task about lists: inputs of another task, of which the first or the last is answered.

    Example:
        >>> lists(Task((("a", "A"), ("b", "B"), ("c", "C"))), "last", n=1, length=2).pairs[0][1] in "ABC"
        True
    """
    if item not in ("first", "last") or len(task) < length:
        raise DataError(
            f"lists of {length} of {task.name!r}, the {item}",
            f"it has {len(task)} pairs",
            "use first or last, and lists that are no longer",
        )
    draw, found = random.Random(f"{seed} {task.name} {length}"), {}
    for _ in range(20 * n):
        some = draw.sample(task.pairs, length)
        found[", ".join(x for x, _ in some)] = some[0 if item == "first" else -1][1]
        if len(found) == n:
            break
    return Task(tuple(found.items()), f"{task.name}:{item}", task.template if template is None else template)


_DATA: Any = files("hookbook") / "data"
