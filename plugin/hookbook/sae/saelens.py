"""SAEs as SAELens has them, before they meet a model: whose they are, what they compute, and their weights as the forked pass takes
them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookbook.errors import DataError, ModelError, Refused, SiteError
from hookbook.sites import SITES, Site
from hookbook.travel.features import OWN, activations, sized

if TYPE_CHECKING:
    from sae_lens import SAE

    from hookbook.adapter import Adapter
    from hookbook.card import ModelCard

EACH = ("standard", "jumprelu", "gated", "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
"""Architectures whose features are computed each from the input alone."""


def places(
    sae: SAE, card: ModelCard, site: Site | str | None = None, out: Site | str | None = None, same_model: bool = False
) -> tuple[Site, Site]:
    """Where an SAE of SAELens reads and where it writes in a model; raises as `attach` does if it is of another one."""
    known = sae.cfg.metadata
    if not same_model and known.model_name and known_as(known.model_name) != known_as(card.model_id):
        raise ModelError(
            f"an SAE of {known.model_name} on {card.model_id}",
            "features of one model mean nothing in another",
            "load the model it was trained on, or pass same_model=True if this is it under another name",
        )
    name, after = known.hook_name, known.hf_hook_name or ""
    if name and name.endswith("hook_mlp_in") and "norm" in after and after.endswith(".output"):
        name = name.replace(
            "hook_mlp_in", "mlp.hook_in"
        )  # Gemma Scope 2's transcoders: TransformerLens' hook_mlp_in is before the norm, they read after it
    reads = _site(site, name, "site")
    writes = _site(out, known.hook_name_out, "out") if out is not None or known.hook_name_out else reads
    for where, width, what in ((reads, sae.cfg.d_in, "reads"), (writes, sae.W_dec.shape[1], "writes")):
        if where.check(card).width(card) != width:
            raise SiteError(
                f"an SAE that {what} {width} numbers at {where}",
                f"this model's width there is {where.width(card)}",
                "use an SAE of this model",
            )
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
    """What an activation of 1 of each feature adds to the reconstruction, `[d_sae, d_out]`: the decoder's rows, of unit length if the
    decoder makes them so."""
    rows = sae.W_dec.detach()
    return rows / rows.norm(dim=-1, keepdim=True) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else rows


def link(page: str, feature: int) -> str:
    """A feature's page on Neuronpedia, given where its SAE is there; empty if it is not."""
    return f"https://www.neuronpedia.org/{page}/{feature}" if page else ""


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


def sae_lens_module() -> Any:
    try:
        import sae_lens
    except ImportError as error:
        raise ModelError(
            "sae-lens is not installed", str(error), 'pip install "hookbook[sae]", which needs transformer-lens below 4'
        ) from error
    return sae_lens


def checked_sae(sae: Any) -> Any:
    """An SAE of SAELens, or `ModelError`."""
    if isinstance(sae, tuple):
        raise ModelError(
            "a tuple in place of an SAE", "older calls of SAELens gave the SAE, its settings and sparsities", "give the first of them"
        )
    if not isinstance(sae, sae_lens_module().SAE):
        raise ModelError(
            f"a {type(sae).__name__} in place of an SAE",
            "SAEs are SAELens'",
            "give a folder, (release, id), or an SAE of SAELens",
        )
    return sae


def known_as(name: str) -> str:
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


def centred(adapter: Adapter) -> bool | None:
    """Whether TransformerLens took the mean out of what writes to the stream; None where it makes no difference, or cannot be seen."""
    embedding = getattr(adapter.model, "W_E", None)
    if embedding is None or adapter.remote:
        return None
    x = torch.randn(
        2, adapter.card.d_model, dtype=embedding.dtype, device=embedding.device, generator=torch.Generator(embedding.device).manual_seed(0)
    )
    with torch.no_grad():
        layer_norm = bool((adapter.final_norm(x + 1) - adapter.final_norm(x)).abs().max() < 1e-3)
        return bool(embedding.mean(-1).abs().max() < 1e-3 * embedding.std()) if layer_norm else None


def check_processed(adapter: Adapter, known: Any) -> None:
    """TransformerLens can centre what writes to the stream, which a LayerNorm does not see and an SAE does."""
    wanted = (known.model_from_pretrained_kwargs or {}).get("center_writing_weights")
    found = None if wanted is None else centred(adapter)
    if found is not None and wanted != found:
        raise ModelError(
            f"an SAE of {'centred' if wanted else 'unprocessed'} weights on a model with {'centred' if found else 'unprocessed'} ones",
            "the stream has another mean, which the SAE sees",
            "load the model with center_writing_weights=" + str(wanted),
        )


def read_labels(labels: Any) -> dict[int, str]:
    if labels is None:
        return {}
    if isinstance(labels, (str, Path)):
        text = Path(labels).read_text(encoding="utf-8")
        try:
            items = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line.strip()]
            return {int(item["index"]): str(item["description"]) for item in items}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"labels in {labels}", f"no export of Neuronpedia: {error}", "give objects with 'index' and 'description'"
            ) from error
    if not isinstance(labels, Mapping):
        raise DataError(f"labels of type {type(labels).__name__}", "", "give a dict from features to texts, or a file")
    return {int(index): str(text) for index, text in labels.items()}


def part(code: dict[str, Any], features: Sequence[int]) -> dict[str, Any]:
    """The code of some features."""
    at = torch.tensor(features, dtype=torch.long, device=code["reads"].device)
    return {key: part.index_select(0, at) if part is not None and key in OWN else part for key, part in code.items()}


@torch.no_grad()
def code_of(sae: Any, site: Site, out: Site) -> dict[str, Any] | Refused:
    cfg, kind = sae.cfg, sae.cfg.architecture()
    if kind not in (*EACH, "topk"):
        return Refused(
            f"edits of features of a {kind} SAE",
            "its activations are not one product and one threshold",
            "read it, or steer along hb.sae.feature",
        )
    if site != out and cfg.normalize_activations != "none":
        return Refused(
            f"edits of features of a transcoder with {cfg.normalize_activations}", "its output is not brought back to size", "read it"
        )
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
