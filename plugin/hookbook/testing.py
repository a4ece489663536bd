"""A toy model, so that recipes can be tested in milliseconds, and real weights are only needed for real claims.

`toy()` is a random three-layer transformer in plain torch with its own adapter, about the smallest thing that has
everything: causal attention with kept keys and values, left padding, and a tokenizer that cuts text into bytes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hookbook.adapter import Adapter, ModelCard, versions
from hookbook.engine.route import routed
from hookbook.tokens import fingerprint
from hookbook.travel.climb import Climb, Stop
from hookbook.travel.kept import begin


@cache
def toy_tokenizer() -> Any:
    """A Hugging Face tokenizer of single bytes, with `<s>` before every text; `</s>` ends one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, "</s>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


class ToyBlock(nn.Module):
    """Pre-norm attention and MLP. `pattern`, `attn_out` and `mlp_out` are where these sites can be hooked."""

    def __init__(self, d_model: int, n_heads: int, d_head: int, d_mlp: int) -> None:
        super().__init__()
        self.n_heads, self.d_head = n_heads, d_head
        self.ln1, self.ln2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.o = nn.Linear(d_model, 3 * n_heads * d_head), nn.Linear(n_heads * d_head, d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, d_mlp), nn.GELU(), nn.Linear(d_mlp, d_model))
        self.pattern, self.attn_out, self.mlp_out = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, allowed: Tensor, kept: list | None, layer: int) -> Tensor:
        heads = self.qkv(self.ln1(x)).unflatten(-1, (3, self.n_heads, self.d_head)).permute(2, 0, 3, 1, 4)
        q, k, v = heads
        if kept is not None:
            k, v = kept[layer](k, v)
        scores = (q @ k.mT * self.d_head**-0.5).masked_fill(~allowed, torch.finfo(x.dtype).min)
        x = x + self.attn_out(self.o((self.pattern(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)))
        return x + self.mlp_out(self.mlp(self.ln2(x)))


class ToyModel(nn.Module):
    """A GPT-2-like transformer with random weights."""

    def __init__(
        self, n_layers: int = 3, d_model: int = 16, n_heads: int = 2, d_head: int = 8, d_mlp: int = 32, n_ctx: int = 64, d_vocab: int = 258
    ) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(d_vocab, d_model), nn.Embedding(n_ctx, d_model)
        self.blocks = nn.ModuleList(ToyBlock(d_model, n_heads, d_head, d_mlp) for _ in range(n_layers))
        self.norm, self.unembed = nn.LayerNorm(d_model), nn.Linear(d_model, d_vocab)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, kept: list | None = None, before: int = 0) -> Tensor:
        """Logits `[batch, pos, d_vocab]`; `mask` `[batch, kept + pos]`; `kept`, of each block, takes new keys and values and returns all,
        `before` of them earlier."""
        n = tokens.shape[1]
        mask = torch.ones(len(tokens), before + n, dtype=torch.long) if mask is None else mask
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, before:]
        causal = torch.ones(before + n, before + n, dtype=torch.bool).tril()[before:]
        allowed = (causal & mask.bool()[:, None, :])[:, None]
        x = self.embed(tokens) + self.position(places)
        for layer, block in enumerate(self.blocks):
            x = block(x, allowed=allowed, kept=kept, layer=layer)
        return self.unembed(self.norm(x))


class ToyAdapter(Adapter):
    """The whole of an adapter for a model in plain torch."""

    def __init__(self, model: ToyModel, tokenizer: Any = None) -> None:
        self.model = model
        self.tokenizer = tokenizer if tokenizer is not None else toy_tokenizer()
        block: Any = model.blocks[0]
        n_ctx, d_model = model.position.weight.shape
        self.card = ModelCard(
            backend="toy",
            model_id="toy",
            architecture="ToyModel",
            n_layers=len(model.blocks),
            d_model=d_model,
            n_heads=block.n_heads,
            d_head=block.d_head,
            n_kv_heads=block.n_heads,
            d_mlp=block.mlp[0].out_features,
            d_vocab=model.unembed.out_features,
            n_ctx=n_ctx,
            dtype=str(model.embed.weight.dtype).removeprefix("torch."),
            device="cpu",
            tokenizer=fingerprint(self.tokenizer),
            versions=versions(),
        )

    @property
    def eos_ids(self) -> frozenset[int]:
        return frozenset({self.tokenizer.eos_token_id})

    def forward(self, tokens: Tensor, mask: Tensor | None, climb: Climb, *, kept: Any = None, keep: int = 0) -> Any:
        kept = begin(climb, kept, self.card.n_layers) if kept is not None or keep else None
        cache = None if kept is None else [lambda *new, one=one: one.update(climb, new, keep) for one in kept]
        blocks: Any = self.model.blocks
        with routed(blocks, climb) as handles:
            for name, layer in climb.inside():
                if name in ("head_z", "mlp_in", "mlp_act"):
                    target = blocks[layer].mlp if name == "mlp_in" else self.writer(name, layer)[0]
                    handles.append(
                        target.register_forward_pre_hook(lambda module, args, name=name, layer=layer: climb.visit(name, layer, args[0]))
                    )
                else:
                    target = self.model.embed if layer is None else blocks[layer].get_submodule(name.replace("attn_pattern", "pattern"))
                    handles.append(
                        target.register_forward_hook(lambda module, args, output, name=name, layer=layer: climb.visit(name, layer, output))
                    )
            try:
                self.model(tokens, mask, cache, sum(climb.before))
            except Stop:
                pass
        return kept if keep else None

    def final_norm(self, resid: Tensor) -> Tensor:
        return self.model.norm(resid.unsqueeze(-2)).squeeze(-2)

    def unembed(self, normed: Tensor, words: slice | Tensor | None = None) -> Tensor:
        return self.model.unembed(normed.unsqueeze(-2)).squeeze(-2)

    def writer(self, name: str, layer: int) -> Any:
        block: Any = self.model.blocks[layer]
        return (block.o if name == "head_z" else block.mlp[2]), None

    @torch.no_grad()
    def plain_logits(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)


def toy(seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: int) -> ToyAdapter:
    """A toy model under hookbook's interface; `sizes` are those of `ToyModel`.

    Example:
        >>> toy().card.n_layers
        3
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ToyModel(**sizes)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3) if parameter.dim() == 1 else nn.init.normal_(
                parameter, std=parameter.shape[-1] ** -0.5 * 1.5
            )
        adapter = ToyAdapter(model.to(dtype).eval())
    adapter.look()
    return adapter
