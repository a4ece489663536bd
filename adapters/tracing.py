"""nnsight models, run on this machine: TransformersModel and LanguageModel."""

from __future__ import annotations

from typing import Any

import torch
from nnsight import TransformersModel
from torch import Tensor
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config

from hookbook.adapter import Adapter, ModelCard, check_eval, versions
from hookbook.adapters import hf
from hookbook.climb import Climb
from hookbook.errors import ModelError, Refused
from hookbook.route import Stop, enter
from hookbook.sites import INNER, Site
from hookbook.tokens import fingerprint

PATTERN = "nn_functional_dropout_0"
"""The operation of transformers' eager attention that gives the pattern."""


def accepts(model: Any) -> bool:
    """Whether this adapter is for `model`."""
    return isinstance(model, TransformersModel)


class TracingAdapter(Adapter):
    """An nnsight model through traces.

    Where a site lives in the module tree is what TransformerLens' architecture adapter for the model says.
    """

    def __init__(self, model: TransformersModel, tokenizer: Any = None) -> None:
        if not model.dispatched:
            model.dispatch()
        module = model._module
        check_eval(module, "the nnsight model")
        hf.check_attention(module.config)
        self.model, self.module = model, module
        self.tokenizer = tokenizer if tokenizer is not None else model.tokenizer
        if self.tokenizer is None:
            raise ModelError("the model has no tokenizer", "prompts cannot be read", "pass one: hb.wrap(model, tokenizer=...)")
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
            raise ModelError(f"{type(module).__name__} cannot be wrapped", "it is not a decoder with one stack of blocks", "use a causal language model")
        path = self.names.translate_transformer_lens_path
        self.blocks = list(self._envoy(path("blocks")))
        self.norm, self.head = module.get_submodule(path("ln_final")), module.get_submodule(path("unembed"))
        self.where = hf.Names(self.names, module)
        self.card = ModelCard(
            backend="nnsight",
            model_id=hf.model_id(module),
            architecture=type(module).__name__,
            n_layers=len(self.blocks),
            d_model=cfg.d_model,
            n_heads=cfg.n_heads,
            d_head=cfg.d_head,
            n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
            d_mlp=cfg.d_mlp or 4 * cfg.d_model,
            d_vocab=self.head.weight.shape[0],
            n_ctx=cfg.n_ctx,
            dtype=hf.dtype_name(module),
            device=str(hf.device(module)),
            tokenizer=fingerprint(self.tokenizer),
            versions=versions("nnsight", "transformer-lens"),
        )

    def _envoy(self, path: str) -> Any:
        found: Any = self.model
        for part in path.split("."):
            found = found[int(part)] if part.isdecimal() else getattr(found, part)
        return found

    @property
    def eos_ids(self) -> frozenset[int]:
        return hf.eos_ids(self.module, self.tokenizer)

    def refuses(self, site: Site) -> Refused | None:
        if site.name in ("embed", *INNER) and self.where.path(site.name, site.layer) is None:
            return Refused(
                f"{site} of {self.card.architecture}", "no single module takes or gives that tensor", "use resid_pre or resid_post, or a TransformerBridge"
            )
        return None

    def writer(self, name: str, layer: int) -> Any:
        return self.where.writer(name, layer)

    @property
    def packs(self) -> bool:
        return not self.model._edits  # the user's edits would see packed rows as tokens of a row

    def forward(self, tokens: Tensor, mask: Tensor | None, climb: Climb, *, kept: Any = None, keep: bool = False) -> Any:
        cache = hf.cache_from(kept) if kept is not None or keep else None
        inputs = hf.inputs(self.module, tokens, mask, cache)
        widen, n_kept = hf.widener(cache, climb, keep), hf.length(cache)
        try:
            with hf.eager(self.module, any(name == "attn_pattern" for name, _ in climb.inside())):
                with self.model.trace(inputs.pop("input_ids"), **inputs):
                    self._climb(climb, widen, n_kept)
                    raise Stop  # tracer.stop() would leave every tensor of the trace in a reference cycle
        except Stop:
            pass
        return hf.kept(cache, climb.last) if keep else None

    def _climb(self, climb: Climb, widen: Any, n_kept: int) -> None:
        """The body of a trace: what `hookbook.route` does with hooks, in the order of the pass."""
        if climb.wants("embed"):
            self._visit(climb, "embed", None)
        for layer, block in enumerate(self.blocks[: climb.last + 1]):
            args, kwargs = enter(climb, layer, *block.inputs, n_kept=n_kept)
            if layer == climb.last:
                return
            widen(layer)
            block.inputs = (args, kwargs)
            for name in INNER:
                if climb.wants(name, layer):
                    self._visit(climb, name, layer)
        output = self.blocks[-1].output
        climb.boundary(len(self.blocks), output[0] if isinstance(output, tuple) else output)

    def _visit(self, climb: Climb, name: str, layer: int | None) -> None:
        site = self._envoy(self.where.path(name, layer))
        if name == "attn_pattern":  # what eager attention computes, after softmax and dropout
            source = site.source
            while PATTERN not in source.names:  # through the interface, and what a TransformerBridge of this family puts around it
                source = getattr(source, [op for op in source.names if "attention_" in op.lower()][-1]).source
            site = getattr(source, PATTERN)
        if name in ("head_z", "mlp_act"):
            site.input = climb.visit(name, layer, site.input)
        elif isinstance(output := site.output, tuple):
            site.output = (climb.visit(name, layer, output[0]), *output[1:])
        else:
            site.output = climb.visit(name, layer, output)

    def final_norm(self, resid: Tensor) -> Tensor:
        return self.norm(resid[:, None])[:, 0]

    def unembed(self, normed: Tensor) -> Tensor:
        return self.names.apply_output_logits_transform(self.head(normed[:, None]))[:, 0]

    @torch.no_grad()
    def plain_logits(self, tokens: Tensor) -> Tensor:
        return self.module(tokens.to(hf.device(self.module))).logits
