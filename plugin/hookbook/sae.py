"""Pretrained sparse autoencoders on any model: SAELens loads, encodes and decodes; here they meet hookbook's models, sites and edits.

from sae_lens import SAE

sae = hb.sae.attach(model, SAE.from_pretrained("gemma-scope-2-270m-pt-res", "layer_12_width_16k_l0_medium"))
hb.generate(model, "The weather today is", edits=[sae.edit(4711, to=300.0, scope="all")])
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookbook.deferred import hold
from hookbook.errors import DataError, EditError, ModelError, Refused, SiteError
from hookbook.loading import wrap
from hookbook.request import Edit, FeatureChange, Scope
from hookbook.sites import SITES, Site
from hookbook.tokens import Position, Tokens
from hookbook.travel.features import OWN, activations, sized
from hookbook.vectors import Vector

if TYPE_CHECKING:
    from sae_lens import SAE

    from hookbook.adapter import Adapter
    from hookbook.card import ModelCard

__all__ = ["AttachedSAE", "attach", "demo", "feature"]

EACH = ("standard", "jumprelu", "gated", "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
"""Architectures whose features are computed each from the input alone."""
DEMO = Path(__file__).parent / "data" / "sae"


@dataclass(frozen=True, eq=False)
class AttachedSAE:
    """An SAE or a transcoder of SAELens at its site of a model."""

    model: Adapter
    sae: SAE
    site: Site
    """What the encoder reads."""
    out: Site
    """What the decoder gives: the same, but for a transcoder."""
    bos: bool | None
    """Whether its prompts begin with a beginning-of-sequence token, as `hookbook.tokens.encode` takes it."""
    labels: Mapping[int, str] = field(default_factory=dict)
    """What features were said to be about."""
    maxima: Tensor | None = None
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

    def link(self, feature: int) -> str:
        """The feature's page on Neuronpedia; empty if the release has none."""
        return link(self.page, feature)

    def encode_prompts(self, prompts: Any) -> list[Tokens]:
        """Prompts as the SAE's training had them begin."""
        from hookbook.recipes.patchscopes import encode_prompts

        return encode_prompts(self.model, prompts, self.bos, False)

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
        """What SAELens' SAE makes of states: `[n, width]` at `out`. Inputs are encoded and decoded together, as normalising SAEs need it."""
        return reconstruct(self.sae, states)

    def both(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Activations and reconstruction of states, for one encoding."""
        return both(self.sae, states)

    def vector(self, index: int) -> Vector:
        """A feature's decoder row; see `feature`."""
        (index,) = self.chosen(index)
        row = directions(self.sae)[index].cpu().float()
        return Vector(self.model.card, self.out, row, recipe="sae feature", settings={"feature": index, "sae": self.name, "label": self.labels.get(index, "")})

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

        With `f` the activations of `x`, `f'` what they become and `W` the decoder's rows, the result is `x + (f' - f) W`: what the SAE does not
        reconstruct stays. Without `keep_error` it is the decoded `f'`.

        Args:
            features: Which.
            to: What they become, active or not (clamping); 0 takes them out.
            add: What is added to them.
            scale: What they are multiplied by.
            times_max: They become this many times their largest activation (`maxima`, see `attach`).
            keep_error: Whether what the SAE does not reconstruct stays.
            position: Of the prompt's tokens; None: every one but a beginning-of-sequence token; with the scopes `generated` and a tuple it is not used.
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
                    "times_max without maxima", "nobody measured them", "hb.sae.attach(model, sae, maxima=hb.feature_examples(sae, texts).maxima), or give to="
                )
            to = times_max * self.maxima[list(chosen)]
        value = torch.as_tensor(next(x for x in (to, add, scale) if x is not None))
        value = value if value.is_floating_point() else value.double()
        hold(torch.isfinite(value).all(), EditError("values for features with NaN or infinity", "they would spread", "look for the step that made them"))
        if not chosen:
            raise EditError("an edit of no features", "it would change nothing", "name some, or use splice()")
        if value.dim() > 1 or (value.dim() and len(value) != len(chosen)):
            raise EditError(f"values of shape {list(value.shape)} for {len(chosen)} features", "each takes one", "give a number, or one for each feature")
        value = value if value.dim() else value.repeat(len(chosen))
        nothing, one = torch.zeros(value.shape, dtype=value.dtype), torch.ones(value.shape, dtype=value.dtype)
        factor = one if add is not None else value if scale is not None else nothing
        return self._edit(chosen, factor, nothing if scale is not None else value, keep_error, position, scope)

    def keep_only(self, features: int | Sequence[int] = (), *, keep_error: bool = True, position: Position | None = None, scope: Scope = "prompt") -> Edit:
        """An edit that takes out every other feature; see `edit`."""
        chosen = torch.zeros(self.n_features)
        chosen[list(self.chosen(features))] = 1
        return self._edit(tuple(range(self.n_features)), chosen, torch.zeros(self.n_features), keep_error, position, scope)

    def splice(self, *, keep_error: bool = True, position: Position | None = None, scope: Scope = "prompt") -> Edit:
        """The SAE in the model's way, with nothing changed: the reconstruction, and with `keep_error` what it misses."""
        return self._edit(tuple(range(self.n_features)), torch.ones(self.n_features), torch.zeros(self.n_features), keep_error, position, scope)

    def _edit(self, chosen: tuple[int, ...], scale: Tensor, shift: Tensor, keep_error: bool, position: Position | None, scope: Scope) -> Edit:
        code, every = self.weights, len(chosen) == self.n_features and chosen == tuple(range(self.n_features))
        whole = not keep_error or bool(code["k"]) or every
        if not whole:
            code = _part(code, chosen)
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
        code = code if code["k"] else _part(code, chosen)
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
        return _code(self.sae, self.site, self.out)

    def chosen(self, features: Any) -> tuple[int, ...]:
        """Features as indices, each once, or `EditError`."""
        chosen = [features] if isinstance(features, Integral) and not isinstance(features, bool) else features
        if isinstance(chosen, Tensor):
            chosen = chosen.tolist()
        if not isinstance(chosen, Sequence) and type(chosen).__module__ == "numpy":
            chosen = chosen.tolist()
        if isinstance(chosen, str) or not isinstance(chosen, (Sequence, range)) or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in chosen):
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
    sae: SAE,
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
        sae: An SAE or a transcoder of SAELens: `SAE.from_pretrained(release, sae_id)`, `SAE.load_from_disk(folder)`.
        site: Where the encoder reads; None: the SAE's own hook name.
        out: Where the decoder writes; None: a transcoder's own hook name, or `site`.
        bos: Whether prompts begin with a beginning-of-sequence token; None: as the SAE says, or else the model's tokenizer.
        labels: What features are about: a dict, or a file of Neuronpedia's export (JSON or JSON lines with `index` and `description`).
        maxima: `[d_sae]` each feature's largest activation, for `times_max`, such as `hb.feature_examples(...).maxima`.
        same_model: Do not compare the model's name with the SAE's: you know that they are the same.

    Raises:
        ModelError: sae-lens is not installed, or what was given is no SAE; the SAE is of another model, or of weights that TransformerLens
            processed where these are not, or the other way round; or it was trained on scaled activations and the scale was never folded in.
        SiteError: Its hook name is no site of this model, or its width is another one.
        TokenError, DataError: `bos` differs from what the SAE says; labels or maxima that are none.
    """
    adapter = wrap(model)
    sae = checked_sae(sae)
    known = sae.cfg.metadata
    reads, writes = places(sae, adapter.card, site, out, same_model)
    for where in (reads, writes):
        adapter.require(where)
    if bos is not None and known.prepend_bos is not None and bos != known.prepend_bos:
        raise DataError(f"bos={bos}", f"this SAE was trained with prepend_bos={known.prepend_bos}", "leave bos out")
    bos = known.prepend_bos if bos is None else bos
    adapter.encode("a", bos=bos)  # raises if the tokenizer has no such token
    _check_processed(adapter, known)
    if maxima is not None:
        maxima = torch.as_tensor(maxima)
        if tuple(maxima.shape) != (sae.cfg.d_sae,):
            raise DataError(f"maxima of shape {list(maxima.shape)}", f"this SAE has {sae.cfg.d_sae} features", "give one for each")
    return AttachedSAE(adapter, sae, reads, writes, bos, _labels(labels), maxima)


def places(sae: SAE, card: ModelCard, site: Site | str | None = None, out: Site | str | None = None, same_model: bool = False) -> tuple[Site, Site]:
    """Where an SAE of SAELens reads and where it writes in a model; raises as `attach` does if it is of another one."""
    known = sae.cfg.metadata
    if not same_model and known.model_name and _name(known.model_name) != _name(card.model_id):
        raise ModelError(
            f"an SAE of {known.model_name} on {card.model_id}",
            "features of one model mean nothing in another",
            "load the model it was trained on, or pass same_model=True if this is it under another name",
        )
    name, after = known.hook_name, known.hf_hook_name or ""
    if name and name.endswith("hook_mlp_in") and "norm" in after and after.endswith(".output"):
        name = name.replace("hook_mlp_in", "mlp.hook_in")  # Gemma Scope 2's transcoders: TransformerLens' hook_mlp_in is before the norm, they read after it
    reads = _site(site, name, "site")
    writes = _site(out, known.hook_name_out, "out") if out is not None or known.hook_name_out else reads
    for where, width, what in ((reads, sae.cfg.d_in, "reads"), (writes, sae.W_dec.shape[1], "writes")):
        if where.check(card).width(card) != width:
            raise SiteError(f"an SAE that {what} {width} numbers at {where}", f"this model's width there is {where.width(card)}", "use an SAE of this model")
    if reads.order > writes.order:
        raise SiteError(f"a transcoder that reads {reads} and writes {writes}", "what it reads comes later", "swap site and out")
    if sae.cfg.normalize_activations in ("expected_average_only_in", "covariance_whitening"):
        raise ModelError(
            f"an SAE with normalize_activations={sae.cfg.normalize_activations!r}",
            "it was trained on scaled activations, and the scale is not in its weights",
            "fold it in: sae.fold_activation_norm_scaling_factor(factor)",
        )
    return reads, writes


def name_of(sae: SAE, card: ModelCard, site: Site) -> str:
    """What an SAE is called: where it is on Neuronpedia, or its model and site; and a fingerprint of its weights."""
    found = hashlib.sha256()
    for key, value in sorted(sae.state_dict().items()):
        wide = value.detach().double().cpu()
        for part in (wide,) if wide.dim() < 2 else (wide.sum(0), wide.sum(1)):
            found.update(key.encode() + part.contiguous().numpy().tobytes())
    return f"{sae.cfg.metadata.neuronpedia_id or f'{card.model_id} {site}'} {found.hexdigest()[:8]}"


def directions(sae: SAE) -> Tensor:
    """What an activation of 1 of each feature adds to the reconstruction, `[d_sae, d_out]`: the decoder's rows, of unit length if the decoder makes them so."""
    rows = sae.W_dec.detach()
    return rows / rows.norm(dim=-1, keepdim=True) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else rows


