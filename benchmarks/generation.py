"""Twenty tokens generated from every pair of a patchscope: one climb that goes on, or a batched `generate` per target layer.

The other way is the plain Hugging Face model under a forward hook that patches the prompt and leaves the generated
tokens alone. Rows must say the same up to their end token; float32 leaves a few near-ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from all_pairs import SOURCE, every_pair
from common import Answer, Claim, Models, Way, batch, compare, main, spread, states
from torch import Tensor

import hookbook as hb
from hookbook.request import Request
from hookbook.tokens import Tokens

NEW = 20


def answer(generated: Sequence[Sequence[int]], rows: Sequence[int] | None = None, cost: dict[str, int] | None = None) -> Answer:
    """Generated tokens, filled up with -1."""
    ids = torch.tensor([[*line, *[-1] * (NEW - len(line))] for line in generated])
    return Answer(torch.empty(len(ids), 0), ids, rows, cost or {})


def climb(adapter: hb.Adapter, values: Tensor, target: Tokens) -> Answer:
    """All pairs as one request."""
    reply = adapter.run(Request([target], every_pair(values, range(adapter.card.n_layers)), generate=NEW), progress=False)
    return answer(reply.generated, cost=reply.cost)


def per_layer(models: Models, values: Tensor, target: Tokens, layers: Sequence[int]) -> Answer:
    """For each target layer a batch of all states through `generate`."""
    n, ends = len(values), models.bridge.eos_ids
    lines: list[list[int]] = []

    def put(module: object, args: object, output: Tensor) -> None:
        if output.shape[1] > 1:  # the prompt; a generated token comes alone
            output[:, -1] = values

    inputs = batch(target, n)
    for layer in layers:
        handle = models.plain.model.layers[layer].register_forward_hook(put)
        with torch.no_grad():
            whole = models.plain.generate(
                **inputs,
                attention_mask=torch.ones_like(inputs["input_ids"]),
                do_sample=False,
                use_cache=True,
                max_new_tokens=NEW,
                eos_token_id=sorted(ends),
            )
        handle.remove()
        for line in whole[:, len(target) :].tolist():
            end = next((i for i, token in enumerate(line) if token in ends), len(line))
            lines.append(line[:end])
    return answer(lines, [layer * n + source for layer in layers for source in range(n)])


def bench(models: Models, repeats: int) -> list[Claim]:
    """One climb on both backends, and `generate` for some layers."""
    adapter, n = models.bridge, models.bridge.card.n_layers
    target = adapter.encode(hb.prompts.TOKEN_IDENTITY.text)
    values = states(adapter, [adapter.encode(SOURCE)])[:, 0]
    ways = [
        Way("one climb, TransformerLens bridge", lambda _: climb(models.bridge, values, target)),
        Way("one climb, nnsight", lambda _: climb(models.nnsight, values, target)),
        Way("generate per target layer, transformers", partial(per_layer, models, values, target), spread(range(n), 4), n),
    ]
    title = f"{n} x {n} = {n * n} pairs, {NEW} tokens after a target of {len(target)}"
    return compare(title, ways, models, repeats, {"generate per target layer, transformers": 3.0}, unit="")


if __name__ == "__main__":
    main({"generation": bench})
