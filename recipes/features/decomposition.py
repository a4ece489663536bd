"""Vectors as features of a sparse autoencoder: which decoder rows a state or a direction is made of, and arithmetic on these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hookbook.card import ModelCard
from hookbook.errors import DataError, EditError, Refused, SiteError, check_counts
from hookbook.results import Axes, DataFrame, Result, View
from hookbook.sae import AttachedSAE
from hookbook.sae.saelens import checked_sae, directions, encode, link, name_of, places, reconstruct
from hookbook.show.plots import bars
from hookbook.show.tidy import tidy
from hookbook.sites import Site
from hookbook.vectors import Vector

if TYPE_CHECKING:
    from sae_lens import SAE

    Features = AttachedSAE | SAE

ENOUGH = 1e-6
"""A pursuit ends where the residual has this share of the squared length."""
ROWS = 8192
"""Of how many features products with decoder rows are taken at once."""


@dataclass(frozen=True, eq=False)
class FeatureVector(Result):
    """A vector as a sum of `m` decoder rows: `vector = values @ rows + offset + residual`.

    Sums, differences and multiples are those of all four. All numbers are float64.
    """

    card: ModelCard
    site: Site
    """Where the vector is, and the decoder writes."""
    sae: str
    """What the SAE is called, with a fingerprint of its weights."""
    method: str
    """`pursuit` or `encode`."""
    features: Tensor
    """`[m]`, the largest value first, whatever its sign."""
    values: Tensor
    """`[m]`: coefficients of the fit, or activations."""
    rows: Tensor
    """`[m, width]`: what each feature adds at a value of 1, its row of the decoder."""
    vector: Tensor
    """`[width]`: what was decomposed."""
    offset: Tensor
    """`[width]`: the decoder's bias, as often as it is in the sum; of a pursuit zero."""
    labels: dict[int, str]
    """What features were said to be about, where somebody did."""
    links: dict[int, str]
    """Features' pages on Neuronpedia, if the release has them."""
    recipe: str = ""
    """What made the vector."""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def fit(self) -> Tensor:
        """`[width]`: the sum of the features, and the offset."""
        return self.values @ self.rows + self.offset

    @property
    def residual(self) -> Tensor:
        """`[width]`: what the features leave; of an encoded state the SAE's error."""
        return self.vector - self.fit

    @property
    def residual_norm(self) -> Tensor:
        """Its length."""
        return self.residual.norm()

    @property
    def explained(self) -> Tensor:
        """The share of the squared length that the fit explains, `1 - |residual|^2 / |vector|^2`; below 0 if the fit is worse than none."""
        return 1 - self.residual_norm**2 / self.vector.norm() ** 2

    @property
    def shares(self) -> Tensor:
        """`[m]`: each feature's `value * (row . vector) / |vector|^2`. Of a pursuit they sum to `explained`, as its residual is
        orthogonal to its fit."""
        return self.values * (self.rows @ self.vector) / self.vector.norm() ** 2

    @property
    def cosines(self) -> Tensor:
        """`[m]`: of each feature's row and the vector."""
        return torch.nn.functional.cosine_similarity(self.rows, self.vector, dim=-1)

    def to_vector(self) -> Vector:
        """The fit, back in the model: for steering, patching, arithmetic."""
        settings = {"method": self.method, "sae": self.sae, "features": self.features.tolist(), "values": self.values.tolist()}
        return Vector(
            self.card, self.site, self.fit.float(), recipe=f"{self.recipe or 'vector'} in {len(self.features)} features", settings=settings
        )

    def _with(self, other: FeatureVector, sign: int) -> FeatureVector:
        if not isinstance(other, FeatureVector):
            return NotImplemented
        if (self.sae, self.site) != (other.sae, other.site) or not self.card.same_model(other.card):
            raise SiteError(
                f"features of {self.sae} with those of {other.sae}",
                "a feature of one SAE is none of another",
                "decompose both with one SAE",
            )
        features, place = torch.cat([self.features, other.features]).unique(return_inverse=True)
        values = torch.zeros(len(features), dtype=torch.float64).index_add(0, place, torch.cat([self.values, sign * other.values]))
        rows = torch.zeros(len(features), self.rows.shape[1], dtype=torch.float64).index_copy(0, place, torch.cat([self.rows, other.rows]))
        return _sorted(
            replace(
                self,
                method=self.method if self.method == other.method else f"{self.method} and {other.method}",
                features=features,
                values=values,
                rows=rows,
                vector=self.vector + sign * other.vector,
                offset=self.offset + sign * other.offset,
                labels=self.labels | other.labels,
                links=self.links | other.links,
                recipe=f"({self.recipe or 'vector'} {'+' if sign > 0 else '-'} {other.recipe or 'vector'})",
                settings={},
            )
        )

    def __add__(self, other: FeatureVector) -> FeatureVector:
        return self._with(other, 1)

    def __sub__(self, other: FeatureVector) -> FeatureVector:
        return self._with(other, -1)

    def __mul__(self, factor: float) -> FeatureVector:
        made = f"{factor:g} {self.recipe or 'vector'}"
        return _sorted(replace(self, values=self.values * factor, vector=self.vector * factor, offset=self.offset * factor, recipe=made))

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> FeatureVector:
        return self * (1 / factor)

    def __neg__(self) -> FeatureVector:
        return self * -1.0

    def cosine(self, other: FeatureVector) -> float:
        """The cosine of the angle to another in feature space, where every feature is an axis of its own."""
        if not isinstance(other, FeatureVector):
            raise EditError(
                f"the cosine of a FeatureVector and a {type(other).__name__}", "it is taken in feature space", "decompose both with one SAE"
            )
        self._with(other, -1)
        mine, theirs = (dict(zip(x.features.tolist(), x.values.tolist(), strict=True)) for x in (self, other))
        return sum(value * theirs.get(i, 0.0) for i, value in mine.items()) / float(self.values.norm() * other.values.norm())

    def to_frame(self) -> DataFrame:
        """One row for each feature: `feature`, `coefficient` (see `values`), `share` (of the squared length, see `shares`), `cosine`,
        `label`, `link`."""
        numbers = {"coefficient": self.values, "share": self.shares, "cosine": self.cosines}
        return tidy({"feature": self.features.tolist()}, **numbers, **about(self.features, self.labels, self.links))

    def plot(self, ax: Axes | None = None, *, n: int = 20) -> Axes:
        """The `n` largest values."""
        return bars(
            ax, feature_names(self.features[:n].tolist(), self.labels), self.values[:n], f"value ({self.method})", title=self._title()
        )

    def view(self) -> View:
        """The table of `to_frame()`, behind how much is explained."""
        return View.table(self.to_frame(), self._title())

    def _title(self) -> str:
        return f"{self.recipe or 'vector'} at {self.site}: {float(self.explained):.1%} explained by {len(self.features)} features"


