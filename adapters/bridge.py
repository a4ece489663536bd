"""TransformerLens models: TransformerBridge (3.x and 4.x)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import PositionEmbeddingsAttentionBridge

from hookbook.adapter import Adapter, ModelCard, versions
from hookbook.adapters import hf, weights
from hookbook.engine.route import routed
from hookbook.errors import ModelError, Refused
from hookbook.sites import INNER, Site
from hookbook.tokens import fingerprint
from hookbook.travel.climb import Climb, Stop
from hookbook.travel.passes import cache_of, checked, fuses, inputs, part_of_linear, splits


def accepts(model: Any) -> bool:
    """Whether this adapter is for `model`."""
    return isinstance(model, TransformerBridge)


class BridgeAdapter(Adapter):
    """TransformerBridge through its own hook points.

    Boundaries are the inputs of `bridge.blocks`, taken with their keyword arguments, so that masks and rotations can
    follow a growing batch; `attn_out` and `mlp_out` are the bridge's hook points of these names.
    """

    def __init__(self, model: TransformerBridge, tokenizer: Any = None) -> None:
        check_saes(model)
        if not hasattr(model, "blocks"):
            raise ModelError(
                f"{type(model.original_model).__name__} cannot be wrapped",
                "it is not a decoder with one stack of blocks",
                "use a causal language model",
            )
        self.model = model
        self.fused_from: int | None = None
        self.tokenizer = tokenizer if tokenizer is not None else hf.own_tokenizer(model)
        self.blocks = list(model.blocks)
        hf.check_attention(model.original_model.config)
        self.names = hf.Names(model.adapter, model.original_model)
        cfg = model.cfg
        self.card = ModelCard(
            backend="transformer_lens.TransformerBridge",
            model_id=hf.model_id(model.original_model),
            architecture=type(model.original_model).__name__,
            n_layers=len(self.blocks),
            d_model=cfg.d_model,
            n_heads=cfg.n_heads,
            d_head=cfg.d_head,
            n_kv_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
            d_mlp=cfg.d_mlp or 4 * cfg.d_model,
            d_vocab=cfg.d_vocab_out,
            n_ctx=cfg.n_ctx,
            dtype=hf.dtype_name(model.original_model),
            device=str(hf.device(model.original_model)),
            tokenizer=fingerprint(self.tokenizer),
            versions=versions("transformer-lens"),
        )

    @property
    def eos_ids(self) -> frozenset[int]:
        return hf.eos_ids(self.model.original_model, self.tokenizer)

    @property
    def module(self) -> Any:
        return self.model.original_model

    @property
    def roots(self) -> Any:
        return self.model, self.module

    def weights(self) -> Any:
        return weights.of_module(self.model.adapter, self.module)

    def runs_in(self) -> tuple[str, str]:
        return hf.dtype_name(self.module), str(hf.device(self.module))

    def ready(self) -> None:
        check_saes(self.model)

    def refuses(self, site: Site) -> Refused | None:
        if site.name in ("embed", *INNER) and self._hook_point(site.name, site.layer) is None:
            return Refused(f"{site} of {self.card.architecture}", "the bridge has no hook point there", "use resid_pre or resid_post")
        return None

    def writer(self, name: str, layer: int) -> Any:
        return self.names.writer(name, layer)

    def hook_name(self, site: Site) -> str | None:
        point = self._hook_point(site.name, site.layer)
        return None if point is None or self.model.hook_dict.get(str(point.name)) is not point else point.name

    def _hook_point(self, name: str, layer: int | None) -> HookPoint | None:
        # an attribute of the part, or an alias that says where it is; `bridge.hooks` skips names it does not know
        if layer is None:
            return (self.model.embed if name == "embed" else self.model.ln_final).hook_out
        inner = {
            "head_z": ("attn", "hook_z"),
            "attn_pattern": ("attn", "hook_pattern"),
            "mlp_in": ("", f"{self.names.mlp_in}.hook_in"),
            "mlp_act": ("mlp", "hook_post"),
        }
        part, hook = inner.get(name, ("", f"hook_{name}"))
        block = getattr(self.blocks[layer], part, None) if part else self.blocks[layer]
        path = (getattr(block, "hook_aliases", None) or {}).get(hook, hook)
        for candidate in path if isinstance(path, list) else [path]:
            found: Any = block
            for part in candidate.split("."):
                found = getattr(found, part, None)
            if isinstance(found, HookPoint):
                return found
        return None

    @property
    def packs(self) -> bool:
        # a hook of the user's would see packed rows as tokens of a row
        return not any(point.fwd_hooks for point in self.model.hook_dict.values())

    def forward(self, tokens: Tensor, mask: Tensor | None, climb: Climb, *, kept: Any = None, keep: int = 0) -> Any:
        cache, kept = cache_of(climb, kept, keep)
        original = self.model.original_model
        taken = inputs(tokens, mask, cache, hf.takes_positions(original), hf.device(original))
        with self._attention(fuses(climb, taken, self.fused_from)), routed(self.blocks, climb) as handles:
            handles += [Hooked(self._hook_point(name, layer), name, layer, climb) for name, layer in climb.inside()]
            try:
                self.model(taken.pop("input_ids"), return_type=None, **taken)
            except Stop:
                pass
        return checked(kept) if keep else None

    def fuse(self, keys: int | None) -> bool:
        self.fused_from = keys
        known = all(isinstance(part, PositionEmbeddingsAttentionBridge) for part in self._attentions())
        return keys is None or (known and getattr(self.module, "_supports_sdpa", False))

    def _attentions(self) -> list[Any]:
        return [getattr(block, "attn", None) for block in self.blocks]

    @contextmanager
    def _attention(self, fused: bool) -> Iterator[None]:
        """Inside, attention is fused, or as it is. The bridge computes it itself, with every pattern, whatever the model's setting says;
        what its base class does instead is to leave it to transformers."""
        if not fused:
            yield
            return
        config, parts = self.module.config, self._attentions()
        before = config._attn_implementation
        try:
            config._attn_implementation = "sdpa"
            for part in parts:
                vars(part)["forward"] = partial(AttentionBridge.forward, part)  # an assignment would go to what it wraps
            yield
        finally:
            config._attn_implementation = before
            for part in parts:
                vars(part).pop("forward", None)

    def final_norm(self, resid: Tensor) -> Tensor:
        return self.model.ln_final(resid[:, None])[:, 0]

    def unembed(self, normed: Tensor, words: slice | Tensor | None = None) -> Tensor:
        logits = (
            self.model.unembed(normed[:, None])[:, 0]
            if words is None
            else part_of_linear(self.model.unembed.original_component, normed, words)
        )
        return self.model.adapter.apply_output_logits_transform(logits)

    def splits(self) -> int:
        hooks = [point for name, point in self.model.hook_dict.items() if name.startswith("unembed")]
        if (
            any(point.fwd_hooks for point in hooks)
            or self.model.unembed._forward_hooks
            or "_processed_W_U" in self.model.unembed._parameters
        ):
            return 0
        return splits(self.model.unembed.original_component)

    @torch.no_grad()
    def plain_logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens.to(hf.device(self.model.original_model)))


def check_saes(model: Any) -> None:
    """Raise for SAEs that SAELens spliced into a model: in place of hook points, where a hook would miss them and forks were not tried."""
    spliced = getattr(model, "acts_to_saes", None)
    if spliced:
        raise ModelError(
            f"a model with SAEs spliced in at {', '.join(spliced)}",
            "they stand where its hook points were, so that sites are not what they were",
            "call model.reset_saes(), and hb.sae.attach(model, sae) for their features",
        )


class Hooked:
    """A hook on a TransformerLens hook point, removable like torch's; hooks of the user's stay."""

    LEVEL = 1 << 20  # TransformerLens removes hooks by context level; this one is nobody else's

    def __init__(self, point: Any, name: str, layer: int | None, climb: Climb) -> None:
        self.point = point
        point.add_hook(lambda x, hook: climb.visit(name, layer, x), level=self.LEVEL)

    def remove(self) -> None:
        """Take the hook off again."""
        self.point.remove_hooks("fwd", level=self.LEVEL)
