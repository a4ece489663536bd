"""What recipes ask of a model: prompts, words whose probability is wanted, and questions whose answers are right or not.

An answer counts by its first token as it follows its prompt, so that what is cut into tokens is the text that the model reads; or by its
text, in the likeliest token or in what is generated.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from hookbook.deferred import later
from hookbook.engine import planning
from hookbook.errors import DataError, TokenError, check_counts
from hookbook.reply import Reading, Reply
from hookbook.request import Each, Edit, Read, Readout, Request, Row, check_one_token
from hookbook.sites import Site
from hookbook.tasks import Question
from hookbook.tokens import Position, Tokens, answer_ids, decoded, prompts_of, resolve

if TYPE_CHECKING:
    from hookbook.adapter import Adapter


logger = logging.getLogger(__name__)


def encode_prompts(adapter: Adapter, prompts: Any, bos: bool | None = None, chat: bool = False) -> list[Tokens]:
    """One prompt or several, see `hookbook.tokens.prompts_of`, as tokens; `bos` and `chat` as `hookbook.tokens.encode` takes them.

    Raises:
        TokenError: There are none, or one cannot be encoded; or a table, of which one column is meant.
    """
    listed = prompts_of(prompts, adapter.tokenizer)
    if not listed:
        raise TokenError("no source prompts", "there is nothing to read", "give at least one")
    return [adapter.encode(prompt, bos=bos, chat=chat) for prompt in listed]


def one_token(position: Position, prompt: Tokens) -> int:
    """The index of the one token that a position means in a prompt.

    Raises:
        TokenError: It means several, or none.
    """
    at = resolve(position, prompt)
    if len(at) != 1:
        raise TokenError(
            f"the position {position!r} is {len(at)} tokens",
            "it is to be one of each prompt",
            "give one index, or a text's first or last token",
        )
    return at[0]


def wanted_id(adapter: Adapter, prompt: Tokens, word: str | int, after: int = -1) -> int:
    """The one token of a word as it follows a prompt up to a token; an id is taken as it is.

    Raises:
        TokenError: The word is several tokens or none, or changes how the prompt is cut; or there is no such id.
    """
    if not isinstance(word, str):
        if not isinstance(word, Integral) or isinstance(word, bool):
            raise TokenError(f"{word!r} where a word is wanted", "it is neither a text nor a token's id", "give one of them")
        number = int(word)
        if not 0 <= number < adapter.card.d_vocab:
            raise TokenError(f"token id {number}", f"the vocabulary has ids 0 to {adapter.card.d_vocab - 1}", "use one of them")
        return number
    if prompt.offsets is not None and after not in (-1, len(prompt) - 1):
        prompt = replace(prompt, text=prompt.text[: prompt.offsets[after][1]])
    return check_one_token(answer_ids(prompt, word, adapter.tokenizer), repr(word), adapter.tokenizer)


def wanted_ids(adapter: Adapter, prompts: Sequence[Tokens], words: Sequence[str | int], after: Sequence[int] | None = None) -> Tensor:
    """The ids `[prompt, word]` of words as they follow each prompt, up to the token `after` of it; None: its last.

    Raises:
        TokenError: As `wanted_id`; or the words are one text, not a list.
    """
    if isinstance(words, str):
        raise TokenError(f"tokens={words!r}", "tokens is a list of texts or ids", f"write tokens=[{words!r}]")
    ends = after or [-1] * len(prompts)
    ids = [[wanted_id(adapter, prompt, word, end) for word in words] for prompt, end in zip(prompts, ends, strict=True)]
    return torch.tensor(ids, dtype=torch.long).view(len(prompts), len(words))


def wanted_words(adapter: Adapter, words: Sequence[str | int]) -> tuple[str, ...]:
    """Words and ids that were asked for, as texts; an id whose text is another's, too, is named beside it."""
    texts = [word if isinstance(word, str) else adapter.tokenizer.decode([word]) for word in words]
    same: dict[str, set[str | int]] = {}
    for text, word in zip(texts, words, strict=True):
        same.setdefault(text, set()).add(word)
    named = zip(texts, words, strict=True)
    return tuple(text if isinstance(word, str) or len(same[text]) == 1 else f"{text} ({word})" for text, word in named)


