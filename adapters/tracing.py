"""nnsight models, run on this machine: TransformersModel and LanguageModel."""

from __future__ import annotations

from typing import Any

import torch
from nnsight import TransformersModel
from torch import Tensor
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

from hookbook.adapter import Adapter, ModelCard, versions
from hookbook.adapters import hf, weights
from hookbook.errors import ModelError, Refused
from hookbook.sites import INNER, Site
from hookbook.tokens import fingerprint
from hookbook.travel.climb import Climb
from hookbook.travel.passes import Passes, reach


def accepts(model: Any) -> bool:
    """Whether this adapter is for `model`."""
    return isinstance(model, TransformersModel)


def blocks_of(model: TransformersModel) -> list[Any]:
    """The envoys of a model's blocks."""
    config = model._module.config
    cfg = build_bridge_config_from_hf(
        config, determine_architecture_from_hf_config(config), hf.model_id(model._module), model._module.dtype
    )
    return list(reach(model, ArchitectureAdapterFactory.select_architecture_adapter(cfg).translate_transformer_lens_path("blocks")))


class TracingAdapter(Adapter):
    """An nnsight model through traces.

    Where a site lives in the module tree is what TransformerLens' architecture adapter for the model says.
    """

    def __init__(self, model: TransformersModel, tokenizer: Any = None) -> None:
        if not self.remote:
            if not model.dispatched:
                with hf.as_it_was(model.tokenizer):
                    model.dispatch()
        module = model._module
        hf.check_attention(module.config)
        self.model = model
        self.tokenizer = hf.has(tokenizer if tokenizer is not None else model.tokenizer)
        try:
            architecture = determine_architecture_from_hf_config(module.config)
            cfg = build_bridge_config_from_hf(module.config, architecture, hf.model_id(module), module.dtype)
            self.names = ArchitectureAdapterFactory.select_architecture_adapter(cfg)
        except ValueError as error:
            raise ModelError(
                f"{type(module).__name__} cannot be wrapped",
                f"TransformerLens has no architecture adapter for it ({error})",
                "register one with ArchitectureAdapterFactory.register_adapter",
            ) from error
        mapping: Any = self.names.component_mapping
        if "blocks" not in mapping:
            raise ModelError(
                f"{type(module).__name__} cannot be wrapped", "it is not a decoder with one stack of blocks", "use a causal language model"
            )
        path = self.names.translate_transformer_lens_path
        self.where = hf.Names(self.names, module)
        paths: dict[Any, str] = {"blocks": path("blocks"), "norm": path("ln_final"), "head": path("unembed")}
        self.passes = Passes(
            model,
            paths,
            INNER,
            hf.takes_positions(module),
            scale=float(self.names.apply_output_logits_transform(torch.tensor(1e-6, dtype=torch.float64))) / 1e-6,
            cap=cap if (cap := getattr(cfg, "output_logits_soft_cap", None)) and cap > 0 else None,
            device=hf.device(module),
        )
        self.card = ModelCard(
            backend="nnsight",
            model_id=hf.model_id(module),
            architecture=type(module).__name__,
            n_layers=len(self.passes.blocks),
            d_model=cfg.d_model,
            n_heads=cfg.n_heads,
            d_head=cfg.d_head,
            n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
            d_mlp=cfg.d_mlp or 4 * cfg.d_model,
            d_vocab=module.get_submodule(path("unembed")).weight.shape[0],
            n_ctx=cfg.n_ctx,
            dtype=hf.dtype_name(module),
            device=str(hf.device(module)),
            tokenizer=fingerprint(self.tokenizer),
            versions=versions("nnsight", "transformer-lens"),
        )

    @property
    def module(self) -> Any:
        return self.model._module

    @property
    def edits(self) -> tuple[str, ...]:
        return tuple(f"an edit of nnsight ({number})" for number, _ in enumerate(self.model._edits))

    def weights(self) -> Any:
        return weights.of_module(self.names, self.module)

    def runs_in(self) -> tuple[str, str]:
        self.passes.device = hf.device(self.module)
        return hf.dtype_name(self.module), str(self.passes.device)

    def check_free(self) -> None:
        if self.model.interleaver.interleaving:
            raise ModelError(
                "a call inside an open trace of nnsight",
                "the model is in the middle of a run, and cannot begin another",
                "call it after the `with` block; save() what it needs from there",
            )

    @property
    def eos_ids(self) -> frozenset[int]:
        return hf.eos_ids(self.module, self.tokenizer)

    def refuses(self, site: Site) -> Refused | None:
        if site.name in ("embed", *INNER) and self.where.path(site.name, site.layer) is None:
            return Refused(
                f"{site} of {self.card.architecture}",
                "no single module takes or gives that tensor",
                "use resid_pre or resid_post, or a TransformerBridge",
            )
        return None

    def writer(self, name: str, layer: int) -> Any:
        return self.where.writer(name, layer)

    @property
    def packs(self) -> bool:
        return not self.model._edits  # the user's edits would see packed rows as tokens of a row

    def forward(self, tokens: Tensor, mask: Tensor | None, climb: Climb, *, kept: Any = None, keep: int = 0) -> Any:
        for name, layer in climb.inside():
            self.passes.paths[name, layer] = str(self.where.path(name, layer))
        return self.passes.forward(tokens, mask, climb, kept, keep)

    def fuse(self, keys: int | None) -> bool:
        self.passes.fused_from = keys
        return keys is None or getattr(self.module, "_supports_sdpa", False)

    def final_norm(self, resid: Tensor) -> Tensor:
        return self.passes.final_norm(resid)

    def unembed(self, normed: Tensor, words: slice | Tensor | None = None) -> Tensor:
        return self.passes.unembed(normed, words)

    def splits(self) -> int:
        return self.passes.splits()

    @torch.no_grad()
    def plain_logits(self, tokens: Tensor) -> Tensor:
        return self.module(tokens.to(hf.device(self.module))).logits
