"""A vector added at the last token of a long prompt, in every layer: one climb, and a kept prefix with a batch for each layer.

The other way keeps the keys and values of all tokens but the last, as a careful user of transformers does, and repeats them for the rows
of each layer; its attention is sdpa. Both end with the logits of the last token.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from common import Answer, Claim, Models, Way, compare, main
from layers import sentences
from torch import Tensor
from transformers import DynamicCache

import hookbook as hb
from hookbook.request import Edit, Readout, Request, Row
from hookbook.sites import Site
from hookbook.tokens import Tokens

TOKENS, ROWS = 1446, 900
TARGETS = {"smollm2-135m-instruct": 2.0, "gemma-3-270m": 1.0}


def long_prompt(adapter: hb.Adapter, n: int = TOKENS, start: int = 0) -> Tokens:
    """Sentences, and of the last so many words that there are at least `n` tokens."""
    words = " ".join(sentences() * (1 + n // 500)).split()[start:]
    return adapter.encode(" ".join(words[: next(i for i in range(n // 2, len(words)) if len(adapter.encode(" ".join(words[:i]))) >= n)]))


def climb(adapter: hb.Adapter, prompt: Tokens, values: Tensor) -> Answer:
    """All layers and vectors as one request."""
    rows = [Row(0, (Edit(Site("resid_post", layer), value),)) for layer in range(adapter.card.n_layers) for value in values]
    return Answer.of(adapter.run(Request([prompt], rows, (), Readout(logits=True)), progress=False))


@torch.no_grad()
def kept(models: Models, prompt: Tokens, values: Tensor) -> Answer:
    """The prompt once, and then for each layer a batch of its last token."""
    model, ids, logits = models.plain, torch.tensor([prompt.ids]), []
    model.config._attn_implementation = "sdpa"
    cache = DynamicCache()
    model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    for block in model.model.layers:
        mine = copy.deepcopy(cache)
        mine.batch_repeat_interleave(len(values))
        handle = block.register_forward_hook(lambda module, args, out: out + values[:, None])
        try:
            logits.append(model(ids[:, -1:].expand(len(values), -1), past_key_values=mine).logits[:, -1])
        finally:
            handle.remove()
    return Answer(torch.cat(logits))


def bench(models: Models, repeats: int) -> list[Claim]:
    """On both backends."""
    card = models.bridge.card
    prompt = long_prompt(models.bridge)
    values = 2 * torch.randn(ROWS // card.n_layers, card.d_model, generator=torch.Generator().manual_seed(0))
    ways = [
        Way("one climb, TransformerLens bridge", lambda _: climb(models.bridge, prompt, values)),
        Way("one climb, nnsight", lambda _: climb(models.nnsight, prompt, values)),
        Way("a kept prefix, a batch per layer", lambda _: partial(kept, models, prompt, values)()),
    ]
    goal = {"a kept prefix, a batch per layer": TARGETS.get(models.name, 0.0)}
    return compare(f"{card.n_layers} layers, {len(values)} vectors, {len(prompt)} tokens", ways, models, repeats, goal)


if __name__ == "__main__":
    main({"long_prompts": bench})
