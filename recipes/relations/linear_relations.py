"""Linear relations (LRE): a relation as one affine map from the subject's state to the state that says the object.

The map is the model's own first-order expansion, averaged over a few subjects. It is judged by what it says about
subjects that were not among them, beside maps that know less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookbook.asking import encode_questions
from hookbook.deferred import Later
from hookbook.errors import DataError, EditError, Refused, SiteError, TokenError, check_counts
from hookbook.maps import Affine
from hookbook.recipe import ModelCard, hold, later, plain, recipe, wrap
from hookbook.recipes.reading.jacobians import jacobian
from hookbook.recipes.relations.subjects import OTHERS, Pair, others, share, split, subject_states
from hookbook.recipes.steering.generation import Generation, generate
from hookbook.relations import Relation, Statement
from hookbook.request import Each, Edit, Read
from hookbook.results import Axes, DataFrame, Result
from hookbook.show.plots import lines, site_labels
from hookbook.show.tidy import controls, tidy
from hookbook.sites import Site, layers_to_sites

BETAS = tuple(round(0.25 * i, 2) for i in range(21))


@dataclass(frozen=True, eq=False)
class LinearRelation(Result):
    """A relation's map `o = beta W s + b` at every site, and how often it says the object, beside other maps.

    Accuracies are over held-out subjects whose object the model itself says; of an answer's first token among all tokens.
    """

    card: ModelCard
    relation: str
    template: str
    answer: str
    """How the object follows the template."""
    train: tuple[Pair, ...]
    """The pairs whose expansions are averaged, and which every prompt states first."""
    validation: tuple[Pair, ...]
    """The pairs that choose the site and `beta`."""
    test: tuple[Pair, ...]
    """The pairs that chose nothing."""
    validation_known: Tensor
    """`[validation]`: whether the model says the object itself."""
    test_known: Tensor
    """`[test]`"""
    sites: tuple[Site, ...]
    """Where the subject's state is read, at its last token."""
    weight: Tensor
    """`[site, d_model, d_model]`: `W`, which is applied to a state as `W s`."""
    bias: Tensor
    """`[site, d_model]`: `b`."""
    betas: tuple[float, ...]
    """Those that were tried, ascending."""
    beta: Tensor
    """`[site]`: the best on validation pairs; of several the smallest."""
    chosen_by: Tensor
    """`[site, beta]`: faithfulness on validation pairs."""
    faithfulness: Tensor
    """`[site]`: on test pairs, with `beta`."""
    controls: dict[str, Tensor]
    """Of each other map `[site]`, on test pairs."""
    settings: dict[str, Any]

    @property
    def best_index(self) -> int:
        """The place in `sites` of the site that is best on validation pairs; of several the first."""
        return int(self.chosen_by.amax(-1).argmax())

    @property
    def best(self) -> Site:
        """That site."""
        return self.sites[self.best_index]

    def place(self, layer: int | str | Site | None = None) -> int:
        """The place of a layer among `sites`; None: of the best."""
        if layer is None:
            return self.best_index
        site, *more = layers_to_sites(layer, self.card)
        if more:
            raise SiteError(f"{layer!r} as one layer", f"it is {1 + len(more)} of them", "name one")
        if site not in self.sites:
            raise SiteError(
                f"{site} in this relation", f"it has {', '.join(map(str, self.sites))}", "use one of them, or make it with this layer"
            )
        return self.sites.index(site)

    def affine(self, layer: Any = None, *, rank: int | None = None) -> Affine:
        """The map at a layer, `beta W` and `b`; with `rank`, only as many of the largest singular values of `W`."""
        at = self.place(layer)
        weight = self.weight[at]
        if rank is not None:
            u, s, v = torch.linalg.svd(weight)
            keep = self.check_rank(rank)
            weight = u[:, :keep] * s[:keep] @ v[:keep]
        return Affine(self.beta[at] * weight, self.bias[at])

    def inverse(self, rank: int, layer: Any = None) -> Tensor:
        """The pseudo-inverse of `W`, of its largest singular values alone, `[d_model, d_model]`."""
        back, into = self.factors(rank, layer)
        return into @ back

    def factors(self, rank: int, layer: Any = None) -> tuple[Tensor, Tensor]:
        """The same as a product of two: `S^-1 U^T` `[rank, d_model]`, and `V` `[d_model, rank]` which comes after it.

        Singular values that are only rounding have no inverse: 0 stands for it. At the last layer that is all of them, unless the subject
            ends the prompt.
        """
        u, s, v = torch.linalg.svd(self.weight[self.place(layer)])
        keep = self.check_rank(rank)
        inverse = torch.where(s > torch.finfo(s.dtype).eps * s[0], 1 / s, 0)[:keep]
        return u[:, :keep].T * inverse[:, None], v[:keep].T

    def moves(self, change: Tensor, ranks: Sequence[int], layer: Any = None) -> Tensor:
        """What is added to subjects' states for changes of the output `[n, d_model]`: `W+` times these, `[rank, n, d_model]`."""
        wide = torch.promote_types(change.dtype, torch.float32)
        back, into = (factor.to(wide) for factor in self.factors(max(ranks), layer))
        along = change.to(wide) @ back.T
        return torch.stack([along[:, :rank] @ into[:, :rank].T for rank in ranks])

    def pairs(self, part: str) -> list[Pair]:
        """The pairs of a part, `validation` or `test`, which the model knows."""
        every, known = {"validation": (self.validation, self.validation_known), "test": (self.test, self.test_known)}[part]
        return [pair for pair, ok in zip(every, known.tolist(), strict=True) if ok]

    def check_rank(self, rank: int) -> int:
        """A rank that `W` can have, or `EditError`."""
        if not 1 <= rank <= self.card.d_model:
            raise EditError(f"rank {rank}", f"W has ranks 1 to {self.card.d_model}", "use one of them")
        return rank

    def chosen(self, layers: Any = None) -> list[Site]:
        """Those of `sites` that layers name; None: all."""
        return list(self.sites) if layers is None else [self.sites[self.place(site)] for site in layers_to_sites(layers, self.card)]

    def check_model(self, card: ModelCard) -> None:
        """Raise `EditError` if the relation is of another model, and `Refused` if it is still being made."""
        if isinstance(self.weight, Later):
            raise Refused(
                "a relation whose numbers are not here yet",
                "which pairs are known, and the best layer, decide what is asked next",
                "leave the job first",
            )
        if not self.card.same_model(card):
            raise EditError(
                f"a relation of {self.card.model_id} in {card.model_id}", "its map is of another stream", "make it with this model"
            )

    def __call__(self, states: Tensor, layer: Any = None, *, rank: int | None = None) -> Tensor:
        """What subjects' states `[..., d_model]` of a layer are mapped to; read it with `Adapter.readout`."""
        if states.shape[-1] != self.card.d_model:
            raise EditError(f"states of width {states.shape[-1]}", f"this map takes {self.card.d_model}", "give states of the same model")
        site = self.sites[self.place(layer)]
        return self.affine(layer, rank=rank)(states, site, site)

    def edit(self, model: Any, subject: str, answer: str, **settings: Any) -> Generation:
        """Make the model answer something else about a subject; see `hookbook.change_answer`, which also has a plan and can be
        submitted."""
        relation: Any = self
        return change_answer(model, relation, subject, answer, **settings)

    def ask(self, subject: str, answer: str = "?") -> Statement:
        """The relation's prompt about any subject, behind the training pairs."""
        return Relation(self.train, self.relation, templates=(self.template,), answer=self.answer).ask(subject, self.train, answer)

    def to_frame(self) -> DataFrame:
        """One row for each site: `site`, `layer`, `beta`, `validation`, `faithfulness`, `control NAME` of each other map, `known`,
        `asked`."""
        return tidy(
            {"site": self.sites},
            beta=self.beta,
            validation=self.chosen_by.amax(-1),
            faithfulness=self.faithfulness,
            **controls(self.controls),
            known=self.test_known.sum(),
            asked=len(self.test),
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Faithfulness by layer, with the other maps."""
        names = ("layer of the subject's state", f"faithfulness on {self.relation}")
        return lines(
            ax,
            {"linear relation": self.faithfulness, **self.controls},
            names,
            labels=site_labels(self.sites),
            title=f"{self.relation}, {self.card.model_id}",
        )

    def plot_betas(self, ax: Axes | None = None) -> Axes:
        """Faithfulness on validation pairs by `beta`, at the best layer and two others."""
        order = [self.best_index, *(at for at in (0, len(self.sites) // 2) if at != self.best_index)]
        curves = {f"layer {site_labels(self.sites)[at]}": self.chosen_by[at] for at in order}
        return lines(
            ax,
            curves,
            ("beta", f"faithfulness on {self.relation}"),
            labels=[f"{beta:g}" for beta in self.betas],
            title=f"{self.relation} by beta, {self.card.model_id}",
        )

    def plot_spectrum(self, ax: Axes | None = None) -> Axes:
        """The singular values of `W` at the best layer, over the largest."""
        values = torch.linalg.svdvals(self.weight[self.best_index])
        names = (f"rank, layer {site_labels(self.sites)[self.best_index]}", "singular value over the largest")
        return lines(
            ax, {"singular value": values / values[0]}, names, title=f"Spectrum of the map of {self.relation}, {self.card.model_id}"
        )


@recipe
def linear_relation(
    model: Any,
    relation: Relation,
    *,
    layers: Any = "all",
    betas: Sequence[float] = BETAS,
    n_train: int = 5,
    queries: int | None = None,
    ridge: float = 0.01,
    seed: int = 0,
    progress: bool | None = None,
) -> LinearRelation:
    """A relation as one affine map: the mean first-order expansion of the model around a few subjects.

    With `s` the subject's state at its last token and `F(s)` the last block's output at the last token of the prompt, before the final
    norm: `W` = mean of `dF/ds`, `b` = mean of `F(s) - dF/ds s`, and the map is `beta W s + b`. All layers come from the same backward
    passes. Every prompt states the other training pairs first; `layers` and `beta` are chosen on one half of the other pairs, and reported
    on the other half.

    Other maps, as controls: `beta = 1`; `logit lens`, the subject's state itself; `shift`, that state and the mean of `F(s) - s`; `bias`,
    `b` alone; `least squares`, fitted by ridge regression to the training pairs; `least squares, validation`, to the many validation pairs;
    and `random`, noise of the norm of `W`.

    Args:
        model: Any model `hookbook.wrap` takes whose backend keeps gradients.
        relation: What is asked; see `hookbook.relations`. The authors keep pairs which the model answers: `hb.known(model, relation)`.
        layers: Where the subject is read: `"all"`, a layer, a site of the stream, or a list; a bare layer is a block's output. The result
            holds a matrix of `d_model` squared for each.
        betas: Those to choose from; the default is the authors', 0 to 5.
        n_train: Pairs to average over, which are drawn.
        queries: The most validation pairs, and test pairs; None: all, half of them each.
        ridge: Of least squares: the penalty over the mean squared norm of the states.
        seed: Of the drawing.
        progress: Show a progress bar; None: for long work only.

    Returns:
        `LinearRelation`.

    Raises:
        DataError: Too few pairs, or the model answers none of validation or test.
        TokenError: An answer's first token depends on how it is cut.
        Refused: The backend keeps no gradients.

    Source: Hernandez et al. 2023, arXiv:2308.09124, sections 3 and 4. For what the map says of other prompts see
        `hookbook.attribute_lens`, for edits
    `hookbook.edit_relation`.

    Differs: an answer is right if it is the first token of the object, also of one of several tokens (the authors take any prefix, in
    lower case); training pairs are not required to be known; no end-of-sequence token is put before prompts, as theirs is for GPT models;
    and `layers="all"` leaves out the embedding, which is `"resid_pre.0"`.

    Example:
        found = hb.linear_relation(model, hb.relations.load("country_capital"))
        found.best, found.to_frame()
    """
    adapter = wrap(model)
    card = adapter.card
    sites, final = layers_to_sites(layers, card), Site("resid_post", card.n_layers - 1)
    for site in sites:
        if site.name not in ("resid_pre", "resid_post", "resid_mid", "embed"):
            raise SiteError(f"a subject's state at {site}", "a relation maps states of the stream", "use resid_pre or resid_post")
    check_counts(n_train=n_train, **{} if queries is None else {"queries": queries})
    if ridge < 0 or not betas:
        raise TokenError(
            f"ridge={ridge}, {len(betas)} betas", "there is nothing to choose from", "use a ridge of 0 or more, and at least one beta"
        )
    betas = sorted({float(beta) for beta in betas})
    train, validation, test = split(relation, n_train, queries, seed)
    shown = [relation.ask(x, train) for x, _ in train]
    prompts, _ = encode_questions(adapter, shown)
    around = [Read(site, Each(tuple(asked.subject_at(tokens) for asked, tokens in zip(shown, prompts, strict=True)))) for site in sites]
    found = jacobian(adapter, prompts, Read(final), around, mean=True, progress=progress)
    biases = [(found.output - product).mean(0) for product in found.products]

    states = subject_states(adapter, [relation.ask(x, train) for x, _ in (*validation, *test)], sites, progress)
    first, second = slice(0, len(validation)), slice(len(validation), None)
    known = {"validation": states.known[first], "test": states.known[second]}
    for name, some in known.items():
        nothing = f"the model says none of the {name} objects of {relation.name!r}"
        hold(some.any(), DataError(nothing, "there is nothing to judge by", "use another relation or template"))
    beta_values = torch.tensor(betas, dtype=found.output.dtype)
    chosen_by, chosen, told = [], [], []
    for k, (weight, bias) in enumerate(zip(found.matrices, biases, strict=True)):
        mapped = states.subject[k] @ weight.T
        said = share(adapter, beta_values[:, None, None] * mapped[first] + bias, states.answers[first], known["validation"])
        beta = beta_values.index_select(0, said.argmax()[None])
        maps = {"": beta * mapped[second] + bias, "beta = 1": mapped[second] + bias}
        maps |= others(found, k, beta, bias, states, first, second, ridge, seed)
        chosen_by.append(said)
        chosen.append(beta)
        told.append(share(adapter, torch.stack(list(maps.values())), states.answers[second], known["test"]))
    names = ("", "beta = 1", *OTHERS)
    measured = {name: torch.stack(values) for name, values in zip(names, zip(*told, strict=True), strict=True)}
    return LinearRelation(
        card=card,
        relation=relation.name,
        template=relation.templates[0],
        answer=relation.answer,
        train=train,
        validation=validation,
        test=test,
        validation_known=known["validation"],
        test_known=known["test"],
        sites=tuple(sites),
        weight=later(plain, torch.stack(found.matrices)),
        bias=later(plain, torch.stack(biases)),
        betas=tuple(betas),
        beta=later(plain, torch.cat(chosen)),
        chosen_by=torch.stack(chosen_by),
        faithfulness=measured.pop(""),
        controls=measured,
        settings={"vjps": n_train * card.d_model},
    )


@recipe
def change_answer(
    model: Any,
    relation: LinearRelation,
    subject: str,
    answer: str,
    *,
    sentence: str | None = None,
    layer: Any = None,
    rank: int = 100,
    max_new_tokens: int = 10,
    progress: bool | None = None,
) -> Generation:
    """Make the model answer something else about a subject, and go on from there; beside what it says unedited.

    Args:
        model: The model that the relation is of.
        relation: What `hookbook.linear_relation` returned.
        subject: Any subject.
        answer: Another object of the relation, which the subject is moved to.
        sentence: Where to try it, with `{}` for the subject; None: the relation's own prompt, behind its training pairs.
        layer: Where the subject's state is edited; None: where the relation is best. `RelationEdits.best` may be another.
        rank: Of the inverse.
        max_new_tokens: How many tokens to decode at most.
        progress: Show a progress bar; None: for long work only.

    Raises:
        EditError: The relation is of another model, or has no such rank.
        DataError: No pair of the relation has this answer, or it is the subject's own, or the sentence has no place for the subject.

    Source: Hernandez et al. 2023, arXiv:2308.09124, section 5.

    Differs: one change of one answer, as a text; `edit_relation` counts how often it succeeds, beside its controls.

    Example:
        found = hb.linear_relation(model, hb.relations.load("country_capital"))
        hb.change_answer(model, found, "France", "Rome").texts
    """
    adapter = wrap(model)
    relation.check_model(adapter.card)
    every = (*relation.train, *relation.validation, *relation.test)
    if (subject, answer) in every:
        raise DataError(f"{answer!r} for {subject!r}", "this is what the relation has already", "use another object")
    donors = [pair for pair in every if pair[1] == answer]
    if not donors:
        objects = ", ".join(sorted({y for _, y in every})[:8])
        raise DataError(
            f"no subject of {relation.relation!r} whose object is {answer!r}",
            "its state says what to move to",
            f"use another object, such as {objects}",
        )
    check_counts(max_new_tokens=max_new_tokens)
    site = relation.sites[relation.place(layer)]
    relation.check_rank(rank)
    own = relation.ask(subject)
    said = own if sentence is None else Relation(((subject, answer),), "sentence", templates=(sentence,)).ask(subject)
    prompt = adapter.encode(said.text)
    place = said.subject_at(prompt)
    states = subject_states(adapter, [own, relation.ask(*donors[0])], [site], progress)
    (move,) = relation.moves(states.final[1:] - states.final[:1], [rank], site)
    return generate(adapter, prompt, edits=[Edit(site, move[0], "add", place)], max_new_tokens=max_new_tokens, progress=progress)