def answers_asked(adapter: Adapter, prompts: Sequence[Tokens], answer: Any, other: Any = None) -> tuple[Tensor, list[tuple[str, ...]]]:
    """An answer to each prompt and perhaps another one to compare with: ids `[prompt, 1 or 2]`, and texts, `[prompt]` of each.

    Args:
        answer, other: A text as it follows the prompts, or an id; or one for each prompt. No `other`: nothing to compare with.

    Raises:
        DataError: As many answers as there are no prompts.
        TokenError: As `wanted_ids`.
    """
    if answer is None:
        raise TokenError("no answer", "there is nothing to measure", "give a text as it follows the prompts, or a token's id")
    n, given = len(prompts), []
    for words, what in ((answer, "answer"), (other, "other")):
        if words is not None:
            given.append([words] * n if isinstance(words, (str, Integral)) else list(words))
            if len(given[-1]) != n:
                raise DataError(f"{what}s: {len(given[-1])} for {n} prompts", "each prompt has its own", "give one, or one for each prompt")
    ids = torch.cat([wanted_ids(adapter, [prompt], words) for prompt, *words in zip(prompts, *given, strict=True)])
    return ids, [wanted_words(adapter, words) for words in given]


def above(values: Tensor) -> Tensor:
    """Of `[row, 1 or 2]` numbers the first, less the second if there is one."""
    return values[:, 0] if values.shape[1] == 1 else values[:, 0] - values[:, 1]


