"""Linear relations (LRE): a relation as one affine map from the subject's state to the state that says the object.

The map is the model's own first-order expansion, averaged over a few subjects. It is judged by what it says about
subjects that were not among them, beside maps that know less.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookbook.asking import encode_questions
from hookbook.card import ModelCard
from hookbook.controls import random_like
from hookbook.deferred import Deferred, Later
from hookbook.errors import DataError, EditError, Refused, SiteError, TokenError, check_counts
from hookbook.maps import Affine
from hookbook.models.loading import wrap
from hookbook.recipe import hold, later, plain, recipe
from hookbook.recipes.reading.jacobians import Jacobian, jacobian
from hookbook.recipes.relations.subjects import SubjectStates, subject_states
from hookbook.relations import Relation, Statement
from hookbook.request import Each, Read
from hookbook.results import Result
from hookbook.show.plots import lines, site_labels
from hookbook.show.tidy import controls, tidy
from hookbook.sites import Site, layers_to_sites

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from hookbook.adapter import Adapter
    from hookbook.recipes.steering.generation import Generation

Pair = tuple[str, str]
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
    """`[n]` whether the model says the object itself."""
    test_known: Tensor
    """`[n]`"""
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
        from hookbook.recipes.relations.relation_edits import change_answer

        relation: Any = self
        return change_answer(model, relation, subject, answer, **settings)

    def ask(self, subject: str, answer: str = "?") -> Statement:
        """The relation's prompt about any subject, behind the training pairs."""
        return Relation(self.train, self.relation, templates=(self.template,), answer=self.answer).ask(subject, self.train, answer)

    def to_frame(self) -> pd.DataFrame:
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
    norm:
    `W` = mean of `dF/ds`, `b` = mean of `F(s) - dF/ds s`, and the map is `beta W s + b`. All layers come from the same backward passes.
    Every prompt states the other training pairs first; `layers` and `beta` are chosen on one half of the other pairs, and reported on the
    other half.

    Other maps, as controls: `beta = 1`; `logit lens`, the subject's state itself; `shift`, that state and the mean of `F(s) - s`; `bias`,
        `b` alone;
    `least squares`, fitted by ridge regression to the training pairs; `least squares, validation`, to the many validation pairs; and
    `random`, noise of the norm of `W`.

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
    lower case); training pairs are not required to be known; and `layers="all"` leaves out the embedding, which is `"resid_pre.0"`.
    """
    adapter = wrap(model)
    card = adapter.card
    sites, final = layers_to_sites(layers, card), Site("resid_post", card.n_layers - 1)
    for site in sites:
        if site.name not in ("resid_pre", "resid_post", "resid_mid", "embed"):
            raise SiteError(f"a subject's state at {site}", "a relation maps states of the stream", "use resid_pre or resid_post")
        adapter.require(site)
    check_counts(n_train=n_train)
    if queries is not None:
        check_counts(queries=queries)
    if ridge < 0 or not betas:
        raise TokenError(
            f"ridge={ridge}, {len(betas)} betas", "there is nothing to choose from", "use a ridge of 0 or more, and at least one beta"
        )
    betas = sorted({float(beta) for beta in betas})
    train, validation, test = _parts(relation, n_train, queries, seed)
    shown = [relation.ask(x, train) for x, _ in train]
    prompts, _ = encode_questions(adapter, shown)
    around = [Read(site, Each(tuple(asked.subject_at(tokens) for asked, tokens in zip(shown, prompts, strict=True)))) for site in sites]
    found = jacobian(adapter, prompts, Read(final), around, mean=True, progress=progress)
    biases = [(found.output - product).mean(0) for product in found.products]

    states = subject_states(adapter, [relation.ask(x, train) for x, _ in (*validation, *test)], sites, progress)
    first, second = slice(0, len(validation)), slice(len(validation), None)
    known = {"validation": states.known[first], "test": states.known[second]}
    for name, some in known.items():
        nothing = DataError(
            f"the model says none of the {name} objects of {relation.name!r}",
            "there is nothing to judge by",
            "use another relation or template",
        )
        hold(some.any(), nothing)
    beta_values = torch.tensor(betas, dtype=found.output.dtype)
    chosen_by, chosen, told = [], [], []
    for k, (weight, bias) in enumerate(zip(found.matrices, biases, strict=True)):
        mapped = states.subject[k] @ weight.T
        said = _share(adapter, beta_values[:, None, None] * mapped[first] + bias, states.answers[first], known["validation"])
        beta = beta_values.index_select(0, said.argmax()[None])
        maps = {"": beta * mapped[second] + bias, "beta = 1": mapped[second] + bias}
        maps |= _others(found, k, beta, bias, states, first, second, ridge, seed)
        chosen_by.append(said)
        chosen.append(beta)
        told.append(_share(adapter, torch.stack(list(maps.values())), states.answers[second], known["test"]))
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


OTHERS = ("logit lens", "shift", "bias", "least squares", "least squares, validation", "random")


def _others(
    found: Jacobian, k: int, beta: Tensor, bias: Tensor, states: SubjectStates, first: slice, second: slice, ridge: float, seed: int
) -> dict[str, Tensor]:
    """What other maps make of the test subjects' states at a site, `[n, d_model]` each."""
    s, train, weight = states.subject[k][second], found.inputs[k], found.matrices[k]
    noise = random_like(weight, seed + k, whole=True)
    fits = least_squares(train, found.output, s, ridge), least_squares(states.subject[k][first], states.final[first], s, ridge)
    said = (s, s + (found.output - train).mean(0), bias.expand(len(s), -1), *fits, beta * (s @ noise.T) + bias)
    return dict(zip(OTHERS, said, strict=True))


