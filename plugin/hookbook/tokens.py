"""Prompts and positions.

`encode` is the only place where text becomes tokens. It puts the beginning-of-sequence token there exactly once or not
at all, renders chat templates on request, and keeps what it did, so that every result can show the tokens it used.

Positions are always in a prompt's own tokens, before any padding: `-1` is the last token, whatever the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

from torch import Tensor

from hookbook.errors import TokenError


@dataclass(frozen=True)
class Tokens:
    """A prompt as the model sees it."""

    text: str
    """The text, after the chat template if one was asked for; decoded from `ids` if the prompt came as ids."""
    ids: tuple[int, ...]
    strings: tuple[str, ...]
    """Each token decoded by itself."""
    offsets: tuple[tuple[int, int], ...] | None = field(default=None, repr=False)
    """Where each token's characters are in `text`; None if the prompt came as ids."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class At:
    """The tokens of a piece of text inside a prompt.

    Example: `At("Diana", "first")` is the first token that holds a character of `Diana`. Text that occurs more than
    once is ambiguous and raises, unless `occurrence` says which (0 the first, -1 the last).
    """

    text: str
    part: Literal["first", "last", "all"] = "last"
    occurrence: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise TokenError(f"{self.text!r} is not a text", "", "give a str, or an index without At")
        if self.part not in ("first", "last", "all"):
            raise TokenError(f"no part {self.part!r} of a text", "", "use 'first', 'last' or 'all'")


Position = int | str | At | slice | Sequence[int]
"""`-1` or another index; a text (its last token); an `At`; or a span: a slice, a range or a list of indices."""


