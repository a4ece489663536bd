"""What task vectors, function vectors and their sums are judged by: answers without examples, at every site, beside controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hookbook.adapter import Adapter
from hookbook.asking import Match, encode_questions, mean_states, right_tokens
from hookbook.card import ModelCard
from hookbook.deferred import later
from hookbook.errors import DataError
from hookbook.request import Edit, Readout, Request, Row
from hookbook.results import Axes, DataFrame, Result
from hookbook.show.plots import lines, site_labels
from hookbook.show.tidy import controls, tidy
from hookbook.sites import Site
from hookbook.tasks import Question, Splits, Task
from hookbook.vectors import Vector


@dataclass(frozen=True, eq=False)
class TaskSweep(Result):
    """Vectors of a task at every site, and how often each makes the model answer without examples, beside controls."""

    card: ModelCard
    task: str
    template: str
    mode: str
    """What was done with the vectors."""
    sites: tuple[Site, ...]
    values: Tensor
    """`[site, width]`"""
    validation: Tensor
    """`[site]` accuracy with which the site is chosen."""
    accuracy: Tensor
    """`[site]` accuracy on test queries, which chose nothing."""
    controls: dict[str, Tensor]
    """Of each control `[site]`, on test queries."""
    zero_shot: Tensor
    """Accuracy on test queries without the vector."""
    few_shot: Tensor
    """Accuracy on test queries with examples in the prompt."""
    settings: dict[str, Any]

    @property
    def best_index(self) -> int:
        """The site with the best validation accuracy, among `sites`; of several the first."""
        return int(self.validation.argmax())

    @property
    def best(self) -> Vector:
        """The vector of that site."""
        return self.vector(self.best_index)

    def vector(self, index: int) -> Vector:
        """The vector of one of `sites`."""
        made = f"{type(self).__name__} of {self.task}, {self.mode}"
        return Vector(self.card, self.sites[index], self.values[index].clone(), "-1", self.template, made, dict(self.settings))

    def to_frame(self) -> DataFrame:
        """One row for each site: `site`, `layer`, `norm`, `validation`, `accuracy`, `control NAME` of each control, `zero_shot`,
        `few_shot`."""
        return tidy(
            {"site": self.sites},
            norm=self.values.norm(dim=-1),
            validation=self.validation,
            accuracy=self.accuracy,
            **controls(self.controls),
            zero_shot=self.zero_shot,
            few_shot=self.few_shot,
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy by layer, with the controls, and the model's own accuracy with and without examples."""
        curves = {self.mode: self.accuracy, **self.controls}
        levels = {"with examples": float(self.few_shot), "without": float(self.zero_shot)}
        names, title = ("layer", f"accuracy on {self.task}"), f"{self.task}, {self.mode}, {self.card.model_id}"
        return lines(ax, curves, names, labels=site_labels(self.sites), levels=levels, title=title)


def judge(
    adapter: Adapter,
    parts: Splits,
    named: dict[str, list[Edit]],
    *,
    shots: int,
    queries: int,
    seed: int,
    match: Match,
    progress: bool | None,
    misled: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Ask under vectors.

    Args:
        named: Of the vector (`""`) and of each control an edit for each site.
        shots: Examples shown for the ceiling.
        match: See `hookbook.asking.right_tokens`.
        misled: Whose edits are also tried behind examples with rotated answers.

    Returns:
        The fields of `TaskSweep` that are measured; and accuracies behind such examples, `[site]` by name and of nobody as `none`.
    """
    n = min(queries, len(parts.test))
    validation = parts.validation.questions(n=min(queries, len(parts.validation)), seed=seed)
    test = parts.test.questions(n=n, seed=seed)
    asked, where = [*validation, *test], {"validation": range(len(validation)), "test": range(len(validation), len(validation) + n)}
    for name, wrong in (("examples", False), ("misled", True)):
        if name == "examples" or misled:
            where[name] = range(len(asked), len(asked) + n)
            asked += parts.test.questions(parts.train, shots, n, seed=seed, shuffled=wrong)
    prompts, answers = encode_questions(adapter, asked)
    wanted = right_tokens(adapter, asked, answers, match)
    runs: list[tuple[str, str, list[Any]]] = [
        ("zero_shot", "test", [None]),
        ("few_shot", "examples", [None]),
        ("validation", "validation", named[""]),
    ]
    runs += [("control " + name, "test", edits) for name, edits in named.items()]
    runs += [("misled none", "misled", [None])] * bool(misled) + [("misled " + name, "misled", named[name]) for name in misled]
    rows = [Row(i, () if edit is None else (edit,)) for _, on, edits in runs for i in where[on] for edit in edits]
    numbers, sizes = [row.prompt for row in rows], [len(where[on]) * len(edits) for _, on, edits in runs]
    reply = adapter.run(Request(prompts, rows, (), Readout(k=1)), progress=progress)
    right = (reply.said.topk_ids == wanted[numbers]).any(-1).double().split(sizes)
    shares = {name: part.unflatten(0, (-1, len(edits))).mean(0) for part, (name, _, edits) in zip(right, runs, strict=True)}
    controls, behind = (
        {name.removeprefix(kind): share for name, share in shares.items() if name.startswith(kind)} for kind in ("control ", "misled ")
    )
    measured = {"validation": shares["validation"], "accuracy": controls.pop(""), "controls": controls}
    measured |= {"zero_shot": shares["zero_shot"][0], "few_shot": shares["few_shot"][0]}
    return measured | {"queries": [len(validation), n]}, behind


def answered(adapter: Adapter, task: Task, shown: Task, *, shots: int, match: Match, seed: int, progress: bool | None) -> Any:
    """The pairs of a task, or a promise of them, that the model answers, each asked once behind examples of another."""
    asked = [
        question
        for at, pair in enumerate(task.pairs)
        for question in Task((pair,), task.name, task.template).questions(shown, shots, seed=seed + at)
    ]
    prompts, answers = encode_questions(adapter, asked)
    wanted = right_tokens(adapter, asked, answers, match)
    reply = adapter.run(Request(prompts, [Row(i) for i in range(len(prompts))], (), Readout(k=1)), progress=progress)
    return later(_kept, task, (reply.said.topk_ids == wanted).any(-1))


def _kept(task: Task, right: Tensor) -> Task:
    pairs = tuple(pair for pair, ok in zip(task.pairs, right.tolist(), strict=True) if ok)
    if not pairs:
        raise DataError(
            f"the model answers none of {task.name!r}", f"it was asked {len(task.pairs)}", "use another task, more shots or a larger model"
        )
    return replace(task, pairs=pairs)


def task_means(adapter: Adapter, sites: Sequence[Site], shown: dict[str, list[Question]], progress: bool | None) -> dict[str, Tensor]:
    """For each set of prompts the mean state at the last token, `[site, width]`."""
    prompts = [adapter.encode(question.text) for asked in shown.values() for question in asked]
    states = mean_states(adapter, prompts, sites, dtype=None, progress=progress)[0].transpose(0, 1).contiguous()
    return {name: part.mean(0) for name, part in zip(shown, states.split([len(asked) for asked in shown.values()]), strict=True)}