def decompose(
    vector: Vector, sae: Features, *, method: Literal["pursuit", "encode"] = "pursuit", k: int = 20, nonnegative: bool = True
) -> FeatureVector:
    """A vector as features of an SAE; see `hookbook.Vector.decompose`."""
    if method not in ("pursuit", "encode"):
        raise DataError(f"method={method!r}", "", "use pursuit for directions, or encode for states")
    check_counts(k=k)
    bare, name, reads, labels = _placed(vector, sae)
    target = vector.values.detach().double().cpu()
    if not target.any():
        raise EditError(
            f"features of the zero vector at {vector.site}",
            "it has no direction, and no share of it can be told",
            "look for the step that made it",
        )
    every = directions(bare)
    if method == "pursuit":
        chosen, values = pursue(every, target, k, nonnegative)
        offset, settings = torch.zeros_like(target), {"k": k, "nonnegative": nonnegative}
    else:
        if reads != vector.site:
            raise Refused(
                f"activations of a transcoder at {vector.site}",
                f"its encoder reads {reads}, and its decoder makes something else",
                "use pursuit",
            )
        state = target[None].to(bare.dtype)
        found = encode(bare, state)[0].double().cpu()
        chosen, settings = found.nonzero()[:, 0], {}
        values, offset = found[chosen], bare.b_dec.detach().double().cpu()
        summed, said = values @ _wide(every, chosen) + offset, reconstruct(bare, state)[0].double().cpu()
        if (summed - said).norm() > 1e-3 * (1 + said.norm()):
            raise Refused(
                f"activations of a {bare.cfg.architecture()} SAE with normalize_activations={bare.cfg.normalize_activations!r} in place "
                f"of a vector",
                "its reconstruction is not the sum of activations times decoder rows, so they cannot be added up",
                "use pursuit, or sae.encode and sae.reconstruct",
            )
    numbers, page = chosen.tolist(), bare.cfg.metadata.neuronpedia_id
    return _sorted(
        FeatureVector(
            card=vector.card,
            site=vector.site,
            sae=name,
            method=method,
            features=chosen,
            values=values,
            rows=_wide(every, chosen),
            vector=target,
            offset=offset,
            labels=dict(labels),
            links={i: link(page, i) for i in numbers if page},
            recipe=vector.recipe,
            settings=settings,
        )
    )