def feature(sae: AttachedSAE, index: int) -> Vector:
    """A feature's direction, its row of the decoder as it is, as a `Vector`: for steering, arithmetic, patching, files.

    Args:
        sae: What `attach` gave.
        index: Which feature.
    """
    return checked(sae).vector(index)


def checked(sae: Any) -> AttachedSAE:
    """An attached SAE, or `ModelError` for anything else."""
    if not isinstance(sae, AttachedSAE):
        raise ModelError(f"a {type(sae).__name__} in place of an attached SAE", "features are of a model and a site", "hb.sae.attach(model, sae)")
    return sae


def link(page: str, feature: int) -> str:
    """A feature's page on Neuronpedia, given where its SAE is there; empty if it is not."""
    return f"https://www.neuronpedia.org/{page}/{feature}" if page else ""


def demo() -> SAE:
    """The small SAE that ships, of `resid_post.9` of `gemma-3-270m`: for tests and first steps, not for science. Its report card is in `hookbook/data/sae`.

    For research load a published one: `SAE.from_pretrained("gemma-scope-2-270m-pt-res", "layer_9_width_16k_l0_medium")`.
    """
    return _sae_lens().SAE.load_from_disk(DEMO, dtype="float32")


@torch.no_grad()
def encode(sae: SAE, states: Tensor) -> Tensor:
    """SAELens' activations `[n, d_sae]`, dense, of states `[n, width]`."""
    return _dense(sae.encode(_shaped(sae, states)))


