"""Back-patching: every later layer's state at the last token into every earlier layer of the same prompt.

Two requests, of which the first reads the clean states, against a clean run of each prompt and a batch per prompt and
target layer of all sources above it. All ways end with the five likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from common import LOOPS, Answer, Claim, Loop, Models, Way, batch, compare, main, read_last, spread, stacked
from torch import Tensor

import hookbook as hb
from hookbook.request import Edit, Readout, Request, Row
from hookbook.sites import Site
from hookbook.tokens import Tokens

PROMPTS = (
    "I know that the mother of the singer of the song Thriller was a woman whose name is",
    "I know that the capital of the country in which the river Danube begins is the city of",
    "I know that the author of the book about the young wizard Harry Potter was born in",
    "I know that the language that is spoken by most of the people who live in Brazil is",
    "I know that the currency of the country whose capital is Tokyo has the name of the",
    "I know that the continent on which the country with the largest number of people lies is",
    "I know that the president of the United States when the wall in Berlin fell was called",
    "I know that the sport that was played by the tall American athlete Michael Jordan was",
    "I know that the animal that is shown on the flag of the country of Mexico is an",
    "I know that the planet that comes after the one on which we all live is known as",
)
K = 5


def climb(adapter: hb.Adapter, coded: Sequence[Tokens]) -> Answer:
    """Clean states, then all pairs of all prompts; rows by prompt, target, source."""
    n = adapter.card.n_layers
    clean = read_last(adapter, coded)
    values = stacked(clean)
    rows = [
        Row(i, (Edit(Site("resid_post", target), values[source, i], "set"),))
        for i in range(len(coded))
        for target in range(n)
        for source in range(target + 1, n)
    ]
    return Answer.of(adapter.run(Request(coded, rows, (), Readout(k=K)), progress=False), clean)


def per_target(
    loop: Loop, models: Models, coded: Sequence[Tokens], items: Sequence[tuple[int, int]], answers: Tensor | None = None
) -> Answer:
    """For each prompt and target layer a batch of all sources; the clean states of a prompt are read before its first."""
    n, parts, clean = models.bridge.card.n_layers, [], {}
    before = [0]
    for target in range(n):
        before.append(before[-1] + n - 1 - target)
    with torch.no_grad():
        for i, target in items:
            if i not in clean:
                clean[i] = clean_states(models, coded[i])
            values = clean[i][target + 1 :]

            def put(x: Tensor, values: Tensor = values) -> None:
                x[:, -1] = values

            start = i * before[-1] + before[target]
            logits = loop(models, batch(coded[i], len(values)), Site("resid_post", target), put)
            wanted = None if answers is None else answers[i].expand(len(values), 1)
            parts.append(Answer.from_logits(logits, range(start, start + len(values)), K, wanted))
    return Answer.cat(parts)


def clean_states(models: Models, prompt: Tokens) -> Tensor:
    """The output of every layer at the last token, by TransformerLens hooks: `[layer, d_model]`."""
    found: list[Tensor] = []
    hooks = [
        (Site("resid_post", layer).hook_name, lambda x, hook: found.append(x[0, -1].clone()))
        for layer in range(models.bridge.card.n_layers)
    ]
    models.bridge.model.run_with_hooks(batch(prompt, 1)["input_ids"], fwd_hooks=hooks, logits_to_keep=1)
    return torch.stack(found)


def bench(models: Models, repeats: int) -> list[Claim]:
    """Two requests on both backends, and each loop for some prompts."""
    coded, n = [models.bridge.encode(text) for text in PROMPTS], models.bridge.card.n_layers
    targets = range(n - 1)
    some = [(i, target) for i in spread(sorted(range(len(coded)), key=lambda i: len(coded[i])), 3) for target in targets]
    ways = [
        Way("two requests, TransformerLens bridge", lambda _: climb(models.bridge, coded)),
        Way("two requests, nnsight", lambda _: climb(models.nnsight, coded)),
        *(
            Way(f"a batch per prompt and target, {name}", partial(per_target, loop, models, coded), some, len(coded) * len(targets))
            for name, loop in LOOPS.items()
        ),
    ]
    lengths = sorted(map(len, coded))
    title = f"{len(coded)} prompts of {lengths[0]} to {lengths[-1]} tokens x {n * (n - 1) // 2} pairs"
    return compare(title, ways, models, repeats, {"a batch per prompt and target, TransformerLens hooks": 15.0}, unit="logprob")


if __name__ == "__main__":
    main({"backpatch": bench})
