"""One vector added at the last token, at every layer, for a hundred prompts of different lengths: one request, or a padded batch per layer.

All ways end with the five likeliest tokens and the log-probability of one token.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import torch
from common import LOOPS, Answer, Claim, Loop, Models, Way, compare, main, padded, spread, states
from torch import Tensor

import hookbook as hb
from hookbook.request import Edit, Readout, Request, Row
from hookbook.sites import Site
from hookbook.tokens import Tokens

WHO = (
    "The black cat",
    "My old neighbour",
    "The young woman from the village",
    "A tired group of students and their teacher",
    "The farmer's son",
)
WHAT = ("walked to the market", "said nothing at all", "bought a small red car", "looked at the sky for a long time", "wrote a letter")
WHEN = ("and then", "because the weather was", "on a cold and windy Monday of", "before the")
K = 5


def sentences() -> list[str]:
    """A hundred beginnings of sentences."""
    return [" ".join(parts) for parts in itertools.product(WHO, WHAT, WHEN)]


def climb(adapter: hb.Adapter, prompts: Sequence[Tokens], vector: Tensor, token: int) -> Answer:
    """All layers and prompts as one request, layer by layer."""
    edits = [(Edit(Site("resid_post", layer), vector, "add"),) for layer in range(adapter.card.n_layers)]
    rows = [Row(i, edit) for edit in edits for i in range(len(prompts))]
    return Answer.of(adapter.run(Request(prompts, rows, (), Readout(k=K, tokens=torch.full((len(rows), 1), token))), progress=False))


def per_layer(loop: Loop, models: Models, prompts: Sequence[Tokens], vector: Tensor, token: int, layers: Sequence[int]) -> Answer:
    """For each layer a batch of all prompts, padded on the left."""
    n, parts = len(prompts), []

    def push(x: Tensor) -> None:
        x[:, -1] += vector

    with torch.no_grad():
        for layer in layers:
            logits = loop(models, padded(prompts), Site("resid_post", layer), push)
            parts.append(Answer.from_logits(logits, range(layer * n, layer * n + n), K, torch.full((n, 1), token)))
    return Answer.cat(parts)


def bench(models: Models, repeats: int) -> list[Claim]:
    """One request on both backends, and each loop for some layers."""
    adapter, n = models.bridge, models.bridge.card.n_layers
    prompts = [adapter.encode(text) for text in sentences()]
    happy, sad = states(adapter, [adapter.encode(text) for text in ("I am so happy", "I am so sad")])[n // 2]
    vector, token = happy - sad, adapter.tokenizer(" good", add_special_tokens=False).input_ids[0]
    ways = [
        Way("one request, TransformerLens bridge", lambda _: climb(models.bridge, prompts, vector, token)),
        Way("one request, nnsight", lambda _: climb(models.nnsight, prompts, vector, token)),
        *(
            Way(f"a batch per layer, {name}", partial(per_layer, loop, models, prompts, vector, token), spread(range(n), 6), n)
            for name, loop in LOOPS.items()
        ),
    ]
    lengths = sorted(map(len, prompts))
    title = f"{n} layers x {len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens"
    return compare(title, ways, models, repeats, {"a batch per layer, TransformerLens hooks": 8.0}, unit="logprob")


if __name__ == "__main__":
    main({"layers": bench})
