"""Sparse autoencoders on any model: SAELens loads, trains, encodes and decodes; here they meet hookbook's models, sites and edits.

sae = hb.sae.attach(model, ("gemma-scope-2-270m-pt-res", "layer_12_width_16k_l0_medium"))  # or a folder, or an SAE of SAELens
hb.generate(model, "The weather today is", edits=[sae.edit(4711, to=300.0, scope="all")])
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookbook.asking import encode_prompts
from hookbook.deferred import hold
from hookbook.errors import DataError, EditError, ModelError, Refused
from hookbook.models.loading import wrap
from hookbook.request import Edit, FeatureChange, Scope
from hookbook.sae.pretrained import found
from hookbook.sae.saelens import (
    both,
    check_processed,
    code_of,
    directions,
    encode,
    link,
    name_of,
    part,
    places,
    read_labels,
    reconstruct,
    sae_lens_module,
)
from hookbook.sites import Site
from hookbook.tokens import Position, Tokens
from hookbook.travel.features import activations, sized
from hookbook.vectors import Vector

if TYPE_CHECKING:
    from sae_lens import SAE

    from hookbook.adapter import Adapter
    from hookbook.recipes.features.sae_training import train as train

__all__ = ["AttachedSAE", "attach", "demo", "feature", "train"]

DEMO = Path(__file__).parents[1] / "data" / "sae"


def __getattr__(name: str) -> Any:
    if name == "train":  # a recipe, which stands above this
        return import_module("hookbook.recipes.features.sae_training").train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, eq=False)
class AttachedSAE:
    """An SAE or a transcoder of SAELens at its site of a model."""

    model: Adapter = field(repr=False)
    sae: SAE = field(repr=False)
    site: Site
    """What the encoder reads."""
    out: Site
    """What the decoder gives: the same, but for a transcoder."""
    bos: bool | None
    """Whether its prompts begin with a beginning-of-sequence token, as `hookbook.tokens.encode` takes it."""
    labels: Mapping[int, str] = field(default_factory=dict, repr=False)
    """What features were said to be about."""
    maxima: Tensor | None = field(default=None, repr=False)
    """`[d_sae]` each feature's largest activation on some texts."""

    @property
    def n_features(self) -> int:
        """How many features there are."""
        return self.sae.cfg.d_sae

    @cached_property
    def name(self) -> str:
        """See `name_of`."""
        return name_of(self.sae, self.model.card, self.site)

    @property
    def page(self) -> str:
        """Where it is on Neuronpedia; empty if the release is not."""
        return self.sae.cfg.metadata.neuronpedia_id or ""

    def labels_of(self, features: Iterable[int] | Tensor) -> dict[int, str]:
        """The labels of those features that have one."""
        return {feature: self.labels[feature] for feature in _listed(features) if feature in self.labels}

    def links_of(self, features: Iterable[int] | Tensor) -> dict[int, str]:
        """The pages of features on Neuronpedia; none if the release has none."""
        return {feature: link(self.page, feature) for feature in _listed(features) if self.page}

    def encode_prompts(self, prompts: Any) -> list[Tokens]:
        """Prompts as the SAE's training had them begin."""
        return encode_prompts(self.model, prompts, self.bos)

    @property
    def every(self) -> Position:
        """Every token but the beginning-of-sequence token, on which no SAE was trained."""
        return slice(1 if self.model.encode("a", bos=self.bos).ids[0] in self.special else 0, None)

    @cached_property
    def special(self) -> frozenset[int]:
        """Tokens on which activations mean nothing: special ones."""
        return frozenset(self.model.tokenizer.all_special_ids)

    def encode(self, states: Tensor) -> Tensor:
        """SAELens' activations `[n, d_sae]` of states `[n, width]` at `site`."""
        return encode(self.sae, states)

    def reconstruct(self, states: Tensor) -> Tensor:
        """What SAELens' SAE makes of states: `[n, width]` at `out`. Inputs are encoded and decoded together, as normalising SAEs need
        it."""
        return reconstruct(self.sae, states)

    def both(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Activations and reconstruction of states, for one encoding."""
        return both(self.sae, states)

    def vector(self, index: int) -> Vector:
        """A feature's decoder row; see `feature`."""
        (index,) = self.chosen(index)
        row = directions(self.sae)[index].cpu().float()
        return Vector(
            self.model.card,
            self.out,
            row,
            recipe="sae feature",
            settings={"feature": index, "sae": self.name, "label": self.labels.get(index, "")},
        )

    def edit(
        self,
        features: int | Sequence[int],
        *,
        to: float | Sequence[float] | Tensor | None = None,
        add: float | Sequence[float] | Tensor | None = None,
        scale: float | Sequence[float] | Tensor | None = None,
        times_max: float | None = None,
        keep_error: bool = True,
        position: Position | None = None,
        scope: Scope = "prompt",
    ) -> Edit:
        """An edit of features, all at once: what SAELens does with a hook on `hook_sae_acts_post`.

        With `f` the activations of `x`, `f'` what they become and `W` the decoder's rows, the result is `x + (f' - f) W`: what the SAE
        does not reconstruct stays. Without `keep_error` it is the decoded `f'`.

        Args:
            features: Which.
            to: What they become, active or not (clamping); 0 takes them out.
            add: What is added to them.
            scale: What they are multiplied by.
            times_max: They become this many times their largest activation (`maxima`, see `attach`).
            keep_error: Whether what the SAE does not reconstruct stays.
            position: Of the prompt's tokens; None: every one but a beginning-of-sequence token; with the scopes `generated` and a tuple it
                is not used.
            scope: See `hookbook.request.Edit`.

        Raises:
            EditError: Not one of `to`, `add`, `scale` and `times_max`, or no such feature.
            Refused: An architecture whose activations cannot be computed inside the model.
        """
        chosen = self.chosen(features)
        given = {"to": to, "add": add, "scale": scale, "times_max": times_max}
        asked = [name for name, value in given.items() if value is not None]
        if len(asked) != 1:
            raise EditError(f"{' and '.join(asked) or 'nothing'} for features", "one change is made", f"give one of {', '.join(given)}")
        if times_max is not None:
            if self.maxima is None:
                raise EditError(
                    "times_max without maxima",
                    "nobody measured them",
                    "hb.sae.attach(model, sae, maxima=hb.feature_examples(sae, texts).maxima), or give to=",
                )
            to = times_max * self.maxima[list(chosen)]
        value = torch.as_tensor(next(x for x in (to, add, scale) if x is not None))
        value = value if value.is_floating_point() else value.double()
        hold(
            torch.isfinite(value).all(),
            EditError("values for features with NaN or infinity", "they would spread", "look for the step that made them"),
        )
        if not chosen:
            raise EditError("an edit of no features", "it would change nothing", "name some, or use splice()")
        if value.dim() > 1 or (value.dim() and len(value) != len(chosen)):
            raise EditError(
                f"values of shape {list(value.shape)} for {len(chosen)} features",
                "each takes one",
                "give a number, or one for each feature",
            )
        value = value if value.dim() else value.repeat(len(chosen))
        nothing, one = torch.zeros(value.shape, dtype=value.dtype), torch.ones(value.shape, dtype=value.dtype)
        factor = one if add is not None else value if scale is not None else nothing
        return self._edit(chosen, factor, nothing if scale is not None else value, keep_error, position, scope)

    def keep_only(
        self, features: int | Sequence[int] = (), *, keep_error: bool = True, position: Position | None = None, scope: Scope = "prompt"
    ) -> Edit:
        """An edit that takes out every other feature; see `edit`."""
        chosen = torch.zeros(self.n_features)
        chosen[list(self.chosen(features))] = 1
        return self._edit(tuple(range(self.n_features)), chosen, torch.zeros(self.n_features), keep_error, position, scope)

    def splice(self, *, keep_error: bool = True, position: Position | None = None, scope: Scope = "prompt") -> Edit:
        """The SAE in the model's way, with nothing changed: the reconstruction, and with `keep_error` what it misses."""
        return self._edit(
            tuple(range(self.n_features)), torch.ones(self.n_features), torch.zeros(self.n_features), keep_error, position, scope
        )

    def _edit(
        self, chosen: tuple[int, ...], scale: Tensor, shift: Tensor, keep_error: bool, position: Position | None, scope: Scope
    ) -> Edit:
        code, every = self.weights, len(chosen) == self.n_features and chosen == tuple(range(self.n_features))
        whole = not keep_error or bool(code["k"]) or every
        if not whole:
            code = part(code, chosen)
        elif not every:
            at = torch.tensor(chosen, dtype=torch.long)
            scale, shift = (
                torch.ones(self.n_features, dtype=scale.dtype).index_put((at,), scale),
                torch.zeros(self.n_features, dtype=shift.dtype).index_put((at,), shift),
            )
        change = FeatureChange(code, chosen, scale, shift, self.name, whole, not keep_error, None if self.site == self.out else self.site)
        if position is None:
            position = self.every if scope in ("prompt", "all") else -1
        return Edit(self.out, change, "features", position, scope=scope, card=self.model.card)

    def activations(self, states: Tensor, features: int | Sequence[int]) -> Tensor:
        """Activations `[n, m]` of some features, as `encode`, by torch functions alone: `states` may be promises."""
        code, chosen = self.weights, self.chosen(features)
        code = code if code["k"] else part(code, chosen)
        code = {key: value.to(states.dtype).to(states.device) if isinstance(value, Tensor) else value for key, value in code.items()}
        found = activations(sized(states, code["norm"])[0], code)
        return found[:, list(chosen)] if code["k"] else found

    @property
    def weights(self) -> dict[str, Any]:
        """`code`, or raise why there is none."""
        if isinstance(self.code, Refused):
            raise self.code
        return self.code

    @cached_property
    def code(self) -> dict[str, Any] | Refused:
        """The weights as `hookbook.travel.features` takes them, or why it cannot; checked against SAELens' own activations."""
        return code_of(self.sae, self.site, self.out)

    def chosen(self, features: Any) -> tuple[int, ...]:
        """Features as indices, each once, or `EditError`."""
        chosen = [features] if isinstance(features, Integral) and not isinstance(features, bool) else features
        if isinstance(chosen, Tensor):
            chosen = chosen.tolist()
        if not isinstance(chosen, Sequence) and type(chosen).__module__ == "numpy":
            chosen = chosen.tolist()
        if (
            isinstance(chosen, str)
            or not isinstance(chosen, (Sequence, range))
            or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in chosen)
        ):
            raise EditError(f"{features!r} as features", "", "give an index, or a list of indices")
        chosen = tuple(int(i) for i in chosen)
        if len(set(chosen)) < len(chosen):
            raise EditError(f"features {list(chosen)}", "one is there twice", "name each once")
        outside = [i for i in chosen if not 0 <= i < self.n_features]
        if outside:
            raise EditError(f"no feature {outside[0]}", f"this SAE has features 0 to {self.n_features - 1}", "use one of them")
        return chosen


