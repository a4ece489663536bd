"""TransformerLens models: HookedTransformer (3.x), as people still use it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry
from transformer_lens.utilities import apply_softcap  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]

from hookbook.adapter import Adapter, ModelCard, versions
from hookbook.adapters import hf, weights
from hookbook.adapters.bridge import Hooked, check_saes
from hookbook.engine.route import routed
from hookbook.errors import ModelError, Refused
from hookbook.sites import INNER, Site
from hookbook.tokens import fingerprint
from hookbook.travel.climb import Climb, Stop
from hookbook.travel.kept import Kept, begin


def accepts(model: Any) -> bool:
    """Whether this adapter is for `model`."""
    return isinstance(model, HookedTransformer)


class HookedAdapter(Adapter):
    """HookedTransformer through its own hook points.

    It has no dropout, so its mode does not matter. Weights are used as they are. A model loaded with weight processing has another
    residual stream than the checkpoint (centred, with norms folded in): load with `HookedTransformer.from_pretrained_no_processing` to
    share vectors with other backends.
    """

    def __init__(self, model: HookedTransformer, tokenizer: Any = None) -> None:
        check_saes(model)
        self.model: Any = model
        self.tokenizer = tokenizer if tokenizer is not None else hf.own_tokenizer(model)
        cfg = model.cfg
        if cfg.positional_embedding_type == "shortformer":
            raise ModelError(
                "a model with shortformer positions cannot be wrapped",
                "its keys see positions that its stream does not",
                "use another model",
            )
        self.card = ModelCard(
            backend="transformer_lens.HookedTransformer",
            model_id=cfg.model_name,
            architecture=str(cfg.original_architecture),
            n_layers=cfg.n_layers,
            d_model=cfg.d_model,
            n_heads=cfg.n_heads,
            d_head=cfg.d_head,
            n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
            d_mlp=cfg.d_mlp or 4 * cfg.d_model,
            d_vocab=cfg.d_vocab_out,
            n_ctx=cfg.n_ctx,
            dtype=str(cfg.dtype).removeprefix("torch."),
            device=str(cfg.device),
            tokenizer=fingerprint(self.tokenizer),
            versions=versions("transformer-lens"),
        )

    @property
    def eos_ids(self) -> frozenset[int]:
        eos = self.tokenizer.eos_token_id
        return frozenset() if eos is None else frozenset({eos})

    def ready(self) -> None:
        check_saes(self.model)

    def weights(self) -> Any:
        return weights.of_hooked(self.model)

    def runs_in(self) -> tuple[str, str]:
        where = self.model.embed.W_E
        return str(where.dtype).removeprefix("torch."), str(where.device)

    def refuses(self, site: Site) -> Refused | None:
        if site.name in ("embed", *INNER) and site.name != "mlp_in" and site.hook_name not in self.model.hook_dict:
            return Refused(f"{site} of {self.card.model_id}", "it has no such part", "use resid_pre or resid_post")
        if site.name in ("mlp_in", "mlp_act", "mlp_out") and self.model.cfg.attn_only:
            return Refused(f"{site} of {self.card.model_id}", "its blocks have attention only", "use attn_out, resid_pre or resid_post")
        if site.name == "mlp_act" and self.model.cfg.num_experts:
            return Refused(f"{site} of {self.card.model_id}", "its MLPs are several experts", "use mlp_out")
        return None

    def hook_name(self, site: Site) -> str | None:
        return site.hook_name if site.hook_name in self.model.hook_dict else None

    def writer(self, name: str, layer: int) -> Any:
        block = self.model.blocks[layer]
        norms = self.model.cfg.use_normalization_before_and_after
        if name == "head_z":
            return lambda z: z @ block.attn.W_O.flatten(0, 1) + block.attn.b_O, block.ln1_post if norms else None
        return lambda x: x @ block.mlp.W_out + block.mlp.b_out, block.ln2_post if norms else None

    def forward(self, tokens: Tensor, mask: Tensor | None, climb: Climb, *, kept: Any = None, keep: int = 0) -> Any:
        cache = None if kept is None and not keep else self._cache(tokens, mask, climb, begin(climb, kept, self.card.n_layers, 1), keep)
        # always a mask: without one, a left-padding tokenizer makes TransformerLens look for padding by token id
        new = torch.ones_like(tokens) if mask is None else mask[:, -tokens.shape[1] :]
        with routed(self.model.blocks, climb) as handles:
            handles += [self._hooked(name, layer, climb) for name, layer in climb.inside()]
            try:
                self.model(tokens.to(self.card.device), return_type=None, attention_mask=new, past_kv_cache=cache, prepend_bos=False)
            except Stop:
                pass
        entries: list[Any] = [] if cache is None else cache.entries
        return [entry.kept for entry in entries] if keep else None

    def _hooked(self, name: str, layer: int | None, climb: Climb) -> Any:
        if name == "mlp_in":  # it has no hook point: that of the norm is before the norm's weight, `hook_mlp_in` before the norm
            return self.model.blocks[layer].mlp.register_forward_pre_hook(lambda module, args: climb.visit(name, layer, args[0]))
        return Hooked(self.model.hook_dict[Site(name, layer).hook_name], name, layer, climb)

    def _cache(self, tokens: Tensor, mask: Tensor | None, climb: Climb, kept: list[Kept], keep: int) -> TransformerLensKeyValueCache:
        cache = TransformerLensKeyValueCache.init_cache(self.model.cfg, self.card.device, len(tokens))
        n = kept[0].n()
        cache.entries = [
            KeptEntry(entry.past_keys.new_empty(1).expand(len(tokens), n, *entry.past_keys.shape[2:]), climb, one, keep)
            for entry, one in zip(cache.entries, kept, strict=True)
        ]
        before = torch.ones(len(tokens), n, dtype=torch.long) if mask is None else mask[:, :n]
        cache.previous_attention_mask = before.to(self.card.device)
        return cache

    def final_norm(self, resid: Tensor) -> Tensor:
        return self.model.ln_final(resid[:, None])[:, 0]

    def unembed(self, normed: Tensor, words: slice | Tensor | None = None) -> Tensor:
        head = self.model.unembed
        logits = head(normed[:, None])[:, 0] if words is None else normed @ head.W_U[:, words] + head.b_U[words]
        return apply_softcap(logits, self.model.cfg.output_logits_soft_cap)

    def splits(self) -> int:
        head = self.model.unembed
        return 0 if head._forward_hooks or head._forward_pre_hooks else self.card.d_vocab

    @torch.no_grad()
    def plain_logits(self, tokens: Tensor) -> Tensor:
        # a mask: without one, a left-padding tokenizer makes TransformerLens look for padding by token id
        return self.model(tokens.to(self.card.device), prepend_bos=False, attention_mask=torch.ones_like(tokens))


class KeptEntry(TransformerLensKeyValueCacheEntry):
    """What one block kept, as TransformerLens takes it; of `past_keys` it asks for the shape alone, which it wants before rows join."""

    def __init__(self, like: Tensor, climb: Climb, kept: Kept, keep: int) -> None:
        super().__init__(like, like)
        self.climb, self.kept, self.keep = climb, kept, keep

    def append(self, new_keys: Tensor, new_values: Tensor) -> Any:
        """Called by attention with the new keys and values."""
        return tuple(self.kept.update(self.climb, (new_keys, new_values), self.keep))
