"""Every neuron of every layer zeroed at the last token, and five words' logits: one request, and a batch of hooks for some neurons.

Half of the neurons of a layer would need gigabytes in one batch, so the loop runs as many at once as are fastest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import LOOPS, Answer, Claim, Loop, Models, Way, batch, compare, main, spread
from torch import Tensor

import hookbook as hb
from hookbook.request import Edit, Readout, Request, Row
from hookbook.sites import Site
from hookbook.tokens import Tokens

PROMPT = "The capital of the country that lies south of Belgium is"
BATCHES = (64, 256)
"""Rows of the loop at once; both are measured."""
TARGETS = {"smollm2-135m-instruct": 20.0, "gemma-3-270m": 18.0}


def climbs(adapter: hb.Adapter, prompt: Tokens, words: Tensor) -> Answer:
    """All neurons as one request."""
    card = adapter.card
    rows = [Row(0, (Edit(Site("mlp_act", layer, n), 0.0, "set"),)) for layer in range(card.n_layers) for n in range(card.d_mlp)]
    reply = adapter.run(Request([prompt], rows, (), Readout(token_logits=words.expand(len(rows), -1))), progress=False)
    assert reply.readout is not None and reply.readout.token_logits is not None
    return Answer(reply.readout.token_logits, cost=reply.cost)


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
    """One request on both backends, and hooks."""
    card = models.bridge.card
    prompt, words = models.bridge.encode(PROMPT), torch.arange(1000, 1005)
    n = card.n_layers * card.d_mlp
    ways = [
        Way("one request, TransformerLens bridge", lambda _: climbs(models.bridge, prompt, words)),
        Way("one request, nnsight", lambda _: climbs(models.nnsight, prompt, words)),
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
    return compare(f"{n} neurons, {len(prompt)} tokens, {len(words)} words", ways, models, repeats, goal, share=0.6)


if __name__ == "__main__":
    main({"neurons": bench})
