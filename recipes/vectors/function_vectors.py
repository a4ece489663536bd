"""Function vectors: the heads that carry a task from examples to the last token, found by what each does alone, and their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hookbook.adapter import Adapter
from hookbook.asking import Match, check_match, encode_questions
from hookbook.controls import random_like
from hookbook.errors import DataError, EditError, check_counts
from hookbook.recipe import Later, ModelCard, fetch, later, plain, recipe, wrap
from hookbook.recipes.vectors.task_sweep import TaskSweep, answered, judge
from hookbook.request import Edit, Read, Readout, Request, Row
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.show.plots import heat_map, lines
from hookbook.show.tidy import tidy
from hookbook.sites import Site, layers_to_sites
from hookbook.tasks import Question, Splits, Task


@dataclass(frozen=True, eq=False)
class HeadEffects(Result):
    """The average indirect effect of every head on every task."""

    card: ModelCard
    tasks: tuple[str, ...]
    effects: Tensor
    """`[task, layer, head]`: how much the answer's probability rises if the head alone is as it is behind true examples."""
    misled: Tensor
    """`[task]`: its probability behind examples with rotated answers."""
    settings: dict[str, Any]

    @property
    def mean(self) -> Tensor:
        """`[layer, head]`: over tasks, as the paper chooses heads."""
        return self.effects.mean(0)

    def top(self, k: int) -> list[tuple[int, int]]:
        """The `k` heads with the largest mean effect, as (layer, head), the largest first."""
        if not 1 <= k <= self.mean.numel():
            raise EditError(f"{k} heads", f"the model has {self.mean.numel()}", "ask for some of them")
        return [(at // self.mean.shape[1], at % self.mean.shape[1]) for at in self.mean.flatten().topk(k).indices.tolist()]

    def to_frame(self) -> DataFrame:
        """One row for each task and head: `task`, `layer`, `head`, `indirect_effect`."""
        return tidy({"task": self.tasks, "layer": self.effects.shape[1], "head": self.effects.shape[2]}, indirect_effect=self.effects)

    def plot(self, ax: Axes | None = None) -> Axes:
        """A heat map of the mean effect, heads by layers."""
        mean = self.mean.T
        words = [[f"{x:.2f}" for x in line] for line in mean.tolist()]
        names = ("head", "layer", "mean indirect effect")
        return heat_map(
            ax,
            mean,
            words,
            [str(i) for i in range(mean.shape[0])],
            [str(i) for i in range(mean.shape[1])],
            names,
            signed=True,
            title=f"Heads that matter, {self.card.model_id}",
        )

    def view(self) -> View:
        """The heads with the largest effects."""
        frame = self.to_frame().pivot_table("indirect_effect", ["layer", "head"], "task", sort=False)
        frame = frame.assign(mean=frame.mean(axis=1)).sort_values("mean", ascending=False).head(20)
        return View.table(frame, "The heads with the largest mean effect")


@dataclass(frozen=True, eq=False)
class FunctionVectors(TaskSweep):
    """A task's function vector, added at every layer, beside its controls. `values` are the same vector for each site, in the site's
    place."""

    heads: tuple[tuple[int, int], ...]
    """(layer, head) of which it is the sum."""
    effects: Tensor
    """`[layer, head]` by which they were chosen; empty if they were given."""
    misled: dict[str, Tensor]
    """Accuracy behind examples with rotated answers: of `vector` and `layer mean` `[site]`, and of `none` `[1]`."""

    def plot_misled(self, ax: Axes | None = None) -> Axes:
        """Accuracy by layer behind examples with rotated answers."""
        curves = {name: values for name, values in self.misled.items() if name != "none"}
        labels = [str(site.layer) for site in self.sites]
        names = ("layer", f"accuracy on {self.task}, rotated examples")
        return lines(
            ax,
            curves,
            names,
            labels=labels,
            levels={"no vector": float(self.misled["none"][0])},
            title=f"Function vector behind rotated examples, {self.card.model_id}",
        )


@recipe
def head_effects(
    model: Any,
    tasks: Task | Sequence[Task],
    *,
    shots: int = 10,
    n_prompts: int = 100,
    n_trials: int = 25,
    known: bool = True,
    seed: int = 0,
    progress: bool | None = None,
) -> HeadEffects:
    """The average indirect effect (AIE) of every head: behind examples with wrong answers, give one head at the last token its mean output
    behind right ones.

    Args:
        model: Any model `hookbook.wrap` takes.
        tasks: One task or several; all are of training pairs, so that test pairs stay unseen.
        shots: Examples in a prompt.
        n_prompts: Prompts over which a head's output is averaged.
        n_trials: Prompts with rotated answers on which each head is tried.
        known: Draw queries from those which the model answers behind right examples, as the authors do: of as many training pairs as there
            are prompts or trials, whichever are more, each asked once beforehand. Of a remote model that is a job of its own, since it
            decides what is asked next.
        seed: Of everything that is drawn.
        progress: Show a progress bar; None: for long work only.

    Returns:
        `HeadEffects`, of the probability of the answer's first token.

    Raises:
        DataError: The task has too few pairs to show and to ask, or the model answers none of the queries.
        TokenError: An answer's first token depends on how it is cut.
        Refused: The model has no heads to edit.

    Source: Todd et al. 2023, arXiv:2310.15213, section 2.3.

    Differs: answers are rotated among the examples, where the authors permute them at random and some stay right. That does not order heads
    otherwise: of 270 heads on 20 prompts the rank correlation between the two ways is .61 to .78, between two permutations .68 to .72 and
    between two rotations .81 to .89; but the answer itself is .045 likely behind rotated examples, and .08 to .14 behind permuted ones.
    Queries are training pairs, where theirs are a validation part, and, where there is no beginning-of-sequence token, none is put first,
    where their prompts begin with `<|endoftext|>`.

    Example:
        >>> from hookbook.testing import toy
        >>> letters = Task(tuple((a, b) for a, b in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu")), "next letter")
        >>> head_effects(toy(), letters, shots=2, n_prompts=3, n_trials=2, known=False).effects.shape
        torch.Size([1, 3, 2])
    """
    adapter = wrap(model)
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    if not tasks:
        raise DataError("no task", "", "give one")
    check_counts(shots=shots, n_prompts=n_prompts, n_trials=n_trials)
    asked = _asked(adapter, tasks, shots, known * max(n_prompts, n_trials), seed, progress)
    found = [
        _effects(adapter, some, _means(adapter, some, [], shots, n_prompts, seed, progress), shots, n_trials, seed, progress)
        for some in asked
    ]
    return HeadEffects(
        card=adapter.card,
        tasks=tuple(task.name for task in tasks),
        effects=later(plain, torch.stack([effects for effects, _ in found])),
        misled=later(plain, torch.stack([misled for _, misled in found])),
        settings={"templates": [some.template for some in asked], "pairs": [len(some.pairs) for some in asked]},
    )


@recipe
def function_vector(
    model: Any,
    task: Task,
    *,
    heads: int | Sequence[tuple[int, int]] = 10,
    effects: HeadEffects | None = None,
    strength: float = 1.0,
    layers: Any = "all",
    shots: int = 10,
    n_prompts: int = 100,
    n_trials: int = 25,
    known: bool = True,
    queries: int = 100,
    match: Match = "first_token",
    seed: int = 0,
    progress: bool | None = None,
) -> FunctionVectors:
    """A task's function vector: the sum of the mean outputs of the heads that matter, added to the last token of a query without examples.

    Controls: `layer mean`, the mean state behind examples, added; `random heads`, the sum of as many others; and noise of the same length.

    Args:
        heads: How many heads, by their effect on this task; or which, as (layer, head).
        effects: Choose `heads` by these instead, such as those of several tasks.
        strength: What the vector is multiplied by. The paper adds it as it is; in small models, whose stream is much longer than a few
            heads' sum, more is needed.
        layers: Where it is added: `"all"`, a layer, a site, or a list; a bare layer is a block's output.
        queries: The most queries of validation, and of test.
        match: When an answer is right; see `hookbook.task_vector`.
        model, task, shots, n_prompts, n_trials, known, seed, progress: See `head_effects`.

    Returns:
        `FunctionVectors`: accuracies are of the likeliest token; the layer is chosen on validation pairs and reported on test pairs.

    Raises:
        EditError: No such head, or more heads than there are.
        DataError, TokenError, Refused: As `head_effects`.

    Source: Todd et al. 2023, arXiv:2310.15213, sections 2.3 and 3.1.

    Differs: biases of the output projection are left out (the authors' code adds them once for each head). In Gemma 2 and 3, where a norm
    follows the projection, a head's output is what the norm makes of its part with its scale frozen (`Adapter.head_contributions`).
    Prompts begin without `<|endoftext|>`, as in `head_effects`.

    Example:
        >>> from hookbook.testing import toy
        >>> letters = Task(tuple((a, b) for a, b in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu")), "next letter")
        >>> found = function_vector(toy(), letters, heads=[(0, 1), (2, 0)], shots=2, n_prompts=3, queries=3, known=False)
        >>> found.heads, found.accuracy.shape
        (((0, 1), (2, 0)), torch.Size([3]))
    """
    adapter = wrap(model)
    card = adapter.card
    check_counts(shots=shots, n_prompts=n_prompts, n_trials=n_trials, queries=queries)
    check_match(match)
    given = None if isinstance(heads, int) else [(int(layer), int(head)) for layer, head in heads]
    if effects is not None and isinstance(heads, int):
        if not effects.card.same_model(card):
            raise EditError(
                f"effects of heads of {effects.card.model_id} in {card.model_id}", "they are other heads", "call head_effects on this model"
            )
        given = effects.top(heads)
    n_heads = len(given) if given is not None else int(heads)  # type: ignore[arg-type]
    if given is not None and (
        len(set(given)) < len(given) or not all(0 <= layer < card.n_layers and 0 <= head < card.n_heads for layer, head in given)
    ):
        raise EditError(f"heads={given}", f"there are {card.n_layers} layers of {card.n_heads} heads", "name each once")
    if not 1 <= n_heads <= card.n_layers * card.n_heads // 2:
        raise EditError(f"{n_heads} heads", f"of {card.n_layers * card.n_heads}, as many others are the control", "use fewer")
    sites = layers_to_sites(layers, card)
    (asked,) = _asked(adapter, [task], shots, known * max(n_prompts, n_trials), seed, progress)
    means = _means(adapter, asked, sites, shots, n_prompts, seed, progress)
    if given is None:
        found, _ = _effects(adapter, asked, means, shots, n_trials, seed, progress)
        ranked, scores = found.flatten().topk(n_heads).indices, found
    else:
        ranked, scores = torch.tensor([layer * card.n_heads + head for layer, head in given]), torch.empty(0)
    parts = torch.cat([adapter.head_contributions(layer, z[None])[0] for layer, z in enumerate(means.z)])
    parts = parts.to(torch.promote_types(parts.dtype, torch.float32))
    luck = torch.rand(len(parts), generator=torch.Generator().manual_seed(seed))
    others = torch.scatter(luck, 0, ranked, -1.0).topk(n_heads).indices  # none of the chosen
    vector, random_heads = (strength * parts.index_select(0, some).sum(0) for some in (ranked, others))
    noise = random_like(vector[None], seed)[0]
    named = {
        name: [Edit(site, value, "add") for site in sites]
        for name, value in (("", vector), ("random heads", random_heads), ("random", noise))
    }
    named["layer mean"] = [Edit(site, means.states[at], "add") for at, site in enumerate(sites)]
    ask = {"shots": shots, "queries": queries, "seed": seed, "match": match, "progress": progress}
    measured, behind = judge(adapter, asked.parts, named, misled=("", "layer mean"), **ask)
    return FunctionVectors(
        card=card,
        task=task.name,
        template=asked.template,
        mode="add the function vector",
        sites=tuple(sites),
        values=later(plain, vector[None].expand(len(sites), -1)),
        heads=later(_pairs, ranked, card.n_heads),
        effects=later(plain, scores),
        misled={name or "vector": values for name, values in behind.items()},
        settings={"template": asked.template, "pairs": len(asked.pairs), "queries": measured.pop("queries")},
        **measured,
    )


@dataclass(frozen=True)
class _Asked:
    """A task in parts, and those of its training pairs that are asked."""

    parts: Splits
    pairs: Task

    @property
    def template(self) -> str:
        return str(self.pairs.template)

    def questions(self, shots: int, n: int, seed: int, shuffled: bool = False) -> list[Question]:
        return self.pairs.questions(self.parts.train, shots, n, seed=seed, shuffled=shuffled)


def _asked(adapter: Adapter, tasks: Sequence[Task], shots: int, known: int, seed: int, progress: bool | None) -> list[_Asked]:
    """Which pairs are asked of each task: all training pairs (0), or those of so many that are answered, which a plan does not know."""
    split = [task.fitted(adapter.tokenizer).split(seed) for task in tasks]
    for parts in split:
        parts.train.questions(shots=shots, n=1)  # too few pairs are refused before anything runs
    some = [replace(parts.train, pairs=parts.train.pairs[: known or None]) for parts in split]
    ask: Any = {"shots": shots, "match": "first_token", "seed": seed, "progress": progress}
    found = fetch([answered(adapter, pairs, parts.train, **ask) for pairs, parts in zip(some, split, strict=True)] if known else some)
    return [_Asked(parts, all_ if isinstance(pairs, Later) else pairs) for parts, all_, pairs in zip(split, some, found, strict=True)]


@dataclass(frozen=True)
class _Means:
    z: list[Tensor]
    """Of each layer the mean `[n_heads * d_head]`."""
    states: Tensor
    """`[site, width]`"""


def _means(adapter: Adapter, asked: _Asked, sites: Sequence[Site], shots: int, n_prompts: int, seed: int, progress: bool | None) -> _Means:
    """Means at the last token behind examples."""
    prompts, _ = encode_questions(adapter, asked.questions(shots, n_prompts, seed))
    reads = [Read(Site("head_z", layer)) for layer in range(adapter.card.n_layers)] + [Read(site) for site in sites]
    reply = adapter.run(Request(prompts, [Row(i) for i in range(len(prompts))], reads), progress=progress)
    means = [reading.values.cpu().double().mean(0).to(reading.values.dtype) for reading in reply.readings]
    n = adapter.card.n_layers
    return _Means(means[:n], torch.stack(means[n:]) if sites else torch.empty(0))


def _effects(
    adapter: Adapter, asked: _Asked, means: _Means, shots: int, n_trials: int, seed: int, progress: bool | None
) -> tuple[Tensor, Tensor]:
    """Average indirect effects `[layer, head]`, and the probability of answers behind rotated examples."""
    card = adapter.card
    prompts, answers = encode_questions(adapter, asked.questions(shots, n_trials, seed + 1, shuffled=True))
    units = [z.unflatten(0, (card.n_heads, card.d_head)).unbind(0) for z in means.z]
    edits = [Edit(Site("head_z", layer, head), value, "set") for layer, heads in enumerate(units) for head, value in enumerate(heads)]
    rows = [Row(i, some) for i in range(n_trials) for some in ((), *((edit,) for edit in edits))]
    tokens = answers[[row.prompt for row in rows]][:, None]
    reply = adapter.run(Request(prompts, rows, (), Readout(tokens=tokens)), progress=progress)
    said = reply.said.token_logprobs[:, 0].double().exp().unflatten(0, (n_trials, -1))
    effects = (said[:, 1:] - said[:, :1]).mean(0)
    return effects.unflatten(0, (card.n_layers, card.n_heads)), said[:, 0].mean()


def _pairs(ranked: Tensor, n_heads: int) -> tuple[tuple[int, int], ...]:
    return tuple((at // n_heads, at % n_heads) for at in ranked.tolist())