def attach(
    model: Any,
    sae: SAE | str | Path | tuple[str, str],
    *,
    site: Site | str | None = None,
    out: Site | str | None = None,
    bos: bool | None = None,
    labels: Mapping[int, str] | str | Path | None = None,
    maxima: Tensor | None = None,
    same_model: bool = False,
) -> AttachedSAE:
    """Bring an SAE and a model together, and check that they belong together.

    Args:
        model: Any model `hookbook.wrap` takes.
        sae: A folder, as SAELens' `save_model` or `save_inference_model` writes it, or as Gemma Scope 2 has it (`config.json` and
            `params.safetensors`); a release and an id of SAELens' table, `(release, id)`, which SAELens downloads; or an SAE or a
            transcoder of SAELens itself.
        site: Where the encoder reads; None: the SAE's own hook name.
        out: Where the decoder writes; None: a transcoder's own hook name, or `site`.
        bos: Whether prompts begin with a beginning-of-sequence token; None: as the SAE says, or else the model's tokenizer.
        labels: What features are about: a dict, or a file of Neuronpedia's export (JSON or JSON lines with `index` and `description`).
        maxima: `[d_sae]` each feature's largest activation, for `times_max`, such as `hb.feature_examples(...).maxima`.
        same_model: Do not compare the model's name with the SAE's: you know that they are the same.

    Raises:
        ModelError: sae-lens is not installed, or what was given is no SAE: near names of SAELens' table are said, and a name that needs a
            network where there is none; the SAE is of another model, or of weights that TransformerLens processed where these are not,
            or the other way round; or it was trained on scaled activations and the scale was never folded in.
        SiteError: Its hook name is no site of this model, or its width is another one.
        TokenError, DataError: `bos` differs from what the SAE says; labels or maxima that are none.
    """
    adapter = wrap(model)
    raw: Any = found(sae)
    known = raw.cfg.metadata
    reads, writes = places(raw, adapter.card, site, out, same_model)
    for where in (reads, writes):
        adapter.require(where)
    if bos is not None and known.prepend_bos is not None and bos != known.prepend_bos:
        raise DataError(f"bos={bos}", f"this SAE was trained with prepend_bos={known.prepend_bos}", "leave bos out")
    bos = known.prepend_bos if bos is None else bos
    adapter.encode("a", bos=bos)  # raises if the tokenizer has no such token
    check_processed(adapter, known)
    if maxima is not None:
        maxima = torch.as_tensor(maxima)
        if tuple(maxima.shape) != (raw.cfg.d_sae,):
            raise DataError(f"maxima of shape {list(maxima.shape)}", f"this SAE has {raw.cfg.d_sae} features", "give one for each")
    return AttachedSAE(adapter, raw, reads, writes, bos, read_labels(labels), maxima)


def feature(sae: AttachedSAE, index: int) -> Vector:
    """A feature's direction, its row of the decoder as it is, as a `Vector`: for steering, arithmetic, patching, files.

    Args:
        sae: What `attach` gave.
        index: Which feature.
    """
    return checked(sae).vector(index)


def _listed(features: Iterable[int] | Tensor) -> list[int]:
    return features.unique().tolist() if isinstance(features, Tensor) else list(features)


def checked(sae: Any) -> AttachedSAE:
    """An attached SAE, or `ModelError` for anything else."""
    if not isinstance(sae, AttachedSAE):
        raise ModelError(
            f"a {type(sae).__name__} in place of an attached SAE", "features are of a model and a site", "hb.sae.attach(model, sae)"
        )
    return sae


def demo() -> SAE:
    """The small SAE that ships, of `resid_post.9` of `gemma-3-270m`: for tests and first steps, not for science. Its report card is in
    `hookbook/data/sae`.

    For research take a published one: `hb.sae.attach(model, ("gemma-scope-2-270m-pt-res", "layer_9_width_16k_l0_medium"))`.
    """
    return sae_lens_module().SAE.load_from_disk(DEMO, dtype="float32")
