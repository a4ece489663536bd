"""Backpatching: give an early layer the state that a later layer of the same run computed at the same token, and see whether the model now
answers.

Where it helps, the model has what it needs, but too late for the layers that would use it. That some pair of layers helps says
little: states of other questions repair some prompts, too. So each pair stands beside three controls, and a pair that
was chosen is judged on questions that did not choose it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from hookbook.adapter import Adapter
from hookbook.asking import Asked, as_question, one_token, pose
from hookbook.controls import check_controls, other_questions, random_like
from hookbook.errors import DataError, SiteError
from hookbook.hops import TwoHop
from hookbook.recipe import ModelCard, later, recipe, wrap
from hookbook.reply import Reply
from hookbook.request import Each, Edit, Read, Readout, Request, Row
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.show.plots import heat_map
from hookbook.show.text import need
from hookbook.show.tidy import tidy
from hookbook.sites import Site
from hookbook.tasks import Question
from hookbook.tokens import Position, Tokens, vocabulary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTROLS = ("shuffled", "random", "swapped")


class Rate(NamedTuple):
    """Shares of questions that a set of pairs makes right."""

    any: float
    """By at least one pair: an upper bound, for nobody knows beforehand which."""
    mean: float
    """By a pair, on average."""


@dataclass(frozen=True)
class BestPair:
    """The pair that makes most questions of one half right, on the other half."""

    source: int
    target: int
    chosen_at: float
    """The share of the half that chose it."""
    rates: dict[str, float]
    """The share of the other half, of `patch` and of each control."""
    n: int
    """How many questions that half has."""


@dataclass(frozen=True, eq=False)
class Backpatch(Result):
    """What each pair of layers does to each of `n` questions, beside its controls, which are keys of `right`:

    - `patch`: the question's own state of the source layer, at the target layer;
    - `shuffled`: the state of another question, with another answer;
    - `random`: a random vector as long as the question's own state;
    - `swapped`: the question's own state the other way, from the target layer to the source layer.
    """

    card: ModelCard
    prompts: tuple[Tokens, ...]
    """`[n]`"""
    answers: tuple[str, ...]
    """`[n]`"""
    positions: tuple[int, ...]
    """`[n]`: the token that is patched, of each prompt."""
    pairs: tuple[tuple[int, int], ...]
    """Source and target layer: block outputs, from 0."""
    clean: Tensor
    """`[n]`: whether the question is answered without a patch."""
    right: dict[str, Tensor]
    """`[n, pair]`: whether it is answered with one."""
    clean_ids: Tensor
    """`[n]`: the likeliest next token without a patch."""
    token_ids: dict[str, Tensor]
    """`[n, pair]`: and with one."""
    clean_logprobs: Tensor
    """`[n]`: of the answer's first token without a patch, in nats."""
    logprobs: dict[str, Tensor]
    """`[n, pair]`: and with one."""
    vocab: dict[int, str]
    """The text of every token id in this result."""
    donors: tuple[int, ...]
    """`[n]`: the question whose states are the shuffled control, of each; empty without it."""
    order: tuple[int, ...]
    """`[n]`: the questions as they were drawn; those of them that are not answered are halved in this order to choose a pair."""
    settings: dict[str, Any]

    def shares(self, answered: bool = False) -> dict[str, Tensor]:
        """For each pair `[pair]` the share of the questions that were not answered which it fixes; or of those that were, which stay
        right."""
        chosen = self.clean if answered else ~self.clean
        return {name: right[chosen].float().mean(0) for name, right in self.right.items()}

    def region(
        self, sources: Collection[int] | None = None, targets: Collection[int] | None = None, *, answered: bool = False
    ) -> dict[str, Rate]:
        """Rates over the pairs of some source and target layers, such as `range(12, 18)` and `range(4, 12)`; of the swapped control, over
        the same pairs swapped.

        Args:
            sources, targets: None: all.
            answered: Over the questions that were answered, instead of those that were not.

        Returns:
            A rate for the patch and for each control; NaN if there are no such questions.

        Raises:
            SiteError: There are no such pairs.
        """
        chosen = self.clean if answered else ~self.clean
        pairs = [p for p, (s, t) in enumerate(self.pairs) if (sources is None or s in sources) and (targets is None or t in targets)]
        if not pairs:
            raise SiteError(
                f"no pairs from layers {sources} to layers {targets}",
                f"this result has {len(self.pairs)} pairs",
                "name layers of some of them",
            )
        found = {}
        for name, right in self.right.items():
            some = right[chosen][:, pairs].float()
            found[name] = Rate(float(some.amax(1).mean()), float(some.mean()))
        return found

    def best(self) -> BestPair:
        """Choose a pair on half of the questions that were not answered, and judge it on the others.

        Raises:
            DataError: There are fewer than two.
        """
        asked = [i for i in self.order if not self.clean[i]]
        if len(asked) < 2:
            raise DataError(
                f"{len(asked)} questions that were not answered", "one half chooses a pair and the other judges it", "give more questions"
            )
        validation, test = asked[: len(asked) // 2], asked[len(asked) // 2 :]
        chosen_at, at = self.right["patch"][validation].float().mean(0).max(0)
        source, target = self.pairs[int(at)]
        return BestPair(
            source, target, float(chosen_at), {name: float(right[test, at].float().mean()) for name, right in self.right.items()}, len(test)
        )

    def summary(self) -> DataFrame:
        """What to report. One row for the patch and each control: `any` and `mean` over pairs of the questions that were not answered, the
        `best` pair (chosen on one half of them, judged on the other; NaN if there are fewer than two), `kept` (mean over pairs of those
        that were), and `explained`, the row's mean as a share of the patch's: as much of the effect needs no state of the question's own
        at this place.
        """
        import pandas as pd

        every, kept = self.region(), self.region(answered=True)
        best = self.best().rates if int((~self.clean).sum()) > 1 else dict.fromkeys(every, float("nan"))
        patch = every["patch"].mean
        rows = [
            (name, rate.any, rate.mean, best[name], kept[name].mean, rate.mean / patch if patch else float("nan"))
            for name, rate in every.items()
        ]
        return pd.DataFrame(rows, columns=["control", "any", "mean", "best", "kept", "explained"])

    def to_frame(self) -> DataFrame:
        """One row for each pair and control: `control`, `layer` (of the source), `target_layer`, `fixed` (of the questions that were not
        answered), `kept` (of those that were)."""
        rows = [(name, *(pair[::-1] if name == "swapped" else pair)) for name in self.right for pair in self.pairs]
        fixed, kept = ([*self.shares(answered).values()] for answered in (False, True))
        return tidy({"control layer target_layer": rows}, fixed=fixed, kept=kept)

    def plot(self, ax: Axes | None = None, *, control: str = "patch", answered: bool = False) -> Axes:
        """A heat map, source layer by target layer, of the share of questions that each pair fixes, of the patch or of a control.

        Args:
            ax: Where to draw; None: a new figure.
            control: A key of `right`.
            answered: Of the questions that were answered, the share that stays right.
        """
        if control not in self.right:
            raise DataError(f"no control {control!r}", "", f"use one of {', '.join(self.right)}")
        shares = self.shares(answered)
        pairs = [(t, s) if control == "swapped" else (s, t) for s, t in self.pairs]
        sources, targets = (sorted({pair[side] for pair in pairs}) for side in (0, 1))
        values = torch.full((len(sources), len(targets)), float("nan"))
        for (source, target), share in zip(pairs, shares[control].tolist(), strict=True):
            values[sources.index(source), targets.index(target)] = share
        words = [[f"{x:.2f}".lstrip("0") if x == x else "·" for x in line] for line in values.tolist()]
        top = max(float(share.nan_to_num().max()) for share in shares.values()) or 1.0
        names = ("source layer", "target layer", f"{'kept' if answered else 'fixed'}, {control}")
        return heat_map(
            ax,
            values,
            words,
            [str(s) for s in sources],
            [str(t) for t in targets],
            names,
            upwards=True,
            limits=(0, top),
            title=f"Back-patching {self.card.model_id}: {control}",
        )

    def plot_controls(self, *, answered: bool = False) -> Figure:
        """The heat maps of the patch and of every control side by side, in the same colours."""
        plt = need("matplotlib.pyplot", "plot_controls()")
        wide = math.ceil(len(self.right) ** 0.5)
        high = math.ceil(len(self.right) / wide)
        figure, axes = plt.subplots(high, wide, figsize=(5 * wide, 4.2 * high), layout="constrained", squeeze=False)
        for ax, control in zip_longest(axes.flat, self.right):
            if control is None:
                ax.remove()
            else:
                self.plot(ax, control=control, answered=answered).set_title(control, loc="left")
        return figure

    def view(self) -> View:
        """The table of `summary()`, and of the pairs that fix most."""
        frame = self.to_frame().pivot_table("fixed", ["layer", "target_layer"], "control", sort=False, dropna=False)
        top = frame.sort_values("patch", ascending=False).head(20)
        return View.table(self.summary(), "The best pair of layers, and any pair") + View.table(
            top, "Share of questions fixed, by the pairs that fix most"
        )


@recipe
def backpatch(
    model: Any,
    questions: Sequence[Any],
    *,
    position: Position | Literal["bridge"] = -1,
    pairs: Literal["later to earlier"] | Sequence[tuple[int, int]] = "later to earlier",
    controls: Sequence[str] = CONTROLS,
    generate: int = 0,
    seed: int = 0,
    progress: bool | None = None,
) -> Backpatch:
    """Patch the output of a later block, from a question's own clean run, over the output of an earlier block at the same token, for every
    pair of blocks.

    Args:
        model: Any model `hookbook.wrap` takes.
        questions: Of `hookbook.hops`, or a `Question`, or a (text, answer), of which the answer follows after a space.
        position: The token: -1 the last, an index, a text (its last token), or "bridge": the last of the phrase that stands for the
            bridge, for questions in two hops.
        pairs: Source and target layer of each patch.
        controls: Which to run of `"shuffled"`, `"random"` and `"swapped"` (see `Backpatch`); each costs what the patches cost.
        generate: 0: an answer is right if its first token is the likeliest; else, as in the paper, if it is in so many greedily generated
            tokens, in any case (the paper: 10).
        seed: Of donors, of random vectors, and of the halves which choose and judge a pair.
        progress: Show a progress bar; None: for long work only.

    Returns:
        A `Backpatch`. Questions that were answered already and those that were not are told apart in it.

    Raises:
        DataError: No questions; one that is not in two hops, with `position="bridge"`; no other answer, for `"shuffled"`; an unknown
            control.
        SiteError: A pair of layers that are not in the model.
        TokenError: The position is not one token of every prompt; an answer's first token depends on how it is cut.

    Source: Biran et al. 2024, arXiv:2406.12775, section 5.

    Differs: the paper counts a question as fixed if any pair fixes it, by text; here its first token counts, every pair and their mean are
    given, and a pair is chosen on one half and judged on the other. The controls are ours: the donor of the shuffled one asks for another
    answer and, where there is one, is of the same two relations.

    Example:
        >>> from hookbook.testing import toy
        >>> found = backpatch(toy(), [("ab", "c"), ("de", "f")])
        >>> found.pairs, found.right["patch"].shape
        (((1, 0), (2, 0), (2, 1)), torch.Size([2, 3]))
    """
    adapter = wrap(model)
    asked = pose(adapter, [as_question(question) for question in questions], generate)
    names = ("patch", *check_controls(controls, CONTROLS))
    chosen = pairs_of(pairs, adapter.card)
    at = [place_of(question, prompt, position) for question, prompt in zip(asked.questions, asked.prompts, strict=True)]
    n, draw = len(at), random.Random(seed)
    order = draw.sample(range(n), n)
    donors = other_questions(asked.questions, draw, "answer") if "shuffled" in names else []
    layers = sorted({layer for pair in chosen for layer in pair})
    sites = {layer: Site("resid_post", layer) for layer in layers}

    reads = [Read(site, Each(tuple(at))) for site in sites.values()]
    ask_clean = Request(asked.prompts, [Row(i) for i in range(n)], reads, Readout(k=1, tokens=asked.answers[:, None]), generate)
    clean = adapter.run(ask_clean, progress=progress)
    states = torch.stack([reading.values for reading in clean.readings], 1)
    own = by_layer(states, layers)
    noise = by_layer(random_like(states.float().flatten(0, 1), seed).unflatten(0, (n, -1)), layers) if "random" in names else []

    def edit(name: str, i: int, source: int, target: int) -> Edit:
        if name == "swapped":
            source, target = target, source
        values = {"shuffled": lambda: own[donors[i]], "random": lambda: noise[i]}.get(name, lambda: own[i])()
        return Edit(sites[target], values[source], "set", at[i])

    rows = [Row(i, (edit(name, i, *pair),)) for i in range(n) for name in names for pair in chosen]
    found = patched(adapter, asked, at, clean, rows, names, chosen, generate, progress)
    return Backpatch(**found, donors=tuple(donors), order=tuple(order), settings={"rule": asked.rule})


def patched(
    adapter: Adapter,
    asked: Asked,
    at: Sequence[int],
    clean: Reply,
    rows: Sequence[Row],
    names: Sequence[str],
    pairs: tuple[tuple[int, int], ...],
    generate: int,
    progress: bool | None,
) -> dict[str, Any]:
    """Run rows of every question, name and pair, and lay out what came of them as `Backpatch` has it."""
    n, numbers = len(at), [row.prompt for row in rows]
    reply = adapter.run(Request(asked.prompts, rows, (), Readout(k=1, tokens=asked.answers[numbers][:, None]), generate), progress=progress)
    shape = (n, len(names), len(pairs))
    ids, logprobs = reply.said.topk_ids[:, 0], reply.said.token_logprobs[:, 0]
    return {
        "card": adapter.card,
        "prompts": tuple(asked.prompts),
        "answers": tuple(question.answer for question in asked.questions),
        "positions": tuple(at),
        "pairs": pairs,
        "clean": asked.right(adapter, clean, range(n)),
        "right": later(named, asked.right(adapter, reply, numbers), names, shape),
        "clean_ids": clean.said.topk_ids[:, 0],
        "token_ids": later(named, ids, names, shape),
        "clean_logprobs": clean.said.token_logprobs[:, 0],
        "logprobs": later(named, logprobs, names, shape),
        "vocab": later(vocabulary, adapter, clean.said.topk_ids, ids),
    }


def pairs_of(pairs: Any, card: ModelCard) -> tuple[tuple[int, int], ...]:
    """Source and target layers, checked."""
    if isinstance(pairs, str):
        if pairs != "later to earlier":
            raise SiteError(f"pairs={pairs!r}", "", "use 'later to earlier', or a list of (source, target)")
        return tuple((source, target) for source in range(card.n_layers) for target in range(source))
    found = tuple(dict.fromkeys((int(source), int(target)) for source, target in pairs))
    wrong = [pair for pair in found if not all(0 <= layer < card.n_layers for layer in pair)]
    if wrong or not found:
        raise SiteError(
            f"the pairs {wrong or found} of layers",
            f"this model has layers 0 to {card.n_layers - 1}",
            "give (source, target) of some of them",
        )
    return found


def place_of(question: Question, prompt: Tokens, position: Any) -> int:
    """The token that is patched."""
    if position != "bridge":
        return one_token(position, prompt)
    if not isinstance(question, TwoHop):
        raise DataError(
            f"the bridge of {question.text!r}", "this question has one hop", "give questions of hookbook.hops, or another position"
        )
    return question.subject_at(prompt)


def by_layer(states: Tensor, layers: Sequence[int]) -> list[dict[int, Tensor]]:
    """For each question its states by layer."""
    return [dict(zip(layers, some.unbind(0), strict=True)) for some in states.unbind(0)]


def named(x: Tensor, names: Sequence[str], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """`[n * control * pair]` as `[n, pair]` by control."""
    return dict(zip(names, x.unflatten(0, shape).unbind(1), strict=True))
