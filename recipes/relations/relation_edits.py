"""Edits through a linear relation: move a subject's state so that the model says another object, and see what else changes.

What the map reads, the model need not use. It does if moving the state along the map's inverse moves the answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookbook.adapter import Adapter
from hookbook.controls import random_like
from hookbook.errors import DataError, EditError, check_counts
from hookbook.recipe import ModelCard, later, plain, recipe, wrap
from hookbook.recipes.relations.linear_relations import LinearRelation
from hookbook.recipes.relations.subjects import Pair, subject_states
from hookbook.relations import Relation, Statement
from hookbook.request import Edit, Read, Readout, Request, Row
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.show.plots import lines, site_labels
from hookbook.show.tidy import Over, controls, spelled, tidy
from hookbook.sites import Site
from hookbook.tokens import vocabulary

RANKS = (10, 30, 60, 100, 150, 200, 300)
UNRELATED = ("Yesterday I read something about {} and", "They talked about {} for a long time, because")
"""Sentences about a subject which do not ask for the relation."""


@dataclass(frozen=True, eq=False)
class RelationEdits(Result):
    """How often the model says another subject's object after an edit of the subject's state, at every site and rank."""

    card: ModelCard
    relation: str
    changes: tuple[tuple[str, str, str, str], ...]
    """Subject, its object, the subject whose answer is wanted, and that answer. The model knows both; those of validation come first."""
    n_validation: int
    sites: tuple[Site, ...]
    ranks: tuple[int, ...]
    said: Tensor
    """`[change, site, rank]`: the token that the edited model says."""
    wanted: Tensor
    """`[change]`: the first token of the answer that is wanted."""
    vocab: dict[int, str]
    """The text of these tokens."""
    random: Tensor
    """`[site, rank]`: how often test changes succeed by noise of the edit's length."""
    substituted: Tensor
    """`[site]`: how often they succeed if the whole state is the other subject's."""
    divergence: Tensor
    """`[site, rank]`: KL divergence in nats of the next token after unrelated sentences about the subject, from the clean run to the
    edited one; the mean over sentences."""
    random_divergence: Tensor
    """`[site, rank]`: the same of noise."""
    settings: dict[str, Any]

    @property
    def validation(self) -> Tensor:
        """`[site, rank]`: how often changes of validation pairs succeed."""
        return self._share(slice(0, self.n_validation))

    @property
    def success(self) -> Tensor:
        """`[site, rank]`: how often changes of test pairs succeed."""
        return self._share(slice(self.n_validation, None))

    def _share(self, part: slice) -> Tensor:
        return (self.said[part] == self.wanted[part, None, None]).double().mean(0)

    @property
    def best_index(self) -> tuple[int, int]:
        """The site and the rank, as places in `sites` and `ranks`, that are best on validation; of several the first."""
        at = int(self.validation.argmax())
        return at // len(self.ranks), at % len(self.ranks)

    @property
    def best(self) -> tuple[Site, int]:
        """The site and the rank."""
        site, rank = self.best_index
        return self.sites[site], self.ranks[rank]

    def to_frame(self) -> DataFrame:
        """One row for each site and rank of the map: `site`, `layer`, `matrix_rank`, `validation`, `success`, `control random` and
        `control substituted` (the same of noise and of the other subject's state), `kl`, `random_kl`."""
        return tidy(
            {"site": self.sites, "matrix_rank": self.ranks},
            validation=self.validation,
            success=self.success,
            **controls({"random": self.random, "substituted": Over("site", self.substituted)}),
            kl=self.divergence,
            random_kl=self.random_divergence,
        )

    def said_frame(self) -> DataFrame:
        """What each change came to at the best site and rank: `subject`, `object`, `wanted`, `said`, `right`, `split`."""
        site, rank = self.best_index
        said = self.said[:, site, rank]
        split = ["validation" if i < self.n_validation else "test" for i in range(len(said))]
        changes = [(subject, own, wanted) for subject, own, _, wanted in self.changes]
        return tidy({"subject object wanted": changes}, said=spelled(said, self.vocab), right=said == self.wanted, split=split)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Success by layer at the best rank, with its controls."""
        rank = self.best_index[1]
        curves = {
            f"edit, rank {self.ranks[rank]}": self.success[:, rank],
            "random": self.random[:, rank],
            "the other's state": self.substituted,
        }
        return lines(
            ax,
            curves,
            ("layer of the edit", f"says the other object of {self.relation}"),
            labels=site_labels(self.sites),
            title=self._title(),
        )

    def plot_ranks(self, ax: Axes | None = None) -> Axes:
        """Success by rank at the best layer."""
        site = self.best_index[0]
        curves = {f"edit, layer {site_labels(self.sites)[site]}": self.success[site], "random": self.random[site]}
        return lines(
            ax,
            curves,
            ("rank", f"says the other object of {self.relation}"),
            labels=[str(rank) for rank in self.ranks],
            title=self._title(),
        )

    def plot_divergence(self, ax: Axes | None = None) -> Axes:
        """What else changes, by layer at the best rank."""
        rank = self.best_index[1]
        curves = {f"edit, rank {self.ranks[rank]}": self.divergence[:, rank], "random": self.random_divergence[:, rank]}
        return lines(
            ax,
            curves,
            ("layer of the edit", "KL divergence after unrelated sentences (nats)"),
            labels=site_labels(self.sites),
            title=self._title(),
        )

    def _title(self) -> str:
        return f"Edits of {self.relation}, {self.card.model_id}"

    def view(self) -> View:
        """The table of `said_frame()`."""
        return View.table(self.said_frame(), f"{self._title()}: what each came to at the best layer and rank")


@recipe
def edit_relation(
    model: Any,
    relation: LinearRelation,
    *,
    layers: Any = None,
    ranks: Sequence[int] | None = None,
    changes: int = 20,
    unrelated: Sequence[str] = UNRELATED,
    n_unrelated: int = 5,
    seed: int = 0,
    progress: bool | None = None,
) -> RelationEdits:
    """Make the model say another subject's object, by the low-rank inverse of the relation's map, and count how often it does.

    With `o` and `o'` the last block's outputs for the subject and for another one, `W+ (o' - o)` is added to the subject's state at its
    last token; `W+` is the pseudo-inverse of the largest singular values of `W`. All sites and ranks of all changes are one request.
    Controls: noise of the same length, and the other subject's whole state; and how far the next token after sentences which do not ask for
    the relation moves.

    Args:
        model: The model that the relation is of.
        relation: What `hookbook.linear_relation` returned. Subjects are its known validation pairs, by which the best site and rank are
            chosen, and its known test pairs.
        layers: Those of the relation's layers to edit; None: all.
        ranks: None: some from 10 to 300, and all of `d_model`.
        changes: The most changes of validation pairs, and of test pairs.
        unrelated: Sentences with `{}` for the subject.
        n_unrelated: The most test changes on which these are tried.
        seed: Of the drawing of other subjects and of noise.
        progress: Show a progress bar; None: for long work only.

    Returns:
        `RelationEdits`; an answer is right if it is the first token of the object.

    Raises:
        EditError: The relation is of another model, or has no such rank.
        DataError: The known pairs of a part have only one object, or an unrelated sentence has no place for the subject.

    Source: Hernandez et al. 2023, arXiv:2308.09124, section 5. As in the authors' code, `W` is inverted without `beta`.

    Differs: success is by the answer's first token; what else an edit changes, noise of the same length, and the other subject's state are
    measured beside it. Singular values that are only rounding, as of GPT-2 at full rank (`d_model`, the last default), have 0 as their
    inverse here, and theirs is noise. Prompts begin as in `linear_relation`.

    Example:
        found = hb.linear_relation(model, hb.relations.load("country_capital"))
        edits = hb.edit_relation(model, found)
        edits.best, edits.success.max()
    """
    adapter = wrap(model)
    relation.check_model(adapter.card)
    check_counts(changes=changes, n_unrelated=n_unrelated)
    d = adapter.card.d_model
    ranks = tuple([rank for rank in RANKS if rank < d] + [d] if ranks is None else ranks)
    if not ranks or not all(1 <= rank <= d for rank in ranks):
        raise EditError(f"ranks={list(ranks)}", f"W has ranks 1 to {d}", "use some of them")
    sites = relation.chosen(layers)
    if not unrelated:
        raise DataError("no unrelated sentences", "they show what else changes", "give one or more")
    drawn = {part: _changes(relation.pairs(part), changes, part, relation.relation, seed) for part in ("validation", "test")}
    every, n_validation = [*drawn["validation"], *drawn["test"]], len(drawn["validation"])
    sentences = [
        Relation((change[:2],), "unrelated", templates=(text,)).ask(change[0])
        for change in drawn["test"][:n_unrelated]
        for text in unrelated
    ]

    subjects = {
        pair: i for i, pair in enumerate(dict.fromkeys(pair for x, y, other, wanted in every for pair in ((x, y), (other, wanted))))
    }
    states = subject_states(adapter, [relation.ask(*pair) for pair in subjects], sites, progress)
    own, other = [subjects[x, y] for x, y, _, _ in every], [subjects[x, y] for _, _, x, y in every]
    moves = torch.stack([relation.moves(states.final[other] - states.final[own], ranks, site) for site in sites])
    noise = random_like(moves.flatten(0, 2), seed).view(moves.shape)
    asked = [(i, prompt, states.places[prompt]) for i, prompt in enumerate(own)]
    tested = asked[n_validation:]
    rows = [*_rows(sites, moves, asked), *_rows(sites, noise, tested)]
    whole = [states.subject[k].unbind(0) for k in range(len(sites))]
    rows += [Row(prompt, (Edit(site, whole[k][other[i]], "set", place),)) for i, prompt, place in tested for k, site in enumerate(sites)]
    reply = adapter.run(Request(states.prompts, rows, (), Readout(k=1)), progress=progress)
    grid, wanted = (len(sites), len(ranks)), states.answers[other]
    n = grid[0] * grid[1]
    said, luck, swapped = reply.said.topk_ids[:, 0].split([len(every) * n, len(tested) * n, len(tested) * grid[0]])
    said, target = said.unflatten(0, (len(every), *grid)), wanted[n_validation:]
    meant = [(n_validation + i // len(unrelated), sentence) for i, sentence in enumerate(sentences)]
    divergence = _divergence(adapter, meant, sites, (moves, noise), progress)
    return RelationEdits(
        card=adapter.card,
        relation=relation.relation,
        changes=tuple(every),
        n_validation=n_validation,
        sites=tuple(sites),
        ranks=ranks,
        said=said,
        wanted=wanted,
        vocab=later(vocabulary, adapter, said, wanted),
        random=(luck.unflatten(0, (len(tested), *grid)) == target[:, None, None]).double().mean(0),
        substituted=(swapped.unflatten(0, (len(tested), -1)) == target[:, None]).double().mean(0),
        divergence=later(plain, divergence[0]),
        random_divergence=later(plain, divergence[1]),
        settings={"unrelated": list(unrelated)},
    )


def _changes(pairs: Sequence[Pair], n: int, part: str, name: str, seed: int) -> list[tuple[str, str, str, str]]:
    """Known pairs, each with another whose object is wanted instead."""
    if len({y for _, y in pairs}) < 2:
        raise DataError(
            f"{len(pairs)} known {part} pairs of {name!r} to change",
            "there is no other object to change to",
            "use a relation that the model knows better",
        )
    draw = random.Random(f"{seed} {part} {name}")
    return [(*pair, *draw.choice([one for one in pairs if one[1] != pair[1]])) for pair in draw.sample(pairs, min(n, len(pairs)))]


def _rows(sites: Sequence[Site], values: Tensor, asked: Sequence[tuple[int, int, int]]) -> list[Row]:
    """For each change, prompt and place in `asked` every site and rank of `values` `[site, rank, change, d_model]`."""
    apart = [[some.unbind(0) for some in value.unbind(0)] for value in values.unbind(0)]
    return [
        Row(prompt, (Edit(site, some[i], "add", place),))
        for i, prompt, place in asked
        for site, by_rank in zip(sites, apart, strict=True)
        for some in by_rank
    ]


def _divergence(
    adapter: Adapter, meant: Sequence[tuple[int, Statement]], sites: Sequence[Site], kinds: Sequence[Tensor], progress: bool | None
) -> Tensor:
    """How far edits of some changes move the next token after sentences, `[kind, site, rank]`."""
    prompts = [adapter.encode(sentence.text) for _, sentence in meant]
    asked = [(i, prompt, sentence.subject_at(prompts[prompt])) for prompt, (i, sentence) in enumerate(meant)]
    rows = [row for kind in kinds for row in _rows(sites, kind, asked)] + [Row(i) for i in range(len(prompts))]
    reply = adapter.run(Request(prompts, rows, [Read(Site("resid_post", adapter.card.n_layers - 1))]), progress=progress)
    ends = reply.readings[0].values
    edited, clean = ends.split([len(rows) - len(prompts), len(prompts)])
    edited = edited.unflatten(0, (len(kinds), len(prompts), -1)).transpose(0, 1).flatten(1, 2)
    found = adapter.lens(torch.cat([edited, clean[:, None]], 1)).kl[:, :-1]
    return found.mean(0).unflatten(0, (len(kinds), len(sites), -1))