@torch.no_grad()
def reconstruct(sae: SAE, states: Tensor) -> Tensor:
    """SAELens' reconstruction `[n, width]` of states `[n, width]`, without an error term; a transcoder's, what it says the output is."""
    return both(sae, states)[1]


@torch.no_grad()
def both(sae: SAE, states: Tensor) -> tuple[Tensor, Tensor]:
    """What `encode` and what `reconstruct` give."""
    x = _shaped(sae, states)
    found = sae.encode(x)
    out = sae.decode(found)
    if getattr(sae, "W_skip", None) is not None:
        out = out + x.to(sae.dtype) @ sae.W_skip.T  # pyright: ignore
    return _dense(found), out.reshape(len(states), -1)


def _dense(found: Tensor) -> Tensor:
    return found.to_dense() if found.is_sparse else found


def _shaped(sae: SAE, states: Tensor) -> Tensor:
    states = states.to(sae.device, sae.dtype)
    if not sae.hook_z_reshaping_mode:
        return states
    return states[:, None]  # one head as wide as all: what it flattens anyway


def _sae_lens() -> Any:
    try:
        import sae_lens
    except ImportError as error:
        raise ModelError("sae-lens is not installed", str(error), 'pip install "hookbook[sae]", which needs transformer-lens below 4') from error
    return sae_lens


