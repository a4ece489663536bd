"""Task vectors: what a few examples of a task write into the stream, used without the examples; and sums of such vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hookbook.asking import Match, check_match
from hookbook.controls import random_like
from hookbook.errors import DataError, check_counts
from hookbook.recipe import later, plain, recipe, wrap
from hookbook.recipes.vectors.task_sweep import TaskSweep, answered, judge, task_means
from hookbook.request import Edit, Op
from hookbook.sites import layers_to_sites
from hookbook.tasks import Splits, Task, lists

Mode = Literal["replace", "difference"]


class TaskVectors(TaskSweep):
    """A task's vector at every layer, beside its controls."""


@dataclass(frozen=True, eq=False)
class Composition(TaskSweep):
    """A sum of the vectors of three tasks, which should do a fourth, beside each of the four."""


@recipe
def task_vector(
    model: Any,
    task: Task,
    *,
    layers: Any = "all",
    mode: Mode = "replace",
    shots: int = 10,
    n_prompts: int = 64,
    other: Task | None = None,
    queries: int = 100,
    match: Match = "first_token",
    seed: int = 0,
    progress: bool | None = None,
) -> TaskVectors:
    """A task's vector at every layer: the mean state at the last token of prompts with examples.

    Controls: the vector of examples whose answers are rotated, of another task, and noise of the same length. Rotated answers are no null:
    the vector still holds what kind of answer is wanted.

    Args:
        model: Any model `hookbook.wrap` takes.
        task: What to find the vector of; see `hookbook.tasks`.
        layers: `"all"`, a layer, a site, or a list; a bare layer is a block's output.
        mode: `replace` sets the query's state to the mean, as Hendel et al. do; `difference` adds the mean less the mean state without
            examples.
        shots: Examples in a prompt.
        n_prompts: Prompts over which the mean is taken; their queries are training pairs, never tested ones.
        other: The task whose vector is a control; None: there is none.
        queries: The most queries of validation, and of test.
        match: When the likeliest token is right: if it is the answer's `first_token`; if its text is the whole answer (`exact`); or if its
            text begins the answer or is begun by it (`prefix`).
        seed: Of the split and of everything that is drawn.
        progress: Show a progress bar; None: for long work only.

    Returns:
        `TaskVectors`: accuracies are of the likeliest token among all; the layer is chosen on validation pairs and reported on test
        pairs. Of a template with two forms, `template` says which was taken.

    Raises:
        DataError: The task has too few pairs to show and to ask.
        TokenError: An answer's first token depends on how it is cut.

    Source: Hendel, Geva and Globerson 2023, arXiv:2310.15916, sections 2 and 3; layers count block outputs from 0.

    Differs: the mean is over many prompts, where the authors' code has a vector of its own for each test episode. Templates are Todd et
    al.'s unless a task has theirs (`hookbook.tasks.ARROW`, whose spaces depend on the tokenizer). An answer is right by its first token,
    where theirs compare the likeliest token's text with the whole answer (`match="exact"`), for tasks of knowledge as a prefix
    (`match="prefix"`), and leave out answers of several tokens: capitalize in SmolLM2 at layer 18 is 0.69 by first tokens and 0.31 exactly.

    Example:
        >>> from hookbook.testing import toy
        >>> letters = Task(tuple((a, b) for a, b in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu")), "next letter")
        >>> task_vector(toy(), letters, shots=2, n_prompts=4, queries=3).values.shape
        torch.Size([3, 16])
    """
    adapter = wrap(model)
    op = _op(mode)
    check_counts(shots=shots, n_prompts=n_prompts, queries=queries)
    check_match(match)
    sites = layers_to_sites(layers, adapter.card)
    task = task.fitted(adapter.tokenizer)
    parts = task.split(seed)
    shown = {
        "": parts.train.questions(shots=shots, n=n_prompts, seed=seed),
        "shuffled labels": parts.train.questions(shots=shots, n=n_prompts, seed=seed, shuffled=True),
    }
    if other is not None:
        shown["other task"] = other.fitted(adapter.tokenizer).split(seed).train.questions(shots=shots, n=n_prompts, seed=seed)
    if mode == "difference":
        shown["none"] = parts.train.questions(n=n_prompts, seed=seed)
    means = task_means(adapter, sites, shown, progress)
    if mode == "difference":
        means = {name: mean - means["none"] for name, mean in means.items() if name != "none"}
    means["random"] = random_like(means[""], seed)
    edits = {name: [Edit(site, mean[at], op) for at, site in enumerate(sites)] for name, mean in means.items()}
    measured, _ = judge(adapter, parts, edits, shots=shots, queries=queries, seed=seed, match=match, progress=progress)
    return TaskVectors(
        card=adapter.card,
        task=task.name,
        template=str(task.template),
        mode=mode,
        sites=tuple(sites),
        values=later(plain, means[""]),
        settings={
            "mode": mode,
            "template": str(task.template),
            "other": None if other is None else other.name,
            "queries": measured.pop("queries"),
        },
        **measured,
    )


