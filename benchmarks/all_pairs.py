"""Every (source layer, target layer) pair of a token-identity patchscope: one climb, a batch per target layer, a run per pair.

The state of each source layer at the last token of a sentence replaces the output of each target layer at the last token
of the target prompt. All ways end with the logits of that token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from common import LOOPS, Answer, Claim, Loop, Models, Way, batch, compare, main, spread, states
from torch import Tensor

import hookbook as hb
from hookbook.request import Edit, Readout, Request, Row
from hookbook.sites import Site
from hookbook.tokens import Tokens

SOURCE = "The Eiffel Tower is located in the city of"
TARGETS = {"smollm2-135m-instruct": 20.0, "gemma-3-270m": 8.0}


def every_pair(values: Tensor, layers: Sequence[int]) -> list[Row]:
    """A row for each target layer and state, in this order."""
    return [Row(0, (Edit(Site("resid_post", layer), value, "set"),)) for layer in layers for value in values]


def climb(adapter: hb.Adapter, values: Tensor, target: Tokens) -> Answer:
    """All pairs as one request."""
    return Answer.of(
        adapter.run(Request([target], every_pair(values, range(adapter.card.n_layers)), (), Readout(logits=True)), progress=False)
    )


def per_layer(loop: Loop, models: Models, values: Tensor, target: Tokens, layers: Sequence[int]) -> Answer:
    """For each target layer a batch of all states."""
    n = len(values)

    def put(x: Tensor) -> None:
        x[:, -1] = values

    with torch.no_grad():
        logits = torch.cat([loop(models, batch(target, n), Site("resid_post", layer), put) for layer in layers])
    return Answer(logits, rows=[layer * n + source for layer in layers for source in range(n)])


def per_pair(loop: Loop, models: Models, values: Tensor, target: Tokens, pairs: Sequence[tuple[int, int]]) -> Answer:
    """For each target layer and state a run."""
    parts = [per_layer(loop, models, values[source : source + 1], target, [layer]) for layer, source in pairs]
    return Answer(Answer.cat(parts).values, rows=[layer * len(values) + source for layer, source in pairs])


def bench(models: Models, repeats: int) -> list[Claim]:
    """One climb on both backends, and each loop with a batch per layer and with a run per pair."""
    n = models.bridge.card.n_layers
    target = models.bridge.encode(hb.prompts.TOKEN_IDENTITY.text)
    values = states(models.bridge, [models.bridge.encode(SOURCE)])[:, 0]
    pairs = [(layer, source) for layer in range(n) for source in range(n)]
    ways = [
        Way("one climb, TransformerLens bridge", lambda _: climb(models.bridge, values, target)),
        Way("one climb, nnsight", lambda _: climb(models.nnsight, values, target)),
        *(
            Way(f"a batch per target layer, {name}", partial(per_layer, loop, models, values, target), range(n))
            for name, loop in LOOPS.items()
        ),
        *(
            Way(f"a run per pair, {name}", partial(per_pair, loop, models, values, target), spread(pairs, 12), n * n)
            for name, loop in LOOPS.items()
        ),
    ]
    share = 0.6 if models.name.startswith("smollm2") else 0
    goal = {"a batch per target layer, TransformerLens hooks": TARGETS.get(models.name, 0.0)}
    return compare(f"{n} x {n} = {n * n} pairs, target of {len(target)} tokens", ways, models, repeats, goal, share=share)


if __name__ == "__main__":
    main({"all_pairs": bench})