def least_squares(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
    """Ridge regression with a bias from `x` `[n, d_in]` to `y` `[n, d_out]`, at `new` `[m, d_in]`; the penalty is `ridge` times the mean
    squared norm of centred `x`."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, y, new = x.to(wide), y.to(wide), new.to(wide)
    centre, middle = x.mean(0), y.mean(0)
    u, s, v = torch.linalg.svd(x - centre, full_matrices=False)
    penalty = ridge * (s**2).sum() / len(x)
    shrunk = torch.where(s > torch.finfo(wide).eps * s[0], s / (s**2 + penalty), 0)
    return ((new - centre) @ v.T * shrunk @ u.T @ (y - middle) + middle).to(dtype)


def _share(adapter: Adapter, outputs: Tensor, answers: Tensor, known: Tensor) -> Tensor:
    """Of outputs `[map, n, d_model]` how often each map says the answer, over what is known, `[map]`."""
    if not isinstance(known, Deferred):  # the others need not be read; while it is not here which these are, all are
        outputs, answers, known = outputs[:, known], answers[known], known[known]
    said = adapter.readout(outputs.flatten(0, 1), k=1).topk_ids[:, 0].unflatten(0, (len(outputs), -1))
    return ((said == answers) & known).sum(1).double() / known.sum().clamp(min=1)


def _parts(relation: Relation, n_train: int, queries: int | None, seed: int) -> tuple[tuple[Pair, ...], tuple[Pair, ...], tuple[Pair, ...]]:
    """Pairs to expand around, to choose by and to judge by; the same for the same seed, whatever the order of the pairs."""
    if len(relation) < n_train + 2:
        raise DataError(
            f"{len(relation)} pairs of {relation.name!r}",
            f"{n_train} are to train, and others to choose and to judge by",
            "give more pairs, or use a smaller n_train",
        )
    pairs = sorted(relation.pairs)
    random.Random(f"{seed} {relation.name}").shuffle(pairs)
    train, rest = pairs[:n_train], pairs[n_train:]
    half = len(rest) // 2
    return tuple(train), tuple(rest[:half][:queries]), tuple(rest[half:][:queries])
