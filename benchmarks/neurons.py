"""Every neuron of every layer zeroed at the last token, and five words' logits: one call, and batches with hooks.

The loop runs several neurons of a layer in one batch; two sizes of batches are measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import LOOPS, Answer, Claim, Loop, Models, Way, batch, compare, main, spread
from torch import Tensor

import hookbook as hb
from hookbook.sites import Site
from hookbook.tokens import Tokens

PROMPT = "The capital of the country that lies south of Belgium is"
BATCHES = (64, 256)
"""Rows of the loop at once; both are measured."""
TARGETS = {"smollm2-135m-instruct": 22.0, "gemma-3-270m": 20.0}


def sweep(adapter: hb.Adapter, words: Tensor) -> Answer:
    """All neurons in one call."""
    found = hb.neuron_sweep(adapter, PROMPT, words.tolist(), progress=False)
    return Answer(found.changes[0] + found.wanted_logits[0], cost=found.settings["cost"])


def hooks(loop: Loop, models: Models, prompt: Tokens, words: Tensor, at_once: int, parts: Sequence[int]) -> Answer:
    """Some batches of neurons that follow each other."""
    width = models.bridge.card.d_mlp
    rows, values = [], []
    for part in parts:
        layer, first = divmod(part * at_once, width)
        some = torch.arange(first, min(first + at_once, width))

        def put(x: Tensor, some: Tensor = some) -> None:
            x[torch.arange(len(some)), -1, some] = 0

        with torch.no_grad():
            values.append(loop(models, batch(prompt, len(some)), Site("mlp_act", layer), put)[:, words])
        rows += (layer * width + some).tolist()
    return Answer(torch.cat(values), rows=rows)


def bench(models: Models, repeats: int) -> list[Claim]:
    """One call on both backends, and hooks."""
    card = models.bridge.card
    prompt, words = models.bridge.encode(PROMPT), torch.arange(1000, 1005)
    n = card.n_layers * card.d_mlp
    ways = [
        Way("one call, TransformerLens bridge", lambda _: sweep(models.bridge, words)),
        Way("one call, nnsight", lambda _: sweep(models.nnsight, words)),
    ]
    for name, loop in list(LOOPS.items())[:1]:
        for at_once in BATCHES:
            parts = n // at_once
            ways.append(
                Way(
                    f"{name}, {at_once} neurons at once",
                    lambda some, loop=loop, at_once=at_once: hooks(loop, models, prompt, words, at_once, some),
                    spread(range(parts), 6),
                    parts,
                )
            )
    goal = {f"TransformerLens hooks, {at_once} neurons at once": TARGETS.get(models.name, 0.0) for at_once in BATCHES}
    return compare(f"{n} neurons, {len(prompt)} tokens, {len(words)} words", ways, models, repeats, goal, share=0.55)


if __name__ == "__main__":
    main({"neurons": bench})
