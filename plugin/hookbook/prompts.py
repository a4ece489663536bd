"""Target prompts for patchscopes: what a state is patched into so that the model says what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hookbook.errors import TokenError
from hookbook.tokens import At, Tokens, resolve


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
            raise TokenError(f"the placeholder {self.placeholder!r} is not in the prompt", "there is no token to patch", "write it where the state should go")

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
    "cat -> cat\n1135 -> 1135\nhello -> hello\n?", "?", "Ghandeharioun et al. 2024, arXiv:2401.06102, section 4.1 (prompt of the authors' code)"
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
        raise TokenError(f"{template!r} is not a template of an attribute", "it needs exactly one {}", "write such as 'The official currency of {}'")
    return Target(template.replace("{}", placeholder), placeholder, "Ghandeharioun et al. 2024, arXiv:2401.06102, section 4.2")


def locate(target: Any, tokens: Tokens, position: Any) -> int:
    """The one token of a target prompt that is patched: `position`, or the target's placeholder, or the last token."""
    if position is None:
        return target.position(tokens) if isinstance(target, Target) else len(tokens) - 1
    found = resolve(position, tokens)
    if len(found) != 1:
        raise TokenError(f"the target position {position!r} is {len(found)} tokens", "one token is patched", "give one index or text")
    return found[0]
