"""In-context vectors: what a few examples of a task write into the stream, used without the examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hookbook.card import ModelCard
from hookbook.deferred import later
from hookbook.errors import DataError, TokenError
from hookbook.loading import wrap
from hookbook.plots import lines
from hookbook.recipe import recipe
from hookbook.request import Edit, Read, Readout, Request, Row
from hookbook.results import Result, View, need
from hookbook.sites import Site, layers_to_sites
from hookbook.tasks import Question, Task
from hookbook.tokens import Tokens
from hookbook.vectors import Vector

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from hookbook.adapter import Adapter

CONTROLS = ("shuffled labels", "other task", "random")
"""What takes the vector's place: of examples whose answers are rotated, of another task, and noise of the same length."""


@dataclass(frozen=True, eq=False)
class TaskVectors(Result):
    """A task's vector at every layer, and how often it makes the model answer without examples, beside its controls."""

    card: ModelCard
    task: str
    template: str
    sites: tuple[Site, ...]
    values: Tensor
    """`[layer, width]`"""
    mode: str
    validation: Tensor
    """`[layer]` accuracy with which the layer is chosen."""
    accuracy: Tensor
    """`[layer]` accuracy on test queries, which chose nothing."""
    controls: dict[str, Tensor]
    """Of each control `[layer]`, on test queries."""
    zero_shot: Tensor
    """Accuracy on test queries without the vector."""
    few_shot: Tensor
    """Accuracy on test queries with examples in the prompt."""
    settings: dict[str, Any]

    @property
    def best_index(self) -> int:
        """The layer with the best validation accuracy, among `sites`; of several the first."""
        return int(self.validation.argmax())

    @property
    def best(self) -> Vector:
        """The vector of that layer."""
        return self.vector(self.best_index)

    def vector(self, index: int) -> Vector:
        """The vector of one of `sites`."""
        made = f"task_vector of {self.task}, {self.mode}"
        return Vector(self.card, self.sites[index], self.values[index].clone(), "-1", self.template, made, dict(self.settings))

    def to_frame(self) -> pd.DataFrame:
        """One row for each layer: `site`, `layer`, `norm`, `validation`, `accuracy`, one column for each control, `zero_shot`, `few_shot`."""
        import pandas as pd

        columns: dict[str, Any] = {
            "site": [str(site) for site in self.sites],
            "layer": [site.layer for site in self.sites],
            "norm": self.values.norm(dim=-1).tolist(),
        }
        columns |= {"validation": self.validation.tolist(), "accuracy": self.accuracy.tolist()}
        columns |= {name: values.tolist() for name, values in self.controls.items()}
        return pd.DataFrame(columns | {"zero_shot": float(self.zero_shot), "few_shot": float(self.few_shot)})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy by layer, with the controls, and the model's own accuracy with and without examples."""
        curves = {self.mode: self.accuracy, **self.controls}
        levels = {"with examples": float(self.few_shot), "without": float(self.zero_shot)}
        labels = [str(site.layer) for site in self.sites] if len({site.name for site in self.sites}) == 1 else [str(site) for site in self.sites]
        return lines(ax, curves, ("layer", f"accuracy on {self.task}"), labels=labels, levels=levels)

    def view(self) -> View:
        """The table of `to_frame()`."""
        need("pandas", "view()")
        return View(self.to_frame().to_html(index=False, float_format=lambda x: f"{x:.2f}"))


