"""Generation under intervention, beside what the model says without it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hookbook.asking import encode_prompts
from hookbook.errors import EditError, TokenError, check_counts, check_prompt
from hookbook.recipe import ModelCard, later, recipe, wrap
from hookbook.request import Edit, Request, Row, Sampling
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.show.plots import heat_map
from hookbook.show.text import ending, need, show
from hookbook.show.tidy import tidy
from hookbook.tokens import Tokens, decoded, lines, vocabulary


@dataclass(frozen=True, eq=False)
class Generation(Result):
    """What a model said after `n` prompts, under edits and without them."""

    card: ModelCard
    prompts: tuple[Tokens, ...]
    """`[n]`: the prompts as the model saw them."""
    texts: tuple[str, ...]
    """`[n]`: what was generated under the edits."""
    ids: tuple[tuple[int, ...], ...]
    """`[n]`: its tokens, without the end token."""
    logprobs: tuple[tuple[float, ...], ...]
    """`[n]`: the log-probability in nats of each of these tokens when it was chosen."""
    control_texts: tuple[str, ...]
    """`[n]`: what the same model says without the edits."""
    control_ids: tuple[tuple[int, ...], ...]
    """`[n]`"""
    control_logprobs: tuple[tuple[float, ...], ...]
    """`[n]`"""
    vocab: dict[int, str]
    """The text of every generated token."""
    edits: tuple[str, ...]
    """What was done, in words."""
    settings: dict[str, Any]

    def to_frame(self) -> DataFrame:
        """One row for each prompt: `prompt`, `text`, `logprob` (of the whole text, in nats), `control_text`, `control_logprob`."""
        said = {"text": self.texts, "logprob": [sum(line) for line in self.logprobs]}
        controls = {"control_text": self.control_texts, "control_logprob": [sum(line) for line in self.control_logprobs]}
        return tidy({"prompt": self.prompts}, **said, **controls)

    def plot(self, ax: Axes | None = None) -> Axes:
        """A heat map of the probability of every generated token: for each prompt a line under the edits, and one without."""
        lines = [pair for both in zip(self._lines(True), self._lines(False), strict=True) for pair in both]
        longest = max((len(ids) for _, ids, _ in lines), default=0)
        if not longest:
            raise TokenError("nothing was generated", "every row ended with its first token", "look at to_frame()")
        values = torch.full((len(lines), longest), float("nan"))
        for row, (_, _, logprobs) in enumerate(lines):
            values[row, : len(logprobs)] = torch.tensor(logprobs).exp()
        words = [[self.vocab[i] for i in ids] + [""] * (longest - len(ids)) for _, ids, _ in lines]
        return heat_map(
            ax,
            values,
            words,
            [name for name, _, _ in lines],
            [str(i + 1) for i in range(longest)],
            ("prompt", "generated token", "probability"),
            title=f"What is generated, {self.card.model_id}",
        )

    def _lines(self, edited: bool) -> list[tuple[str, tuple[int, ...], tuple[float, ...]]]:
        ids, logprobs = (self.ids, self.logprobs) if edited else (self.control_ids, self.control_logprobs)
        names = [ending(prompt.text, 24) + (" | edited" if edited else " | control") for prompt in self.prompts]
        return list(zip(names, ids, logprobs, strict=True))

    def view(self, *, prompt: int = 0) -> View:
        """An interactive picture (circuitsvis): the generated tokens of one prompt, coloured by their probability."""
        prompt = check_prompt(prompt, len(self.prompts))
        coloured = need("circuitsvis.tokens", "view()")
        words = [show(self.vocab[i]) + " " for i in self.ids[prompt]] or ["(ended at once)"]
        picture = coloured.colored_tokens(words, torch.tensor(self.logprobs[prompt] or (0.0,)).exp(), min_value=0.0, max_value=1.0)
        return View.of(picture)


@recipe
def generate(
    model: Any,
    prompts: Any,
    *,
    edits: Sequence[Edit] = (),
    max_new_tokens: int = 20,
    do_sample: bool = False,
    seed: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    bos: bool | None = None,
    chat: bool = False,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Generation:
    """Let a model go on from prompts, under edits, and without them as control; all in one forked pass.

    Args:
        model: Any model `hookbook.wrap` takes.
        prompts: A prompt, or a list of prompts (texts, or see `hookbook.tokens.encode`).
        edits: What to change in every row. `Edit.scope` says whether an edit acts on the prompt, on generated tokens, on both,
            or at absolute positions.
        max_new_tokens: How many tokens to decode at most; a row stops at its own end token.
        do_sample: Draw tokens instead of taking the likeliest. Nothing of the checkpoint's generation config is used.
        seed: Of the drawing, which is needed then; a prompt and its control draw the same random numbers.
        temperature, top_k, top_p: Of the drawing: see `hookbook.request.Sampling`.
        bos, chat: See `hookbook.tokens.encode`.
        progress: Show a progress bar; None: for long work only.
        checkpoint: A folder that keeps what is finished; the same call goes on from there after a crash.

    Returns:
        A `Generation`.

    Raises:
        SiteError, TokenError, EditError: Something asked for is not in the model or a prompt, or would change nothing.
        Refused: The model cannot edit a site.

    Source: no paper: decoding, greedy or drawn, of which every method that changes what a model writes is made.

    Differs: in nothing; the tests compare with running the whole text again at each step.

    Example:
        >>> from hookbook.testing import toy
        >>> import torch
        >>> push = Edit("resid_post.1", -9 * torch.arange(16.0), "add", slice(None), scope="all")
        >>> out = generate(toy(), ["ab", "c"], edits=[push], max_new_tokens=3)
        >>> out.texts != out.control_texts
        True
    """
    adapter = wrap(model)
    coded = encode_prompts(adapter, prompts, bos, chat)
    check_counts(max_new_tokens=max_new_tokens)
    if isinstance(edits, Edit):
        raise EditError("edits is one Edit", "it is a list of them", "write edits=[...]")
    if do_sample and seed is None:
        raise TokenError("do_sample without a seed", "the same call would not give the same text", "give a seed")
    if not do_sample and (seed, temperature, top_k, top_p) != (None, 1.0, 0, 1.0):
        raise TokenError(
            "a seed, temperature, top_k or top_p without do_sample",
            "the likeliest token is taken",
            "write do_sample=True, or leave them out",
        )
    sampling = Sampling(seed, temperature, top_k, top_p) if do_sample and seed is not None else None
    rows = [Row(n, tuple(edits)) for n in range(len(coded))]
    requests = [Request(coded, rows, generate=max_new_tokens, sampling=sampling)]
    if edits and sampling is None:
        requests = [Request(coded, [*rows, *(Row(n) for n in range(len(coded)))], generate=max_new_tokens)]
    elif edits:  # a run of its own, so that each control draws what its prompt draws
        requests.append(Request(coded, [Row(n) for n in range(len(coded))], generate=max_new_tokens, sampling=sampling))
    replies = [adapter.run(request, progress=progress, checkpoint=checkpoint) for request in requests]
    tokens, logprobs = (
        torch.cat([x for x in column if x is not None]) for column in zip(*((r.tokens, r.token_logprobs) for r in replies), strict=True)
    )
    own, control = slice(0, len(coded)), slice(-len(coded), None)
    return Generation(
        card=adapter.card,
        prompts=tuple(coded),
        texts=later(decoded, adapter, tokens[own]),
        ids=later(lines, tokens[own], tokens[own]),
        logprobs=later(lines, tokens[own], logprobs[own]),
        control_texts=later(decoded, adapter, tokens[control]),
        control_ids=later(lines, tokens[control], tokens[control]),
        control_logprobs=later(lines, tokens[control], logprobs[control]),
        vocab=later(vocabulary, adapter, tokens),
        edits=tuple(later(str, edit) for edit in edits),
        settings={},
    )
