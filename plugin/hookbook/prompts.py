"""Target prompts for patchscopes: what a state is patched into so that the model says what it holds; prompts that translate words; and
conversations as texts."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, NamedTuple

from hookbook.errors import DataError, TokenError
from hookbook.models.loading import wrap
from hookbook.tokens import At, Tokens, beginnings, resolve


@dataclass(frozen=True)
class Target:
    """A prompt with a placeholder, the token that a patched state replaces.

    The last occurrence of `placeholder` in `text` counts. It must be one token, and stay one in its context.
    """

    text: str
    placeholder: str
    source: str = ""
    """Where the prompt was published."""

    def __post_init__(self) -> None:
        if not self.placeholder or self.placeholder not in self.text:
            raise TokenError(
                f"the placeholder {self.placeholder!r} is not in the prompt",
                "there is no token to patch",
                "write it where the state should go",
            )

    def position(self, tokens: Tokens) -> int:
        """The index of the placeholder's token; `TokenError` if it is not one token of its own."""
        found = resolve(At(self.placeholder, "all", occurrence=-1), tokens)
        pieces = [tokens.strings[i] for i in found]
        if len(found) != 1 or pieces[0].strip() != self.placeholder.strip():
            raise TokenError(
                f"the placeholder {self.placeholder!r} is {len(found)} tokens {pieces} here",
                "one token is patched, so it must be one token of its own",
                "choose another placeholder, such as 'x' or '?'",
            )
        return found[0]


TOKEN_IDENTITY = Target(
    "cat -> cat\n1135 -> 1135\nhello -> hello\n?",
    "?",
    "Ghandeharioun et al. 2024, arXiv:2401.06102, section 4.1 (prompt of the authors' code)",
)
"""The model repeats the token that a state stands for."""

ENTITY_DESCRIPTION = Target(
    "Syria: Country in the Middle East, Leonardo DiCaprio: American actor, "
    "Samsung: South Korean multinational major appliance and consumer electronics corporation, x",
    "x",
    "Ghandeharioun et al. 2024, arXiv:2401.06102, section 4.3",
)
"""The model describes the entity that a state stands for; for generation."""


def attribute(template: str, placeholder: str = "x") -> Target:
    """A target for one attribute: a relation in words, with `{}` where the subject goes.

    Example:
        >>> attribute("The official currency of {}").text
        'The official currency of x'

    Source: Ghandeharioun et al. 2024, arXiv:2401.06102, section 4.2.
    """
    if not isinstance(template, str) or template.count("{}") != 1:
        raise TokenError(
            f"{template!r} is not a template of an attribute", "it needs exactly one {}", "write such as 'The official currency of {}'"
        )
    return Target(template.replace("{}", placeholder), placeholder, "Ghandeharioun et al. 2024, arXiv:2401.06102, section 4.2")


def locate(target: Any, tokens: Tokens, position: Any) -> int:
    """The one token of a target prompt that is patched: `position`, or the target's placeholder, or the last token."""
    if position is None:
        return target.position(tokens) if isinstance(target, Target) else len(tokens) - 1
    found = resolve(position, tokens)
    if len(found) != 1:
        raise TokenError(f"the target position {position!r} is {len(found)} tokens", "one token is patched", "give one index or text")
    return found[0]


def transcript(conversation: Sequence[Mapping[str, str]]) -> str:
    """A conversation as a text that a model without a chat template can go on with: a system message as a paragraph of its own, then `Q: `
    and `A: `; if the user spoke last, it ends with `A:`.

    Raises:
        TokenError: It is no list of messages with `role` and `content`.

    Example:
        >>> transcript([{"role": "user", "content": "What is two plus two?"}, {"role": "assistant", "content": "Four."}])
        'Q: What is two plus two?\\nA: Four.'
    """
    lines, begins = [], {"system": "", "user": "Q: ", "assistant": "A: "}
    for message in conversation:
        if not isinstance(message, Mapping) or message.get("role") not in begins or not message.get("content"):
            raise TokenError(
                f"{message!r} is no message of a conversation",
                "it needs a role (system, user or assistant) and some content",
                'write such as {"role": "user", "content": "Hello"}',
            )
        lines.append(f"{begins[message['role']]}{message['content']}" + ("\n" if message["role"] != "user" else ""))
    if not lines:
        raise TokenError("a conversation without messages", "there is nothing to go on with", "give at least one message")
    return "\n".join(lines).rstrip("\n") + ("\nA:" if conversation[-1]["role"] == "user" else "")


