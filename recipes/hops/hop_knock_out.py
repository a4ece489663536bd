"""Which attention carries a question in two hops: tokens that see others no more, in a window of layers around every layer.

What an answer loses when the last token cannot see the entity says that this attention was needed there. Any token may be
needed by then; so every window is also tried with as many other tokens of the same sentence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookbook.asking import pose
from hookbook.errors import DataError, check_counts, check_prompt
from hookbook.hops import TwoHop
from hookbook.recipe import ModelCard, later, recipe, wrap
from hookbook.recipes.hops.two_hops import check_hops
from hookbook.request import Edit, Readout, Request, Row
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.show.plots import COLOURS, legend, lines, token_values
from hookbook.show.tidy import tidy
from hookbook.sites import Site
from hookbook.tokens import Tokens, covering

EDGES = (("last", "entity"), ("last", "bridge"), ("last", "second"), ("bridge", "first"))
"""Who attends, and to what, as they are chosen by default."""
SEEN = ("entity", "bridge", "first", "second")
"""What can be attended to: the entity's tokens; the last token of the phrase that stands for the bridge; the words of that phrase beside
the entity; and the other words of the question."""


@dataclass(frozen=True, eq=False)
class HopKnockOut(Result):
    """What `n` questions lose without an edge of attention in each window of layers. Numbers are NaN where a question has no such
    tokens."""

    card: ModelCard
    prompts: tuple[Tokens, ...]
    """`[n]`"""
    answers: tuple[str, ...]
    """`[n]`"""
    edges: tuple[tuple[str, str], ...]
    """Who attends, and to what."""
    keys: tuple[tuple[tuple[int, ...], ...], ...]
    """`[n]`: the tokens that are not seen, by question and edge."""
    control_keys: tuple[tuple[tuple[int, ...], ...], ...]
    """`[n]`: as many others, or all others if there are fewer."""
    windows: tuple[tuple[int, ...], ...]
    """The layers of each window, by its centre."""
    clean: Tensor
    """`[n]`: whether the question is answered."""
    clean_logprobs: Tensor
    """`[n]` of the answer's first token, in nats."""
    right: Tensor
    """`[n, edge, 2, window]`: 1 where it is answered without the edge, and (second) without the control's."""
    logprobs: Tensor
    """`[n, edge, 2, window]` of the answer's first token."""
    settings: dict[str, Any]

    def kept(self) -> Tensor:
        """`[edge, 2, window]`: of the questions that were answered, and have such tokens, the share that still is."""
        return self.right[self.clean].nanmean(0)

    def to_frame(self) -> DataFrame:
        """One row for each edge, window and control: `edge`, `control` (`edge` without it, `other tokens` without as many others),
        `layer` (the centre), `first_layer`, `last_layer`, `n` (questions that were answered and have such tokens), `kept` (the share of
        them that still is), `probability` (mean of the answer's first token) and `clean_probability`."""
        asked = self.clean[:, None, None, None] & ~self.right.isnan()
        clean = self.clean_logprobs[:, None, None, None].expand_as(self.logprobs)
        means = [torch.where(asked, x.exp(), float("nan")).nanmean(0) for x in (self.logprobs, clean)]
        windows = [(centre, window[0], window[-1]) for centre, window in enumerate(self.windows)]
        axes = {
            "edge": [f"{a} to {b}" for a, b in self.edges],
            "control": ["edge", "other tokens"],
            "layer first_layer last_layer": windows,
        }
        return tidy(axes, n=asked.sum(0), kept=self.kept(), probability=means[0], clean_probability=means[1])

    def plot(self, ax: Axes | None = None) -> Axes:
        """The share of answered questions that still are, by the window's centre; the controls are dashed."""
        kept = self.kept()
        names = ("layer in the middle of the window", "still answered")
        title = f"Questions still answered without attention, {self.card.model_id}"
        curves = {f"{a} to {b}": kept[e, 0] for e, (a, b) in enumerate(self.edges)}
        ax = lines(ax, curves, names, labels=[str(layer) for layer in range(len(self.windows))], title=title)
        for e in range(len(self.edges)):
            label = "as many others" if e == 0 else None
            ax.plot(
                range(len(self.windows)), kept[e, 1].tolist(), color=COLOURS[e % len(COLOURS)], linestyle="--", linewidth=1, label=label
            )
        legend(ax)
        return ax

    def view(self, *, prompt: int = 0) -> View:
        """An interactive picture (circuitsvis): choose an edge, see which tokens of a prompt are not seen (1), and which are not in the
        control (-1). Below, the table."""
        prompt = check_prompt(prompt, len(self.prompts))
        values = torch.zeros(len(self.prompts[prompt].strings), len(self.edges), dtype=torch.float64)
        for e in range(len(self.edges)):
            values[list(self.keys[prompt][e]), e] = 1.0
            values[list(self.control_keys[prompt][e]), e] = -1.0
        edges = [f"{a} to {b}" for a, b in self.edges]
        return token_values(self.prompts[prompt].strings, values, edges) + View.table(self.to_frame(), "What is still answered")