@recipe
def task_vector(
    model: Any,
    task: Task,
    *,
    layers: Any = "all",
    mode: Literal["replace", "difference"] = "replace",
    shots: int = 10,
    n_prompts: int = 64,
    other: Task | None = None,
    queries: int = 100,
    seed: int = 0,
    progress: bool | None = None,
) -> TaskVectors:
    """A task's vector at every layer: the mean state at the last token of prompts with examples.

    Args:
        model: Any model `hookbook.wrap` takes.
        task: What to find the vector of; see `hookbook.tasks`.
        layers: `"all"`, a layer, a site, or a list; a bare layer is a block's output.
        mode: `replace` sets the query's state to the mean, as Hendel et al. do; `difference` adds the mean less the mean state without examples.
        shots: Examples in a prompt.
        n_prompts: Prompts over which the mean is taken; their queries are training pairs, never tested ones.
        other: The task whose vector is a control; None: there is none.
        queries: The most queries of validation, and of test.
        seed: Of the split and of everything that is drawn.
        progress: Show a progress bar; None: for long work only.

    Returns:
        `TaskVectors`: accuracies are of the answer's first token among all tokens; the layer is chosen on validation pairs and
        reported on test pairs.

    Raises:
        DataError: The task has too few pairs to show and to ask.
        TokenError: An answer's first token depends on how it is cut.

    Source: Hendel, Geva and Globerson 2023, arXiv:2310.15916, sections 2 and 3; layers count block outputs from 0. It differs in that the mean is over
    many prompts, where the authors' code has a vector of its own for each test episode.
    """
    adapter = wrap(model)
    if mode not in ("replace", "difference"):
        raise DataError(f"mode={mode!r}", "", "use replace or difference")
    if shots < 1 or n_prompts < 1 or queries < 1:
        raise TokenError(f"shots={shots}, n_prompts={n_prompts}, queries={queries}", "there is nothing to average or to ask", "use 1 or more")
    sites = layers_to_sites(layers, adapter.card)
    parts = task.split(seed)
    shown = {
        "": parts.train.questions(shots=shots, n=n_prompts, seed=seed),
        "shuffled labels": parts.train.questions(shots=shots, n=n_prompts, seed=seed, shuffled=True),
    }
    if other is not None:
        shown["other task"] = other.split(seed).train.questions(shots=shots, n=n_prompts, seed=seed)
    if mode == "difference":
        shown["none"] = parts.train.questions(n=n_prompts, seed=seed)
    means = _mean_states(adapter, sites, shown, progress)
    if mode == "difference":
        means = {name: mean - means["none"] for name, mean in means.items() if name != "none"}
    noise = torch.randn(len(sites), means[""].shape[1], generator=torch.Generator().manual_seed(seed))
    means["random"] = noise / noise.norm(dim=-1, keepdim=True) * means[""].norm(dim=-1, keepdim=True)

    validation, test = (part.questions(n=min(queries, len(part)), seed=seed) for part in (parts.validation, parts.test))
    with_examples = parts.test.questions(parts.train, shots, min(queries, len(parts.test)), seed=seed)
    asked = [*validation, *test, *with_examples]
    prompts, answers = coded(adapter, asked)
    n_validation, n_test = len(validation), len(test)
    where = range(n_validation + n_test)
    rows, numbers = [Row(i) for i in range(n_validation, len(asked))], list(range(n_validation, len(asked)))
    for name, mean in means.items():
        edits = [Edit(site, mean[at], "set" if mode == "replace" else "add") for at, site in enumerate(sites)]
        for i in where if name == "" else where[n_validation:]:
            rows += [Row(i, (edit,)) for edit in edits]
            numbers += [i] * len(sites)
    reply = adapter.run(Request(prompts, rows, (), Readout(k=1)), progress=progress)
    assert reply.readout is not None
    right = (reply.readout.topk_ids[:, 0] == answers[numbers]).double()
    zero, few, rest = right[:n_test], right[n_test : 2 * n_test], right[2 * n_test :].unflatten(0, (-1, len(sites)))
    each = {"validation": rest[:n_validation].mean(0), "": rest[n_validation : n_validation + n_test].mean(0)}
    for at, name in enumerate(name for name in means if name):
        start = n_validation + (at + 1) * n_test
        each[name] = rest[start : start + n_test].mean(0)
    settings = {
        "mode": mode,
        "shots": shots,
        "n_prompts": n_prompts,
        "seed": seed,
        "queries": [n_validation, n_test],
        "other": None if other is None else other.name,
    }
    return TaskVectors(
        card=adapter.card,
        task=task.name,
        template=task.template.query + task.template.answer,
        sites=tuple(sites),
        values=later(_plain, means[""]),
        mode=mode,
        validation=each.pop("validation"),
        accuracy=each.pop(""),
        controls=each,
        zero_shot=zero.mean(),
        few_shot=few.mean(),
        settings=settings | {"cost": reply.cost},
    )


def _plain(x: Tensor) -> Tensor:
    return x.detach().float().cpu()


def _mean_states(adapter: Adapter, sites: Sequence[Site], shown: dict[str, list[Question]], progress: bool | None) -> dict[str, Tensor]:
    """For each set of prompts the mean state at the last token, `[site, width]`."""
    prompts = [adapter.encode(question.text) for some in shown.values() for question in some]
    reply = adapter.run(Request(prompts, [Row(i) for i in range(len(prompts))], [Read(site) for site in sites]), progress=progress)
    states = torch.stack([reading.values.to(torch.promote_types(reading.values.dtype, torch.float32)) for reading in reply.readings], 1)
    found, start = {}, 0
    for name, some in shown.items():
        found[name] = states[start : start + len(some)].mean(0)
        start += len(some)
    return found


def coded(adapter: Adapter, questions: Sequence[Question]) -> tuple[list[Tokens], Tensor]:
    """Prompts, and the first token of each answer as it follows its prompt."""
    prompts, answers = [], []
    for question in questions:
        prompt, whole = adapter.encode(question.text), adapter.encode(question.text + question.answer)
        if whole.ids[: len(prompt)] != prompt.ids or len(whole) == len(prompt):
            raise TokenError(
                f"the answer {question.answer!r} after {question.text[-20:]!r}",
                "it changes how the prompt is cut into tokens",
                "use a template whose answer begins with a space",
            )
        prompts.append(prompt)
        answers.append(whole.ids[len(prompt)])
    return prompts, torch.tensor(answers)