class Translations(NamedTuple):
    """Prompts, and words for the `languages` of `hookbook.logit_lens`."""

    prompts: tuple[str, ...]
    languages: tuple[dict[str, str], ...]
    """Of each prompt the answer, the pivot language's word, and as a control an unrelated word of the pivot language."""


def translation(model: Any, source: str, target: str, *, pivot: str = "English", shots: int = 4, seed: int = 0) -> Translations:
    """Prompts that show translations of words and ask for one more, such as `Français: "fleur" - 中文: "`, in words of our own.

    A word is left out where the model's tokens cannot tell its languages apart: where the answer and the pivot's word begin with a
    token in common, or the answer holds the pivot's word.

    Args:
        model: Any model `hookbook.wrap` takes; its tokenizer alone is used.
        source, target: Languages: English, French, German, Spanish or Chinese.
        pivot: The language in which the model may think.
        shots: How many translations are shown.
        seed: Of what is shown, and of the unrelated words.

    Raises:
        DataError: No such language, twice the same, or too few words.

    Source: Wendler et al. 2024, arXiv:2402.10588, the translation task.
    """
    data = json.loads((files("hookbook") / "data" / "languages.json").read_text(encoding="utf-8"))
    names, tokenizer, draw = data["languages"], wrap(model).tokenizer, random.Random(seed)
    for name in (source, target, pivot):
        if name not in names:
            raise DataError(f"no words in {name!r}", "", f"use {', '.join(names)}")
    if source == target:
        raise DataError(f"a translation from {source} to {target}", "nothing is translated", "use two languages")
    table = [dict(zip(names, row, strict=True)) for row in data["words"]]
    if not 0 <= shots < len(table):
        raise DataError(f"{shots} translations to show", f"there are {len(table)} words, and the one asked for is not shown", "show fewer")

    first = {word: {*beginnings(word, tokenizer)} for words in table for word in words.values()}

    def apart(word: str, other: str) -> bool:
        return word.lower() not in other.lower() and not first[word] & first[other]

    prompts, languages = [], []
    for words in table:
        others = [other for other in table if other is not words]
        shown = draw.sample(others, shots)
        asked = dict.fromkeys((target, pivot))
        unrelated = [other[pivot] for other in others if all(apart(other[pivot], words[name]) for name in asked)]
        if (pivot == target or apart(words[pivot], words[target])) and unrelated:
            lines = [f'{names[source]}: "{other[source]}" - {names[target]}: "{other[target]}"\n' for other in shown]
            prompts.append("".join(lines) + f'{names[source]}: "{words[source]}" - {names[target]}: "')
            languages.append({name: words[name] for name in asked} | {f"unrelated {pivot}": draw.choice(unrelated)})
    if not prompts:
        raise DataError(f"no words from {source} to {target}", f"this tokenizer cannot tell them from {pivot}", "use other languages")
    return Translations(tuple(prompts), tuple(languages))


def one_job(draw: str) -> list[tuple[str, str]]:
    """Twenty prompts that ship, each with a small word that may follow: `these`, `those`, `both`, `this`, `that` or `one`.

    Args:
        draw: `first` or `second`, of other prompts.

    Raises:
        DataError: There is no such draw.

    Example:
        >>> one_job("first")[7]
        ('I have two sisters, and I love them', ' both')
    """
    data = json.loads((files("hookbook") / "data" / "one_job.json").read_text(encoding="utf-8"))["prompts"]
    if draw not in data:
        raise DataError(f"no draw {draw!r}", "", f"use one of {', '.join(data)}")
    return [(one["prompt"], one["answer"]) for one in data[draw]]
