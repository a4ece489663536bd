"""One edit on one prompt, where there is nothing to share: what hookbook costs beside the same edit by hand.

A vector is added at the last token of a 64-token prompt in the middle layer; all ways end with the last token's logits.
Hookbook's time should be at most 1.05 times that of the bridge's own hooks and 1.10 times that of a trace.
"""

from __future__ import annotations

import torch
from common import LOOPS, Answer, Claim, Models, Way, batch, compare, main, states
from torch import Tensor

import hookbook as hb
from hookbook.request import Edit, Readout, Request, Row
from hookbook.sites import Site
from hookbook.tokens import Tokens

TEXT = "In the beginning there was a small village by the sea, and every morning the people went out to fish. " * 4
N_TOKENS = 64
TURNS = 5
"""How many turns for each of `--repeats`."""


def ours(adapter: hb.Adapter, prompt: Tokens, site: Site, vector: Tensor) -> Answer:
    """A request of one row."""
    return Answer.of(adapter.run(Request([prompt], [Row(0, (Edit(site, vector, "add"),))], (), Readout(logits=True))))


@torch.no_grad()
def by_hand(models: Models, prompt: Tokens, site: Site, vector: Tensor) -> Answer:
    """A forward hook on the plain Hugging Face model."""

    def push(module: object, args: object, output: Tensor) -> None:
        output[:, -1] += vector

    handle = models.plain.model.layers[site.layer].register_forward_hook(push)
    logits = models.plain(**batch(prompt, 1), logits_to_keep=1).logits[:, -1]
    handle.remove()
    return Answer(logits)


def bench(models: Models, repeats: int) -> list[Claim]:
    """Hookbook on both backends, each loop, and transformers."""
    prompt = models.bridge.encode(list(models.bridge.encode(TEXT).ids[:N_TOKENS]))
    site = Site("resid_post", models.bridge.card.n_layers // 2)
    vector = states(models.bridge, [prompt])[0, 0]

    def push(x: Tensor) -> None:
        x[:, -1] += vector

    @torch.no_grad()
    def loop(name: str) -> Answer:
        return Answer(LOOPS[name](models, batch(prompt, 1), site, push))

    goal = {"TransformerLens hooks": 1.05, "nnsight trace": 1.10}
    claims = []
    for backend, adapter, target in (("bridge", models.bridge, goal), ("nnsight", models.nnsight, {"nnsight trace": 1.10})):
        ways = [
            Way(f"hookbook, {backend}", lambda _, adapter=adapter: ours(adapter, prompt, site, vector)),
            *(Way(name, lambda _, name=name: loop(name)) for name in LOOPS),
            Way("forward hook, transformers", lambda _: by_hand(models, prompt, site, vector)),
        ]
        claims += compare(f"one edit, a prompt of {len(prompt)} tokens", ways, models, TURNS * repeats, target, at_most=True)
    return claims


if __name__ == "__main__":
    main({"overhead": bench})