def checked_sae(sae: Any) -> Any:
    """An SAE of SAELens, or `ModelError`."""
    if isinstance(sae, tuple):
        raise ModelError("a tuple in place of an SAE", "older calls of SAELens gave the SAE, its settings and sparsities", "give the first of them")
    if not isinstance(sae, _sae_lens().SAE):
        raise ModelError(
            f"a {type(sae).__name__} in place of an SAE", "SAEs are SAELens'", "SAE.from_pretrained(release, sae_id), or SAE.load_from_disk(folder)"
        )
    return sae


def _name(name: str) -> str:
    """A model's name as TransformerLens knows it, without publisher and, of a model from a package, without its file's hash."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    name = re.sub(r"-[0-9a-f]{12}$", "", name)
    try:
        name = get_official_model_name(name)
    except ValueError:
        pass
    return name.rsplit("/", 1)[-1].lower()


def _site(given: Site | str | None, hook_name: str | None, argument: str) -> Site:
    if given is not None:
        return Site.parse(given)
    if not hook_name:
        raise SiteError("an SAE without a hook name", "it does not say where it was trained", f"give {argument}=, such as 'resid_post.9'")
    try:
        return Site.from_hook_name(hook_name)
    except SiteError as error:
        raise SiteError(
            f"an SAE of {hook_name!r}", f"this is none of the sites ({', '.join(SITES)})", f"give {argument}= if you know which site it is"
        ) from error


def _check_processed(adapter: Adapter, known: Any) -> None:
    """TransformerLens can centre what writes to the stream, which a LayerNorm does not see and an SAE does."""
    wanted = (known.model_from_pretrained_kwargs or {}).get("center_writing_weights")
    embedding = getattr(adapter.model, "W_E", None)
    if wanted is None or embedding is None or adapter.remote:
        return
    x = torch.randn(2, adapter.card.d_model, dtype=embedding.dtype, device=embedding.device, generator=torch.Generator(embedding.device).manual_seed(0))
    with torch.no_grad():
        layer_norm = bool((adapter.final_norm(x + 1) - adapter.final_norm(x)).abs().max() < 1e-3)
        centred = bool(embedding.mean(-1).abs().max() < 1e-3 * embedding.std())
    if layer_norm and wanted != centred:
        raise ModelError(
            f"an SAE of {'centred' if wanted else 'unprocessed'} weights on a model with {'centred' if centred else 'unprocessed'} ones",
            "the stream has another mean, which the SAE sees",
            "load the model with center_writing_weights=" + str(wanted),
        )


def _labels(labels: Any) -> dict[int, str]:
    if labels is None:
        return {}
    if isinstance(labels, (str, Path)):
        text = Path(labels).read_text(encoding="utf-8")
        try:
            items = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line.strip()]
            return {int(item["index"]): str(item["description"]) for item in items}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"labels in {labels}", f"no export of Neuronpedia: {error}", "give objects with 'index' and 'description'") from error
    if not isinstance(labels, Mapping):
        raise DataError(f"labels of type {type(labels).__name__}", "", "give a dict from features to texts, or a file")
    return {int(index): str(text) for index, text in labels.items()}


def _part(code: dict[str, Any], features: Sequence[int]) -> dict[str, Any]:
    """The code of some features."""
    at = torch.tensor(features, dtype=torch.long, device=code["reads"].device)
    return {key: part.index_select(0, at) if part is not None and key in OWN else part for key, part in code.items()}


@torch.no_grad()
def _code(sae: Any, site: Site, out: Site) -> dict[str, Any] | Refused:
    cfg, kind = sae.cfg, sae.cfg.architecture()
    if kind not in (*EACH, "topk"):
        return Refused(f"edits of features of a {kind} SAE", "its activations are not one product and one threshold", "read it, or steer along hb.sae.feature")
    if site != out and cfg.normalize_activations != "none":
        return Refused(f"edits of features of a transcoder with {cfg.normalize_activations}", "its output is not brought back to size", "read it")
    weights = {key: value.detach() for key, value in sae.state_dict().items()}
    gated, rescaled = kind == "gated", bool(getattr(cfg, "rescale_acts_by_decoder_norm", False))
    norms = weights["W_dec"].norm(dim=-1) if rescaled else None
    bias = weights["b_mag"] if gated else weights["b_enc"]
    code = {
        "reads": weights["W_enc"].T if norms is None else weights["W_enc"].T * norms[:, None],
        "centre": weights["b_dec"] if cfg.apply_b_dec_to_input and site == out else None,
        "gain": weights["r_mag"].exp() if gated else None,
        "bias": bias if norms is None else bias * norms,
        "gate": weights["b_gate"] if gated else bias if "threshold" in weights else None,
        "threshold": torch.zeros_like(bias) if gated else weights.get("threshold"),
        "k": int(cfg.k) if kind == "topk" else 0,
        "norm": cfg.normalize_activations,
        "writes": weights["W_dec"] if norms is None else weights["W_dec"] / norms[:, None],
        "offset": weights["b_dec"],
        "skip": weights.get("W_skip"),
    }
    x = torch.randn(8, cfg.d_in, generator=torch.Generator().manual_seed(0)).to(sae.device, sae.dtype) * cfg.d_in**0.5
    x = x + (weights["b_dec"] if site == out else 0)
    ours, theirs = activations(sized(x, cfg.normalize_activations)[0], code), encode(sae, x)
    if float((ours - theirs).abs().max()) > 1e-3 * (1 + float(theirs.abs().max())):
        return Refused(f"edits of features of this {kind} SAE", "what is computed inside the model differs from SAELens' encode", "read it")
    return code