@recipe
def compose(
    model: Any,
    task: Task,
    *,
    layers: Any = "all",
    mode: Mode = "replace",
    length: int = 3,
    shots: int = 10,
    n_prompts: int = 64,
    queries: int = 100,
    match: Match = "first_token",
    seed: int = 0,
    progress: bool | None = None,
) -> Composition:
    """Vector algebra over lists: first answer + last copy - first copy, which should answer for the last item.

    With `v(item, operation)` the task vector of lists of which an item is copied or answered, the vector is
    `v(first, answer) + v(last, copy) - v(first, copy)`. Controls are its three parts, `direct` = `v(last, answer)` itself, and noise of
    the same length.

    Args:
        task: What is answered of an item, such as its capital. Its pairs are split before lists are made, so no tested item is in a list
            that is shown.
        length: Items in a list; all four kinds have the same lists.
        model, layers, mode, shots, n_prompts, queries, match, seed, progress: See `hookbook.task_vector`.

    Returns:
        `Composition`, in the fields of `TaskVectors`; `few_shot` is the model's own accuracy on last items with examples in the prompt.

    Raises:
        DataError, TokenError: As `hookbook.task_vector`.

    Source: Todd et al. 2023, arXiv:2310.15213, section 3.3.

    Differs: the paper sums function vectors, here they are mean states. For function vectors, add what `hookbook.function_vector` gives
        for each list
    task with the same heads: `Vector` has `+` and `-`.

    Example:
        >>> from hookbook.testing import toy
        >>> letters = Task(tuple((a, b) for a, b in zip("abcdefghijklmnopqrst", "bcdefghijklmnopqrstu")), "next letter")
        >>> found = compose(toy(), letters, length=2, shots=2, n_prompts=3, queries=3)
        >>> list(found.controls)
        ['first answer', 'last copy', 'first copy', 'direct', 'random']
    """
    adapter = wrap(model)
    op = _op(mode)
    check_counts(shots=shots, n_prompts=n_prompts, queries=queries)
    check_match(match)
    sites = layers_to_sites(layers, adapter.card)
    task = task.fitted(adapter.tokenizer)
    split = task.split(seed)

    def of(part: Task, item: str, copy: bool = False) -> Task:
        source = Task(tuple((x, x) for x, _ in part.pairs), part.name, part.template) if copy else part
        return lists(source, item, length=length, n=max(4 * shots, 2 * max(queries, n_prompts)), seed=seed)

    kinds = {"first answer": ("first", False), "last copy": ("last", True), "first copy": ("first", True), "direct": ("last", False)}
    shown = {name: of(split.train, *kind).questions(shots=shots, n=n_prompts, seed=seed) for name, kind in kinds.items()}
    if mode == "difference":
        shown["none"] = of(split.train, "last").questions(n=n_prompts, seed=seed)
    means = task_means(adapter, sites, shown, progress)
    if mode == "difference":
        means = {name: mean - means["none"] for name, mean in means.items() if name != "none"}
    means[""] = means["first answer"] + means["last copy"] - means["first copy"]
    means["random"] = random_like(means[""], seed)
    edits = {name: [Edit(site, mean[at], op) for at, site in enumerate(sites)] for name, mean in means.items()}
    parts = Splits(*(of(part, "last") for part in (split.train, split.validation, split.test)))
    measured, _ = judge(adapter, parts, edits, shots=shots, queries=queries, seed=seed, match=match, progress=progress)
    return Composition(
        card=adapter.card,
        task=parts.test.name,
        template=str(task.template),
        mode=mode,
        sites=tuple(sites),
        values=later(plain, means[""]),
        settings={"mode": mode, "template": str(task.template), "queries": measured.pop("queries")},
        **measured,
    )


@recipe
def known(model: Any, task: Task, *, shots: int = 10, match: Match = "first_token", seed: int = 0, progress: bool | None = None) -> Task:
    """The pairs of a task that a model answers behind examples of it.

    Args:
        model: Any model `hookbook.wrap` takes.
        task: The pairs; each is asked once, behind `shots` others.
        shots: Examples in a prompt; 0: none.
        match: See `hookbook.task_vector`.
        seed: Of the examples.
        progress: Show a progress bar; None: for long work only.

    Raises:
        DataError: It answers none, or there are too few pairs to show.
        TokenError: An answer's first token depends on how it is cut.

    Source: as papers on tasks and relations choose their items, such as Todd et al. 2023, arXiv:2310.15213, and Hernandez et al. 2023,
        arXiv:2308.09124.

    Differs: each pair is asked once, behind one draw of examples.

    Example:
        found = hb.known(model, hb.relations.load("country_capital"))
    """
    adapter = wrap(model)
    check_match(match)
    task = task.fitted(adapter.tokenizer)
    return answered(adapter, task, task, shots=shots, match=match, seed=seed, progress=progress)


def _op(mode: str) -> Op:
    if mode not in ("replace", "difference"):
        raise DataError(f"mode={mode!r}", "", "use replace or difference")
    return "set" if mode == "replace" else "add"
