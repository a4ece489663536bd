"""How the time of all pairs grows with the number of forks, the length of the target prompt, and the number of layers.

One climb on the bridge against a batch per target layer by TransformerLens hooks, of which some layers are measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from all_pairs import SOURCE, climb, per_layer
from common import LOOPS, Answer, Claim, Models, Way, main, measure, spread, states
from overhead import TEXT
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import hookbook as hb
from hookbook.models.loading import load_module
from hookbook.tokens import Tokens

LENGTH, LENGTHS = 16, (8, 16, 32, 64, 128)
SHARES = (1 / 30, 1 / 6, 1 / 2, 1)
"""Shares of the source layers: 30, 150, 450 and 900 forks of SmolLM2."""
DEPTHS = (1 / 4, 1 / 2, 1)
"""Shares of the layers."""


def prompt(adapter: hb.Adapter, length: int) -> Tokens:
    """A prompt of some tokens."""
    return adapter.encode(list(adapter.encode(TEXT * 2).ids[:length]))


class Truncated(Models):
    """A model's first layers alone, on the bridge."""

    def __init__(self, name: str, n_layers: int) -> None:
        super().__init__(name)
        module, tokenizer, source = load_module(name, "float32", "cpu")
        module.model.layers = module.model.layers[:n_layers]
        module.config.num_hidden_layers = n_layers
        if getattr(module.config, "layer_types", None):
            module.config.layer_types = module.config.layer_types[:n_layers]
        self.bridge = hb.wrap(
            TransformerBridge.boot_transformers(source, hf_model=module, tokenizer=tokenizer, dtype=torch.float32, device="cpu"), tokenizer
        )


def cases(models: Models) -> Iterator[tuple[str, Models, Tensor, Tokens]]:
    """What grows: a label, a model, states and a target prompt."""
    adapter, n = models.bridge, models.bridge.card.n_layers
    values = states(adapter, [adapter.encode(SOURCE)])[:, 0]
    for share in SHARES:
        some = values[: max(1, round(share * n))]
        yield f"{len(some) * n} forks", models, some, prompt(adapter, LENGTH)
    for length in LENGTHS:
        yield f"{length} tokens", models, values, prompt(adapter, length)
    for share in DEPTHS:
        shallow = models if share == 1 else Truncated(models.name, round(share * n))
        yield f"{shallow.bridge.card.n_layers} layers", shallow, values[: shallow.bridge.card.n_layers], prompt(adapter, LENGTH)


def one_climb(models: Models, values: Tensor, target: Tokens, items: object) -> Answer:
    """All of it, whatever the items."""
    return climb(models.bridge, values, target)


def bench(models: Models, repeats: int) -> list[Claim]:
    """A line for each size; nothing is claimed."""
    print(
        f"\n{models.name}: all pairs, target of {LENGTH} tokens where nothing else is said; {torch.get_num_threads()} threads, median "
        f"of {repeats}"
    )
    print(f"{'size':16s} {'one climb, s':>13s} {'a batch per layer, s':>21s} {'ratio':>7s} {'GFLOP/s':>8s} {'of peak':>8s}")
    for label, some, values, target in cases(models):
        n = some.bridge.card.n_layers
        batches = partial(per_layer, LOOPS["TransformerLens hooks"], some, values, target)
        ways = [Way("climb", partial(one_climb, some, values, target)), Way("loop", batches, spread(range(n), 3), n)]
        found = measure(ways, some, repeats)
        ours, loop = found["climb"], found["loop"]
        print(f"{label:16s} {ours.seconds:13.3f} {loop.seconds:21.3f} {loop.ratio:7.2f} {ours.gflops:8.1f} {ours.share:8.0%}", flush=True)
    return []


if __name__ == "__main__":
    main({"growth": bench})