def adds_bos(tokenizer: Any) -> bool:
    """Whether this tokenizer by itself puts a beginning-of-sequence token before a text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos is not None and list(tokenizer("a").input_ids)[:1] == [bos]


def encode(prompt: Any, tokenizer: Any, *, bos: bool | None = None, chat: bool = False, n_ctx: int | None = None) -> Tokens:
    """Turn a prompt into tokens.

    Args:
        prompt: A text; token ids (a list, a tensor or an array of one row), used as they are; what a tokenizer gives of one text, without
            the padding that its attention mask names; chat messages (a list of dicts with `role` and `content`; ready for the answer, or
            for the rest of it if the last one is the assistant's); or `Tokens`, returned as they are.
        tokenizer: A Hugging Face tokenizer.
        bos: True: exactly one beginning-of-sequence token; False: none is added; None: as the checkpoint's own tokenizer
            does. A text that already begins with one never gets a second.
        chat: Render a text as one user message through the tokenizer's chat template, ready for the answer.
        n_ctx: The longest prompt the model takes.

    Raises:
        TokenError: The prompt is empty, too long, or asks for a template or token the tokenizer lacks.
    """
    found = prompts_of(prompt, tokenizer)
    if len(found) != 1:
        raise TokenError(
            "the prompt is empty" if not found else f"{len(found)} prompts", "one is wanted", "give one text, or one row of ids"
        )
    (prompt,) = found
    if isinstance(prompt, Tokens):
        tokens = prompt
    elif _are_ids(prompt):
        if chat:
            raise TokenError("chat=True for token ids", "a chat template renders texts", "give a text, or leave chat off")
        tokens = _from_ids(prompt, tokenizer)
    elif isinstance(prompt, str) or (isinstance(prompt, list) and all(isinstance(m, Mapping) for m in prompt)):
        tokens = _from_text(prompt, tokenizer, bos, chat)
    else:
        raise TokenError(f"{type(prompt).__name__} is not a prompt", "", "give a text, token ids, or chat messages")
    if n_ctx is not None and len(tokens) > n_ctx:
        raise TokenError(f"the prompt {_short(tokens.text)} has {len(tokens)} tokens", f"this model reads at most {n_ctx}", "shorten it")
    return tokens


def prompts_of(given: Any, tokenizer: Any) -> list[Any]:
    """One prompt or several, as a list of what `encode` takes.

    Args:
        given: A prompt; or a list, an array, a column of a frame, or whatever gives one after the other. Also rows of ids: what a
            tokenizer gives of several texts, without the padding that its attention mask names, or a tensor of texts of one length.
        tokenizer: Says which token is padding.

    Raises:
        TokenError: A table or a mapping, of which one column is meant; rows of ids whose padding cannot be told; nothing to go through.
    """
    if isinstance(given, Mapping) and given.get("input_ids") is not None:
        return _unpadded(given, tokenizer)
    if is_table(given):
        names = list(given if isinstance(given, Mapping) else getattr(given, "column_names", None) or given.columns)
        raise TokenError(
            f"{type(given).__name__} is not a prompt",
            f"going through it gives its names {', '.join(map(repr, names[:5]))}",
            "give a list of messages" if "role" in names else f'give one column, such as df["{names[0] if names else "text"}"]',
        )
    given = _listed(given)
    if isinstance(given, (str, Tokens)):
        return [given]
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise TokenError(f"{type(given).__name__} is not a prompt", "", "give a text, token ids, chat messages, or a list of these")
    listed = [_listed(item) for item in given]
    if _are_ids(listed[:1]) or (listed and isinstance(listed[0], Mapping) and "role" in listed[0]):  # ids, or chat messages
        return [listed]
    return _unpadded({"input_ids": listed}, tokenizer) if listed and all(map(_are_ids, listed)) else listed


def _listed(given: Any) -> Any:
    """Tensors, arrays and columns as lists, also in a list."""
    if isinstance(given, (list, tuple)):
        return [_listed(item) for item in given]
    return given.tolist() if hasattr(given, "tolist") else given


def is_table(given: Any) -> bool:
    """A mapping or a frame, which is gone through by its names."""
    return isinstance(given, Mapping) or (not hasattr(given, "tolist") and (hasattr(given, "columns") or hasattr(given, "column_names")))


def _are_ids(item: Any) -> bool:
    return isinstance(item, list) and bool(item) and all(isinstance(i, Integral) and not isinstance(i, bool) for i in item)


def _unpadded(coded: Mapping, tokenizer: Any) -> list[list[int]]:
    """The rows of what a tokenizer gave, without their padding."""
    ids, mask = (
        rows if rows and isinstance(rows[0], list) else [rows]
        for rows in (_listed(coded.get(name)) for name in ("input_ids", "attention_mask"))
    )
    if mask == [None]:
        pad = getattr(tokenizer, "pad_token_id", None)
        pad = getattr(tokenizer, "eos_token_id", None) if pad is None else pad
        for row in ids if len(ids) > 1 and len({*map(len, ids)}) == 1 else ():
            row = row[row[0] == getattr(tokenizer, "bos_token_id", None) :]
            if pad in (*row[:1], *row[-1:]):
                raise TokenError(
                    f"rows of token ids, of which one begins or ends with {tokenizer.decode([pad])!r}",
                    "it may be padding",
                    "give them with their attention_mask, as the tokenizer does, or each without its padding",
                )
        return ids
    if [len(row) for row in mask] != [len(row) for row in ids]:
        raise TokenError("an attention_mask of another shape than input_ids", "it says of each token whether it is padding", "give both")
    kept = [[i for i, keep in enumerate(row) if keep] for row in mask]
    if any(at and at[-1] - at[0] >= len(at) for at in kept):
        raise TokenError("an attention_mask with a gap", "padding is before or after a text", "give the texts, and edit attn_pattern")
    return [[row[i] for i in at] for row, at in zip(ids, kept, strict=True)]


def _from_ids(ids: list[int], tokenizer: Any) -> Tokens:
    bad = [i for i in ids if not 0 <= i < len(tokenizer)]
    if bad:
        raise TokenError(f"token id {bad[0]}", f"this tokenizer has ids 0 to {len(tokenizer) - 1}", "use ids of this tokenizer")
    return Tokens(tokenizer.decode(ids), tuple(ids), tuple(tokenizer.decode([i]) for i in ids))


def _from_text(prompt: str | Sequence[dict], tokenizer: Any, bos: bool | None, chat: bool) -> Tokens:
    text: Any = prompt
    if not isinstance(prompt, str) or chat:
        if not getattr(tokenizer, "chat_template", None):
            raise TokenError(
                "a chat prompt was asked for", "this tokenizer has no chat template", "leave chat off, or set tokenizer.chat_template"
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if not messages or any(not str(m.get("content") or "").strip() for m in messages):
            raise TokenError("the prompt is empty", "a chat message has no content", "give it some")
        open_ = messages[-1].get("role") == "assistant"  # who goes on with what was said last
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not open_, continue_final_message=open_)
    if not text:
        raise TokenError("the prompt is empty", "there is no token to run the model on", "give a text of at least one character")
    if not getattr(tokenizer, "is_fast", False):
        raise TokenError(
            "this tokenizer cannot say where a token's characters are",
            "it is not a fast tokenizer",
            "load it with use_fast=True, or pass token ids",
        )
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(coded.input_ids), [tuple(span) for span in coded.offset_mapping]
    bos_id = getattr(tokenizer, "bos_token_id", None)
    if bos and bos_id is None:
        raise TokenError(
            "bos=True", "this tokenizer has no beginning-of-sequence token", "leave bos out, or write the token you want into the text"
        )
    if (adds_bos(tokenizer) if bos is None else bos) and ids[:1] != [bos_id]:
        ids, offsets = [bos_id, *ids], [(0, 0), *offsets]
    if not ids:
        raise TokenError(f"the prompt {_short(text)} has no tokens", "the tokenizer drops all of it", "give another text")
    return Tokens(text, tuple(ids), tuple(tokenizer.decode([i]) for i in ids), tuple(offsets))


def resolve(position: Position, tokens: Tokens) -> tuple[int, ...]:
    """The indices, from 0, that a position means in a prompt.

    Raises:
        TokenError: The text is not in the prompt or is there more than once; the index is outside; the span is empty.
    """
    n = len(tokens)
    if type(position) is int and -n <= position < n:  # the usual case, thousands of times in a sweep
        return (position % n,)
    if isinstance(position, str):
        position = At(position)
    if isinstance(position, At):
        return _find(position, tokens)
    if isinstance(position, slice):
        try:
            found = list(range(n))[position]
        except (TypeError, ValueError) as error:
            raise TokenError(f"{position!r} is not a span", str(error), "use whole numbers, such as slice(0, 2)") from error
    elif isinstance(position, Integral) and not isinstance(position, bool):
        found = [int(position)]
    elif isinstance(position, (list, tuple, range)) and all(isinstance(i, Integral) and not isinstance(i, bool) for i in position):
        found = [int(i) for i in position]
    else:
        raise TokenError(f"{position!r} is not a position", "", "give an index, a text, an At, a slice, or a list of indices")
    for i in found:
        if not -n <= i < n:
            raise TokenError(f"no token {i}", f"the prompt {_short(tokens.text)} has {n} tokens", f"use -{n} to {n - 1}")
    found = [i % n for i in found]
    if not found:
        raise TokenError(
            f"the span {position!r} is empty", f"the prompt {_short(tokens.text)} has {n} tokens", "give a span that holds a token"
        )
    if len(set(found)) != len(found):
        raise TokenError(f"the span {position!r} names a token twice", "", "name each token once")
    return tuple(found)


def _find(at: At, tokens: Tokens) -> tuple[int, ...]:
    if tokens.offsets is None:
        raise TokenError(
            f"cannot look for {at.text!r}", "the prompt came as token ids, without text", "give an index, or the prompt as text"
        )
    if not at.text:
        raise TokenError("the empty text is everywhere", "", "name some characters, or give an index")
    starts = [i for i in range(len(tokens.text)) if tokens.text.startswith(at.text, i)]
    if not starts:
        raise TokenError(f"{at.text!r} is not in the prompt {_short(tokens.text)}", "", "check the spelling, or give an index")
    if at.occurrence is None and len(starts) > 1:
        raise TokenError(
            f"{at.text!r} is ambiguous",
            f"it occurs {len(starts)} times in the prompt {_short(tokens.text)}",
            f"use At({at.text!r}, occurrence=0) for the first, -1 for the last, or an index",
        )
    try:
        start = starts[at.occurrence or 0]
    except IndexError:
        raise TokenError(
            f"no occurrence {at.occurrence} of {at.text!r}", f"it occurs {len(starts)} times", "use a smaller number"
        ) from None
    inside = covering(tokens, start, start + len(at.text))
    return {"first": inside[:1], "last": inside[-1:], "all": inside}[at.part]


def covering(tokens: Tokens, start: int, end: int) -> tuple[int, ...]:
    """The tokens that hold characters from `start` to before `end` of a prompt's text.

    Raises:
        TokenError: None does, or the prompt came as token ids.
    """
    if tokens.offsets is None:
        raise TokenError("characters of a prompt that came as token ids", "it has no text", "give the prompt as text")
    inside = tuple(i for i, (a, b) in enumerate(tokens.offsets) if a < end and b > start and b > a)
    if not inside:
        raise TokenError(f"no token holds {tokens.text[start:end]!r}", "the tokenizer drops these characters", "give an index")
    return inside


def answer_ids(prompt: Tokens, answer: str, tokenizer: Any) -> tuple[int, ...]:
    """The tokens `answer` has when it follows a prompt: the suffix of both tokenised together.

    Raises:
        TokenError: The answer is empty, or merges into the prompt's last token, so that it has no tokens of its own.
    """
    if prompt.offsets is None:
        ids = list(tokenizer(answer, add_special_tokens=False).input_ids)
    else:
        whole = list(tokenizer(prompt.text + answer, add_special_tokens=False).input_ids)
        alone = list(tokenizer(prompt.text, add_special_tokens=False).input_ids)
        if whole[: len(alone)] != alone:
            raise TokenError(
                f"the answer {answer!r} merges with the end of the prompt {_short(prompt.text)}",
                "the last token of the prompt changes",
                "move the space from the end of the prompt to the beginning of the answer, or pass token ids",
            )
        ids = whole[len(alone) :]
    if not ids:
        raise TokenError(f"the answer {answer!r} has no tokens", "", "give an answer of at least one token")
    return tuple(ids)


def beginnings(word: str, tokenizer: Any) -> tuple[int, ...]:
    """The tokens with which a word can begin: each that is a non-empty part of it from its first character on, alone or after a space.

    Where the first character is not one token, tokens of its first bytes count, too. Wendler et al. 2024, arXiv:2402.10588, count others;
    see `hookbook.logit_lens`.

    Raises:
        TokenError: The word is empty, or the tokenizer has neither SentencePiece's nor byte-level BPE's mark of a space.
    """
    if not isinstance(word, str) or not word.strip():
        raise TokenError(f"{word!r} is not a word", "no token begins it", "give some letters")
    if not getattr(tokenizer, "is_fast", False):
        raise TokenError("this tokenizer's tokens cannot be looked up", "it is not a fast tokenizer", "load it with use_fast=True")
    find, word = tokenizer.backend_tokenizer.token_to_id, word.strip()
    if find("▁") is not None:  # which byte-level BPE writes as three letters
        texts = [mark + word[:end].replace(" ", "▁") for mark in ("", "▁") for end in range(1, len(word) + 1)]
        texts += [f"<0x{word.encode()[0]:02X}>"] if find(word[0]) is None else []
    elif find("Ġ") is not None:
        from tokenizers.pre_tokenizers import ByteLevel

        letters = "".join(piece for piece, _ in ByteLevel(add_prefix_space=False).pre_tokenize_str(word))  # one for each byte
        first = len(word[0].encode())
        ends = [len(word[:end].encode()) for end in range(1, len(word) + 1)] + ([*range(1, first)] if find(letters[:first]) is None else [])
        texts = [mark + letters[:end] for mark in ("", "Ġ") for end in ends]
    else:
        raise TokenError("a tokenizer without a mark of spaces", "its tokens do not say where words begin", "give token ids in tokens=")
    found = tuple(i for i in map(find, texts) if i is not None)
    if not found:
        raise TokenError(f"no token begins {word!r}", "the tokenizer cannot write its first character", "give another word")
    return found


def after_instruction(tokenizer: Any) -> list[int]:
    """The tokens of a chat template that follow the instruction, as negative positions in order; for models that answer, where they decide
    what to say.

    Raises:
        TokenError: The tokenizer has no chat template, or nothing follows.
    """
    first, second = (encode(text, tokenizer, chat=True).ids[::-1] for text in ("Name a colour", "5 + 3"))
    n = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    if not n:
        raise TokenError("a chat template that ends with the instruction", "no token follows it", "use position=-1")
    return list(range(-n, 0))


_PROBE = "The quick brown fox, 1135 -> Ünïcödé; 北京 is the capital.\n\tdef f(x): return x ** 2"


def fingerprint(tokenizer: Any) -> str:
    """Twelve hex digits that tell tokenizers apart: of the vocabulary's size and of how a fixed text is cut."""
    ids = tokenizer(_PROBE, add_special_tokens=False).input_ids
    return hashlib.sha256(repr((len(tokenizer), list(ids))).encode()).hexdigest()[:12]


def _short(text: str, width: int = 40) -> str:
    return repr(text if len(text) <= width else text[: width - 1] + "…")


def vocabulary(adapter: Any, *ids: Tensor) -> dict[int, str]:
    """The text of every token id; -1 is none."""
    return {i: adapter.tokenizer.decode([i]) for i in sorted({i for some in ids for i in some.flatten().tolist()}) if i >= 0}


def words(adapter: Any, ids: Tensor) -> tuple[str, ...]:
    """The text of each token id, `[n]`."""
    return tuple(adapter.tokenizer.decode([i]) for i in ids.tolist())


def decoded(adapter: Any, tokens: Tensor) -> tuple[str, ...]:
    """The text of each row of tokens `[n, steps]`; -1 is none."""
    return tuple(adapter.tokenizer.decode([i for i in line if i >= 0]) for line in tokens.tolist())


def lines(tokens: Tensor, values: Tensor) -> tuple[tuple[Any, ...], ...]:
    """The values of each row of tokens `[n, steps]` up to its end; -1 is none."""
    return tuple(
        tuple(x for x, i in zip(line, ids, strict=True) if i >= 0) for line, ids in zip(values.tolist(), tokens.tolist(), strict=True)
    )