@recipe
def hop_knock_out(
    model: Any,
    questions: Sequence[TwoHop],
    *,
    edges: Sequence[tuple[str, str]] = EDGES,
    k: int = 3,
    generate: int = 0,
    seed: int = 0,
    progress: bool | None = None,
) -> HopKnockOut:
    """Knock out attention from one place of a question to another, in all heads of `2k + 1` layers around each layer.

    Args:
        model: Any model `hookbook.wrap` takes.
        questions: Of `hookbook.hops`.
        edges: Who attends ("last" or "bridge") and to what ("entity", "bridge", "first" or "second": see `SEEN`). A token always sees
            itself, and nothing after itself.
        k: Layers on either side; windows are clipped at the first and the last layer.
        generate: See `hookbook.two_hops`. The edge is cut in the prompt only.
        seed: Of the tokens that are the control: others that the same token sees, in the sentence that asks, and not the first token of
            the prompt.
        progress: Show a progress bar; None: for long work only.

    Returns:
        `HopKnockOut`.

    Raises:
        DataError: No questions, one that is not in two hops, or an edge which none of them has; no such edge.
        EditError: A negative `k`.
        Refused: The model's attention patterns cannot be edited.

    Source: Biran et al. 2024, arXiv:2406.12775, section 4, where the window is 7 layers (`k=3`). Attention that is knocked out is shared
    among the other tokens, as by a mask before the softmax.

    Differs: the control, as many other tokens of the same sentence, is ours.

    Example:
        >>> from hookbook import hops
        >>> from hookbook.testing import toy
        >>> found = hop_knock_out(toy(n_ctx=128), hops.chain("city_country", "country_capital", 3), edges=[("last", "entity")], k=0)
        >>> found.kept().shape
        torch.Size([1, 2, 3])
    """
    adapter = wrap(model)
    check_hops(questions)
    edges = tuple((str(who), str(seen)) for who, seen in edges)
    unknown = [edge for edge in edges if edge[0] not in ("last", "bridge") or edge[1] not in SEEN]
    if unknown or not edges:
        raise DataError(f"the edges {unknown or 'of an empty list'}", "", f"give pairs of last or bridge, and one of {', '.join(SEEN)}")
    check_counts(0, k=k)
    asked = pose(adapter, questions, generate)
    n, layers = len(questions), adapter.card.n_layers
    windows = tuple(tuple(range(max(0, layer - k), min(layers, layer + k + 1))) for layer in range(layers))
    draw = random.Random(seed)
    found = [[_keys(q, prompt, *edge, draw) for edge in edges] for q, prompt in zip(questions, asked.prompts, strict=True)]
    for e, edge in enumerate(edges):
        if not any(both[e].keys for both in found):
            raise DataError(f"{edge[0]} to {edge[1]}", "no question has such tokens before the one that attends", "leave this edge out")

    rows, cells = [Row(i) for i in range(n)], []
    for i, some in enumerate(found):
        for e, edge in enumerate(some):
            for c, keys in enumerate((edge.keys, edge.control)):
                if keys:
                    cut = [Edit(Site("attn_pattern", layer), op="knock_out", position=edge.query, keys=keys) for layer in range(layers)]
                    rows += [Row(i, tuple(cut[layer] for layer in window)) for window in windows]
                    cells.append((i, e, c))
    numbers = [row.prompt for row in rows]
    reply = adapter.run(Request(asked.prompts, rows, (), Readout(k=1, tokens=asked.answers[numbers][:, None]), generate), progress=progress)
    right, logprobs = asked.right(adapter, reply, numbers), reply.said.token_logprobs[:, 0]
    shape = (n, len(edges), 2, layers)
    return HopKnockOut(
        card=adapter.card,
        prompts=tuple(asked.prompts),
        answers=tuple(question.answer for question in questions),
        edges=edges,
        keys=tuple(tuple(edge.keys for edge in some) for some in found),
        control_keys=tuple(tuple(edge.control for edge in some) for some in found),
        windows=windows,
        clean=later(_first, right, n),
        clean_logprobs=later(_first, logprobs, n),
        right=later(_filled, right, cells, shape),
        logprobs=later(_filled, logprobs, cells, shape),
        settings={"rule": asked.rule},
    )


@dataclass(frozen=True)
class _Cut:
    query: int
    keys: tuple[int, ...]
    control: tuple[int, ...]


def _keys(question: TwoHop, prompt: Tokens, who: str, seen: str, draw: random.Random) -> _Cut:
    """The token that attends, those it shall not see, and as many others of the sentence."""
    begins = question.text.rfind("\n", 0, question.start) + 1
    sentence = set(covering(prompt, begins, len(question.text)))
    phrase, entity = set(covering(prompt, question.start, question.end)), set(question.entity_at(prompt))
    bridge = question.subject_at(prompt)
    query = bridge if who == "bridge" else len(prompt) - 1
    before = {at for at in sentence if at < query}
    keys = before & {"entity": entity, "bridge": {bridge}, "first": phrase - entity, "second": sentence - phrase}[seen]
    others = sorted(before - keys - {0})
    control = draw.sample(others, min(len(keys), len(others)))
    return _Cut(query, tuple(sorted(keys)), tuple(sorted(control)))


def _first(x: Tensor, n: int) -> Tensor:
    return x[:n]


def _filled(x: Tensor, cells: Sequence[tuple[int, int, int]], shape: tuple[int, int, int, int]) -> Tensor:
    """Rows of windows in their cells, behind those of the clean runs."""
    out = torch.full(shape, float("nan"), dtype=torch.promote_types(x.dtype, torch.float32))
    for (i, e, c), values in zip(cells, x[shape[0] :].unflatten(0, (-1, shape[-1])), strict=True):
        out[i, e, c] = values.to(out.dtype)
    return out