def _placed(vector: Vector, sae: Any) -> tuple[SAE, str, Site, Mapping[int, str]]:
    """The SAE itself, its name, what it reads, and its labels, if it belongs to a vector's model and site."""
    if isinstance(sae, AttachedSAE):
        bare, name, card, reads, writes, labels = sae.sae, sae.name, sae.model.card, sae.site, sae.out, sae.labels
    else:
        bare, card, labels = checked_sae(sae), vector.card, {}
        reads, writes = places(bare, card)
        name = name_of(bare, card, reads)
    if not card.same_model(vector.card) or writes != vector.site:
        raise SiteError(
            f"a vector of {vector.card.model_id} at {vector.site} as features of {card.model_id} at {writes}",
            "they are directions in different spaces",
            "use a vector and an SAE of one model and site",
        )
    return bare, name, reads, labels


def _sorted(found: FeatureVector) -> FeatureVector:
    """The largest values first, none that is 0, and what is known of these features alone."""
    order = found.values.abs().argsort(descending=True, stable=True)
    order = order[found.values[order] != 0]
    features = found.features[order]
    labels, links = ({i: known[i] for i in features.tolist() if i in known} for known in (found.labels, found.links))
    return replace(found, features=features, values=found.values[order], rows=found.rows[order], labels=labels, links=links)


def about(features: Tensor, labels: Mapping[int, str], links: Mapping[int, str] | str) -> dict[str, list[str]]:
    """The last columns of a frame with features `[m]`: `label`, and `link`, of each or of where all are on Neuronpedia."""
    listed = features.tolist()
    pages = [link(links, i) if isinstance(links, str) else links.get(i, "") for i in listed]
    return {"label": [labels.get(i, "") for i in listed], "link": pages}


def feature_names(features: list[int], labels: Mapping[int, str]) -> list[str]:
    """Features in a picture: their numbers, and labels where there are some."""
    return [f"{i} {labels.get(i, '')[:40]}".strip() for i in features]


def pursue(rows: Tensor, target: Tensor, k: int, nonnegative: bool) -> tuple[Tensor, Tensor]:
    """Orthogonal matching pursuit in float64: at most `k` of `rows` `[n, width]`, and their coefficients, all of them refitted at each
    step.

    Args:
        rows: The dictionary, of any lengths.
        target: `[width]`
        k: The most steps; fewer if the residual's share of the squared length falls below `ENOUGH`, or nothing is along the residual.
        nonnegative: Only rows that point along the residual are taken, and coefficients are those of non-negative least squares.
    """
    size = torch.cat([part.cpu().double().norm(dim=-1) for part in rows.split(ROWS)])
    size = size.masked_fill(size == 0, torch.inf)  # of dead features
    chosen, values, residual = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.float64), target
    while len(chosen) < min(k, len(rows)) and residual @ residual >= ENOUGH * (target @ target):
        along = torch.cat([part.cpu().double() @ residual for part in rows.split(ROWS)]) / size
        along = (along if nonnegative else along.abs()).index_fill(0, chosen, -torch.inf)
        best = along.argmax()
        if along[best] <= 1e-12 * target.norm():
            break
        chosen = torch.cat([chosen, best[None]])
        part = _wide(rows, chosen)
        values = nnls(part, target) if nonnegative else _least_squares(part, target)
        residual = target - values @ part
    return chosen, values


def nnls(rows: Tensor, target: Tensor) -> Tensor:
    """Coefficients `[n]`, none below 0, of the sum of `rows` `[n, width]` nearest to `target` `[width]`; by the active sets of Lawson and
    Hanson (1974)."""
    values, free = torch.zeros(len(rows), dtype=rows.dtype), torch.zeros(len(rows), dtype=torch.bool)
    least = 1e-12 * rows.norm(dim=-1) * target.norm()
    for _ in range(3 * len(rows)):
        gain = (rows @ (target - values @ rows)).masked_fill(free, -torch.inf)
        if not (gain > least).any():
            break
        free[gain.argmax()] = True
        while True:
            wanted = torch.zeros_like(values)
            wanted[free] = _least_squares(rows[free], target)
            below = free & (wanted <= 0)
            if not below.any():
                break
            step = (values[below] / (values[below] - wanted[below]).clamp(min=torch.finfo(rows.dtype).tiny)).min()
            values = values + step * (wanted - values)
            free &= values > 1e-14 * values.max()
            values = values * free
        values = wanted
    return values


def _least_squares(rows: Tensor, target: Tensor) -> Tensor:
    return torch.linalg.lstsq(rows.T, target[:, None], driver="gelsd").solution[:, 0]


def _wide(rows: Tensor, chosen: Tensor) -> Tensor:
    return rows[chosen.to(rows.device)].cpu().double()
