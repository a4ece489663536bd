"""Vectors with where they come from: arithmetic that refuses what does not fit, files, and the way back into other tools."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hookbook.card import ModelCard
from hookbook.errors import EditError, Refused, SiteError
from hookbook.request import Edit, Op, Scope
from hookbook.results import Result, View
from hookbook.show.tidy import tidy
from hookbook.sites import Site
from hookbook.tokens import Position

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from hookbook.recipes.features.decomposition import Features, FeatureVector


@dataclass(frozen=True, eq=False)
class Vector(Result):
    """A direction in a model at a site.

    Example:
        >>> from hookbook.testing import toy
        >>> v = Vector.of(toy(), "resid_post.1", torch.arange(16.0))
        >>> float((v + v - 2 * v).norm), round(v.cosine(3 * v), 6)
        (0.0, 1.0)
    """

    card: ModelCard
    site: Site
    values: Tensor
    """`[width]` of the site, on the CPU."""
    position: str = "-1"
    """The token it was read at."""
    template: str = ""
    """The prompt it was read in, if there is one."""
    recipe: str = ""
    """What made it."""
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.values, Tensor) and type(self.values) is Tensor:
            if tuple(self.values.shape) != (self.site.width(self.card),):
                raise EditError(
                    f"a vector of shape {list(self.values.shape)} at {self.site}",
                    f"its width there is {self.site.width(self.card)}",
                    "give [width]",
                )
            if not bool(torch.isfinite(self.values).all()):
                raise EditError(f"a vector at {self.site} with NaN or infinity", "it would spread", "look for the step that made it")

    @classmethod
    def of(cls, model: Any, site: Site | str, values: Tensor, **more: Any) -> Vector:
        """A bare tensor as a vector of a model."""
        from hookbook.models.loading import wrap

        card = wrap(model).card
        return cls(card, Site.parse(site).check(card), torch.as_tensor(values).detach().cpu().float(), **more)

    def on(self, model: Any) -> Vector:
        """The same numbers as a vector of another model with this width, on purpose: of a tuned copy, or of a base model."""
        from hookbook.models.loading import wrap

        card = wrap(model).card
        return replace(self, card=card, site=self.site.check(card))

    @property
    def norm(self) -> Tensor:
        """Its length."""
        return self.values.norm()

    def _with(self, other: Vector, sign: str) -> Vector:
        if not isinstance(other, Vector):
            return NotImplemented
        why = self.card.unlike(other.card) if self.site == other.site else "they are directions in different spaces"
        if why:
            mine, theirs = (_kind(vector) for vector in (self, other))
            raise SiteError(
                f"a vector of {mine} {sign} one of {theirs}", why, "use vectors of one model and site, or on purpose `v.on(model)`"
            )
        values = self.values + other.values if sign == "+" else self.values - other.values
        return replace(self, values=values, recipe=f"({self.recipe or 'vector'} {sign} {other.recipe or 'vector'})", settings={})

    def __add__(self, other: Vector) -> Vector:
        return self._with(other, "+")

    def __sub__(self, other: Vector) -> Vector:
        return self._with(other, "-")

    def __mul__(self, factor: float) -> Vector:
        return replace(self, values=self.values * factor, recipe=f"{factor:g} {self.recipe or 'vector'}")

    __rmul__ = __mul__

    def __truediv__(self, factor: float) -> Vector:
        return self * (1 / factor)

    def __neg__(self) -> Vector:
        return self * -1.0

    def cosine(self, other: Vector) -> float:
        """The cosine of the angle to another."""
        self._with(other, "-")
        return float(torch.nn.functional.cosine_similarity(self.values.double(), other.values.double(), dim=0))

    def project_out(self, other: Vector) -> Vector:
        """What is left without the part along another."""
        self._with(other, "-")
        unit = other.values.double() / other.values.double().norm()
        values = self.values.double() - (self.values.double() @ unit) * unit
        return replace(
            self, values=values.to(self.values.dtype), recipe=f"({self.recipe or 'vector'} without {other.recipe or 'vector'})", settings={}
        )

    def decompose(
        self, sae: Features, *, method: Literal["pursuit", "encode"] = "pursuit", k: int = 20, nonnegative: bool = True
    ) -> FeatureVector:
        """This vector as features of a sparse autoencoder of its site.

        A state, such as a mean of states or a task vector by `replace`, is what an SAE was trained on: with `encode`, `v =
        decode(encode(v)) + error`, and the values are SAELens' activations. A difference of states, such as a steering vector, is not: the
        encoder's bias and thresholds are those of states, and negative parts mean something. With `pursuit` it is fitted by decoder rows
        alone, greedily, with all coefficients refitted at each step.

        Args:
            sae: What `hookbook.sae.attach` gave, or an SAE of SAELens whose hook name is this vector's site. A transcoder's rows are of
                its output.
            method: `pursuit` or `encode`.
            k: The most features of a pursuit, which stops earlier where its residual has less than a millionth of the squared length;
                `encode` keeps all that are active.
            nonnegative: Whether a pursuit's coefficients are 0 or more, as activations are.

        Raises:
            SiteError: The SAE is of another site or model.
            ModelError: What was given is no SAE, or one of another model.
            EditError: The vector is zero.
            Refused: `encode` with a transcoder, or with an SAE that brings states to one size.

        Source: Pati et al. 1993, orthogonal matching pursuit; Bruckstein et al. 2008, the same with coefficients of 0 or more. On what
            encoding misses in
        steering vectors: Mayne et al. 2024, arXiv:2411.08790.
        """
        from hookbook.recipes.features.decomposition import decompose

        return decompose(self, sae, method=method, k=k, nonnegative=nonnegative)

    def edit(self, op: Op = "add", strength: float = 1.0, *, position: Position = -1, scope: Scope = "prompt", to: float = 0.0) -> Edit:
        """An `Edit` for `hookbook.generate` and requests."""
        return Edit(self.site, self.values * strength if op in ("add", "set") else self.values, op, position, to, scope, card=self.card)

    def fwd_hooks(
        self, model: Any = None, *, strength: float = 1.0, position: int | slice = -1, op: Op = "add"
    ) -> list[tuple[str, Callable]]:
        """Hooks for TransformerLens: `bridge.run_with_hooks(tokens, fwd_hooks=vector.fwd_hooks(bridge))`.

        Args:
            model: What will run them, a TransformerBridge, a HookedTransformer, or SAELens' class of either: the names are those that it
                knows. None: names of a TransformerBridge; a HookedTransformer has them, too, but for `mlp_in` and `final_norm`. SAELens'
                `SAETransformerBridge` knows few of them, and a bridge skips a name that it does not know without a word.
            strength: What it is multiplied by.
            position: Index or slice of the token dimension, which must not be padded there.
            op: `add` or `set`.

        Raises:
            EditError: Another operation, one head or neuron, or attention; or the vector is of another model than `model`.
            Refused: `model` has no hook point for the site.
            ModelError: hookbook does not know `model`, or SAEs are spliced into it.
        """
        if op not in ("add", "set") or self.site.unit is not None or self.site.name == "attn_pattern":
            raise EditError(
                f"{op} at {self.site} as a TransformerLens hook", "only add and set at a whole site are written as hooks", "use edit()"
            )
        name = self.site.hook_name
        if model is not None:
            from hookbook.models.loading import wrap

            adapter = wrap(model)
            self.edit(op, strength).check(adapter.card, 1)
            adapter.require(self.site)
            if (name := adapter.hook_name(self.site)) is None:
                raise Refused(
                    f"{self.site} of a {type(adapter.model).__name__} as a TransformerLens hook",
                    "it has no hook point there",
                    "use edit(), or apply() inside a trace of nnsight",
                )

        def hook(x: Tensor, hook: Any) -> Tensor:
            value = (self.values * strength).to(x.device, x.dtype).reshape(x.shape[2:])
            x = x.clone()
            x[:, position] = x[:, position] + value if op == "add" else value
            return x

        return [(name, hook)]

    def apply(self, model: Any, *, strength: float = 1.0, position: int | slice = -1) -> None:
        """Add it inside an open trace of an nnsight model: `with model.trace(prompt): vector.apply(model)`.

        Only for sites of the stream: `resid_pre` and `resid_post`.
        """
        if self.site.name not in ("resid_pre", "resid_post"):
            raise EditError(f"{self.site} inside a trace", "only the stream's sites are named there", "use edit()")
        from hookbook.models.loading import nnsight_blocks

        block = nnsight_blocks(model)[self.site.layer or 0]
        if self.site.name == "resid_pre":
            block.input[:, position] += (self.values * strength).to(block.input.dtype)
            return
        output = block.output
        x = output[0] if isinstance(output, tuple) else output
        x[:, position] += (self.values * strength).to(x.device, x.dtype)

    def to_frame(self) -> pd.DataFrame:
        """One row for each number: `dimension`, `value`."""
        return tidy({"dimension": len(self.values)}, value=self.values)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Its numbers, sorted by size."""
        from hookbook.show.plots import lines

        curves, names = {"size": self.values.abs().sort(descending=True).values}, ("dimension, largest first", "absolute value")
        return lines(ax, curves, names, title=f"{self.recipe or 'vector'} at {self.site}, {self.card.model_id}")

    def view(self) -> View:
        """A table of its largest numbers."""
        top = self.values.abs().topk(min(20, len(self.values))).indices.tolist()
        frame = self.to_frame().iloc[top]
        return View.table(frame, f"{self.site} of {self.card.model_id}, norm {float(self.norm):.4g}: the largest")


def _kind(vector: Vector) -> str:
    card = vector.card
    return f"{card.model_id} ({card.architecture}, {card.d_model} wide) at {vector.site}"
