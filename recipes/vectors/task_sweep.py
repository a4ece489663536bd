"""What task vectors, function vectors and their sums are judged by: answers without examples, at every site, beside controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookbook.card import ModelCard
from hookbook.errors import TokenError
from hookbook.request import Edit, Read, Readout, Request, Row
from hookbook.results import Result
from hookbook.show.plots import lines
from hookbook.show.tidy import controls, tidy
from hookbook.sites import Site
from hookbook.tasks import Question, Splits
from hookbook.tokens import Tokens
from hookbook.vectors import Vector

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from hookbook.adapter import Adapter


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

    def to_frame(self) -> pd.DataFrame:
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
        labels = (
            [str(site.layer) for site in self.sites] if len({site.name for site in self.sites}) == 1 else [str(site) for site in self.sites]
        )
        return lines(
            ax,
            curves,
            ("layer", f"accuracy on {self.task}"),
            labels=labels,
            levels=levels,
            title=f"{self.task}, {self.mode}, {self.card.model_id}",
        )


def judge(
    adapter: Adapter,
    parts: Splits,
    named: dict[str, list[Edit]],
    *,
    shots: int,
    queries: int,
    seed: int,
    progress: bool | None,
    misled: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Ask under vectors.

    Args:
        named: Of the vector (`""`) and of each control an edit for each site.
        shots: Examples shown for the ceiling.
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
    prompts, answers = coded(adapter, asked)
    runs: list[tuple[str, str, list[Any]]] = [
        ("zero_shot", "test", [None]),
        ("few_shot", "examples", [None]),
        ("validation", "validation", named[""]),
    ]
    runs += [("control " + name, "test", edits) for name, edits in named.items()]
    runs += [("misled none", "misled", [None])] * bool(misled) + [("misled " + name, "misled", named[name]) for name in misled]
    rows, numbers, ends = [], [], []
    for _, on, edits in runs:
        for i in where[on]:
            rows += [Row(i, () if edit is None else (edit,)) for edit in edits]
            numbers += [i] * len(edits)
        ends.append(len(rows))
    reply = adapter.run(Request(prompts, rows, (), Readout(k=1)), progress=progress)
    assert reply.readout is not None
    right, found, start = (reply.readout.topk_ids[:, 0] == answers[numbers]).double(), {}, 0
    for (name, _, edits), end in zip(runs, ends, strict=True):
        found[name] = right[start:end].unflatten(0, (-1, len(edits))).mean(0)
        start = end
    controls = {name.removeprefix("control "): values for name, values in found.items() if name.startswith("control ")}
    behind = {name.removeprefix("misled "): values for name, values in found.items() if name.startswith("misled ")}
    measured = {"validation": found["validation"], "accuracy": controls.pop(""), "controls": controls}
    measured |= {"zero_shot": found["zero_shot"][0], "few_shot": found["few_shot"][0]}
    return measured | {"cost": reply.cost, "queries": [len(validation), n]}, behind


def random_like(values: Tensor, seed: int) -> Tensor:
    """Noise `[n, width]` of the same lengths."""
    noise = torch.randn(tuple(values.shape), generator=torch.Generator().manual_seed(seed))
    return noise / noise.norm(dim=-1, keepdim=True) * values.norm(dim=-1, keepdim=True)


def states(adapter: Adapter, sites: Sequence[Site], questions: Sequence[Question], progress: bool | None) -> Tensor:
    """States at the last token, `[question, site, width]`."""
    prompts = [adapter.encode(question.text) for question in questions]
    reply = adapter.run(Request(prompts, [Row(i) for i in range(len(prompts))], [Read(site) for site in sites]), progress=progress)
    return torch.stack([reading.values.to(torch.promote_types(reading.values.dtype, torch.float32)) for reading in reply.readings], 1)


def mean_states(adapter: Adapter, sites: Sequence[Site], shown: dict[str, list[Question]], progress: bool | None) -> dict[str, Tensor]:
    """For each set of prompts the mean state at the last token, `[site, width]`."""
    found, start = {}, 0
    every = states(adapter, sites, [question for some in shown.values() for question in some], progress)
    for name, some in shown.items():
        found[name] = every[start : start + len(some)].mean(0)
        start += len(some)
    return found


def coded(adapter: Adapter, questions: Sequence[Question], bos: bool | None = None) -> tuple[list[Tokens], Tensor]:
    """Prompts, and the first token of each answer as it follows its prompt."""
    prompts, answers = [], []
    for question in questions:
        prompt, whole = adapter.encode(question.text, bos=bos), adapter.encode(question.text + question.answer, bos=bos)
        if whole.ids[: len(prompt)] != prompt.ids or len(whole) == len(prompt):
            raise TokenError(
                f"the answer {question.answer!r} after {question.text[-20:]!r}",
                "it changes how the prompt is cut into tokens",
                "use a template whose answer begins with a space",
            )
        prompts.append(prompt)
        answers.append(whole.ids[len(prompt)])
    return prompts, torch.tensor(answers)


def plain(x: Tensor) -> Tensor:
    """As results keep it."""
    return x.detach().float().cpu()