def gradients(
    adapter: Adapter,
    prompts: Sequence[Tokens],
    where: Sequence[Sequence[int]],
    sites: Sequence[Site],
    ask: Callable[[list[int]], Readout],
    measure: Callable[[Reply], Tensor],
    *,
    beside: Sequence[Site] = (),
    before: Sequence[tuple[Edit, ...]] | None = None,
    progress: bool | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A number of each prompt, and its gradients with respect to sites, by one backward pass for as many prompts as fit into memory.

    Args:
        where: The tokens of each prompt, `t` in all.
        sites: Whole ones, with respect to which.
        ask: The readout of some prompts, by their numbers.
        measure: Of a reply of some prompts the number of each, `[row]`.
        beside: Further sites to read at these tokens.
        before: Edits of each prompt's run; None: none. The same prompt may be there often, with other edits.

    Returns:
        The numbers `[prompt]`; of `sites` and `beside` the values `[t, width]`; of `sites` the gradients `[t, width]`.
    """
    widths = [site.width(adapter.card) for site in sites]

    def request(numbers: list[int], lines: Sequence[Tensor]) -> Request:
        different = {prompt: at for at, prompt in enumerate(dict.fromkeys(prompts[i] for i in numbers))}
        rows = [
            Row(
                different[prompts[i]],
                (
                    *(() if before is None else before[i]),
                    *(Edit(site, value, "add", list(where[i])) for site, value in zip(sites, line.split(widths, -1), strict=True)),
                ),
            )
            for i, line in zip(numbers, lines, strict=True)
        ]
        each = Each(tuple(list(where[i]) for i in numbers))
        reads = [Read(site, each) for site in (*sites, *beside)]
        return Request([*different], rows, reads, ask(numbers), grad=True)

    every = list(range(len(prompts)))
    found: dict[int, Any] = {}
    for part in planning.plan(adapter, request(every, [torch.zeros(len(some), sum(widths)) for some in where])):
        numbers = [row.number for row in part.rows]
        sizes = [len(where[i]) for i in numbers]
        leaf = adapter.leaf(1, sum(sizes) * sum(widths))
        reply = adapter.run(request(numbers, leaf.reshape(-1, sum(widths)).split(sizes)), progress=progress)
        measured = measure(reply)
        slopes = adapter.gradient(measured.sum(), leaf).reshape(-1, sum(widths)).cpu().split(widths, -1)
        values = [reading.values.detach().cpu() for reading in reply.readings]
        parts = [x.split(sizes) for x in (*values, *slopes)]
        found.update(zip(numbers, zip(measured.detach()[:, None].unbind(0), *parts, strict=True), strict=True))
        del reply, measured
    numbers_of, *columns = (torch.cat(column) for column in zip(*(found[i] for i in every), strict=True))
    n = len(sites) + len(beside)
    return numbers_of, columns[:n], columns[n:]


def check_asked(
    adapter: Adapter, prompts: Sequence[Tokens], words: Sequence[str | int], k: int, generate: int, after: Sequence[int] | None = None
) -> Tensor:
    """What is asked after each prompt, checked; the ids `[prompt, word]` of the words, see `wanted_ids`.

    Args:
        k: How many of the likeliest tokens.
        generate: How many tokens to decode.

    Raises:
        DataError: A number that makes no sense.
        TokenError: As `wanted_ids`; or a prompt is too long to decode so many tokens.
    """
    check_counts(k=k)
    check_counts(0, generate=generate)
    longest = max(map(len, prompts))
    if adapter.card.n_ctx and longest + generate > adapter.card.n_ctx:
        raise TokenError(
            f"{longest} tokens and {generate} to decode",
            f"this model reads at most {adapter.card.n_ctx}",
            "shorten the target or decode less",
        )
    return wanted_ids(adapter, prompts, words, after)


def encode_questions(adapter: Adapter, questions: Sequence[Question], bos: bool | None = None) -> tuple[list[Tokens], Tensor]:
    """Prompts, and the first token `[n]` of each answer as it follows its prompt. That all begin with one token is logged.

    Raises:
        TokenError: An answer changes how its prompt is cut into tokens, or has none.
    """
    prompts = [adapter.encode(question.text, bos=bos) for question in questions]
    answers = [answer_ids(prompt, question.answer, adapter.tokenizer)[0] for prompt, question in zip(prompts, questions, strict=True)]
    if len({prompt.ids for prompt in prompts}) > 1 and len({*answers}) == 1:
        said = adapter.tokenizer.decode(answers[:1])
        logger.warning("all %d answers begin with the token %r: whatever says it is right, of every question", len(answers), said)
    return prompts, torch.tensor(answers)


Match = Literal["first_token", "exact", "prefix"]


def check_match(match: str) -> None:
    """Raise `DataError` unless it is a way to match an answer."""
    if match not in get_args(Match):
        raise DataError(f"match={match!r}", "", f"use {', '.join(get_args(Match))}")


def right_tokens(adapter: Adapter, questions: Sequence[Question], answers: Tensor, match: Match = "first_token") -> Tensor:
    """The tokens `[n, most]` that are right as the likeliest one after each question; -1 is none.

    Args:
        questions: With their answers.
        answers: `[n]`: the first token of each answer.
        match: `first_token`: that token. `exact`: those whose text is the whole answer, so that one of several tokens is never right;
            `prefix`: those whose text begins the answer, be it one letter, or is begun by it. Texts are compared without white space
            around them, and end where a line ends.

    Source: texts as in Hendel et al. 2023, arXiv:2310.15916, as the authors' code has it, which takes prefixes for tasks of knowledge.
    """
    check_match(match)
    if match == "first_token":
        return answers[:, None]
    ids: dict[str, list[int]] = {}
    for i, text in enumerate(adapter.tokenizer.batch_decode([[i] for i in range(len(adapter.tokenizer))], skip_special_tokens=True)):
        ids.setdefault(text.partition("\n")[0].strip(), []).append(i)
    ids.pop("", None)
    texts, found = sorted(ids), []
    for answer in (question.answer.strip() for question in questions):
        some = [answer]
        if match == "prefix":
            some = [answer[:end] for end in range(1, len(answer))]
            some += texts[bisect_left(texts, answer) : bisect_left(texts, answer + chr(0x10FFFF))]
        found.append([i for text in some for i in ids.get(text, ())])
    most = max(map(len, found), default=0)
    return torch.tensor([some + [-1] * (most - len(some)) for some in found], dtype=torch.long).view(len(found), most)


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
        return reply.said.topk_ids[:, 0] == self.answers[list(numbers)]


def pose(adapter: Adapter, questions: Sequence[Question], generate: int = 0, bos: bool | None = None) -> Asked:
    """Encode questions, to be answered by their first token, or in so many generated ones.

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
    return Asked(tuple(questions), *encode_questions(adapter, questions, bos), generate)


def as_question(item: Any) -> Question:
    """A question, or a text and its answer after a space.

    Raises:
        DataError: It is neither.
    """
    if isinstance(item, Question):
        return item
    if isinstance(item, (tuple, list)) and len(item) == 2 and all(isinstance(text, str) and text for text in item):
        text, answer = item
        return Question(text, answer if answer[0].isspace() else " " + answer)
    raise DataError(f"{item!r} is not a question", "it is a text and an answer", "give (text, answer), or a Question")


def grouped_texts(adapter: Adapter, tokens: Tensor, each: int) -> tuple[tuple[str, ...], ...]:
    """What was generated, rows of tokens `[n, steps]` as texts, so many together."""
    texts = decoded(adapter, tokens)
    return tuple(texts[start : start + each] for start in range(0, len(texts), each))


def mean_states(
    adapter: Adapter,
    prompts: Sequence[Tokens],
    sites: Sequence[Site],
    positions: Sequence[Position] = (-1,),
    *,
    dtype: torch.dtype | None = torch.float64,
    progress: bool | None = None,
) -> Tensor:
    """States `[position, site, prompt, width]` on the CPU; of a span the mean, without the beginning-of-sequence token.

    Args:
        dtype: In which means are taken; None: the model's, but float32 at least.
    """
    reads = [Read(site, _spans(adapter, prompts, position)) for position in positions for site in sites]
    reply = adapter.run(Request(prompts, [Row(i) for i in range(len(prompts))], reads), progress=progress)
    n = len(sites)
    return torch.stack([_pooled(reply.readings[p * n : (p + 1) * n], len(prompts), dtype) for p in range(len(positions))])


def auroc(first: Tensor, second: Tensor) -> Tensor:
    """`[m]`: for each column, how often a number of `first` `[n, m]` is above one of `second` `[k, m]`; equal ones count half."""
    sought, ordered = first.T.contiguous(), second.T.sort(-1).values.contiguous()
    below = torch.searchsorted(ordered, sought) + torch.searchsorted(ordered, sought, right=True)
    return below.double().mean(-1) / (2 * len(second))


def _spans(adapter: Adapter, prompts: Sequence[Tokens], position: Position) -> Each:
    bos, spans = getattr(adapter.tokenizer, "bos_token_id", None), []
    for tokens in prompts:
        at = resolve(position, tokens)
        spans.append([i for i in at if i] if len(at) > 1 and tokens.ids[0] == bos else list(at))
    return Each(tuple(spans))


def _pooled(readings: Sequence[Reading], n: int, dtype: torch.dtype | None) -> Tensor:
    """`[site, prompt, width]`: the mean over each prompt's tokens."""
    rows, values = readings[0].rows, torch.stack([reading.values for reading in readings]).cpu()
    values = values.to(torch.promote_types(values.dtype, torch.float32) if dtype is None else dtype)
    counts = torch.bincount(rows, minlength=n)[:, None]
    return values.new_zeros((len(readings), n, values.shape[-1])).index_add(1, rows, values) / counts


def _contained(adapter: Adapter, tokens: Tensor, answers: Sequence[str]) -> Tensor:
    return torch.tensor([answer.lower() in text.lower() for answer, text in zip(answers, decoded(adapter, tokens), strict=True)])
