"""Jacobians of the last layer's output with respect to every earlier layer's, for one relation: one call, or one for each layer.

The output is at the last token, the sources are at the subject's last token. The other way is `torch.func.jacrev` on the
plain Hugging Face model without its unembedding, for each prompt and layer, in chunks of 128 output dimensions: a tenth
faster than all at once, which is what `torch.autograd.functional.jacobian(vectorize=True)` does. Its backward pass ends at
the source, so its cost falls with the layer, about linearly: the sample has the first, the middle and the last layer, whose
mean is that of all. Answers are compared relative to a matrix's largest entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from common import Answer, Claim, Models, Way, batch, compare, main, spread
from torch import Tensor

import hookbook as hb
from hookbook.request import Each, Read
from hookbook.sites import Site
from hookbook.tokens import At, Tokens, resolve

TEMPLATE = "The capital city of {} is"
CHUNK = 128
"""How many output dimensions of the other way go through one backward pass."""
SUBJECTS = ("France", "Japan", "Egypt", "Canada", "Germany")


def relative(matrices: Tensor) -> Tensor:
    """Each matrix `[n, d_out, d_in]` over its largest entry."""
    return matrices / matrices.abs().amax((-2, -1), keepdim=True)


def one_call(adapter: hb.Adapter, coded: Sequence[Tokens], places: Sequence[int]) -> Answer:
    """All layers and prompts, layer by layer."""
    last = adapter.card.n_layers - 1
    wrt = [Read(Site("resid_post", layer), Each(tuple(places))) for layer in range(last)]
    found = hb.jacobian(adapter, coded, Read(Site("resid_post", last)), wrt, progress=False)
    return Answer(relative(torch.cat(found.matrices)))


def per_layer(models: Models, coded: Sequence[Tokens], places: Sequence[int], items: Sequence[tuple[int, int]]) -> Answer:
    """For each prompt and layer a Jacobian of its own."""
    found = [one_layer(models.plain.model, coded[i], places[i], layer) for layer, i in items]
    return Answer(relative(torch.stack(found)), rows=[layer * len(coded) + i for layer, i in items])


def one_layer(model: Any, prompt: Tokens, place: int, layer: int) -> Tensor:
    """The Jacobian of the last layer's output at the last token with respect to the state of one token in one layer."""
    layers, inputs = model.layers, batch(prompt, 1)
    seen: list[Tensor] = []
    handle = layers[layer].register_forward_hook(lambda module, args, output: seen.append(output[0, place].clone()))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    handle.remove()

    def rest(state: Tensor) -> Tensor:
        def put(module: object, args: object, output: Tensor) -> Tensor:
            return output.index_put((torch.tensor([0]), torch.tensor([place])), state[None])

        last: list[Tensor] = []
        handles = [
            layers[layer].register_forward_hook(put),
            layers[-1].register_forward_hook(lambda module, args, output: last.append(output[0, -1])),
        ]
        model(**inputs, use_cache=False)
        for handle in handles:
            handle.remove()
        return last[0]

    return torch.func.jacrev(rest, chunk_size=CHUNK)(seen[0])


def bench(models: Models, repeats: int) -> list[Claim]:
    """One call, and `jacrev` for three layers of one prompt."""
    coded = [models.bridge.encode(TEMPLATE.format(subject)) for subject in SUBJECTS]
    places = [resolve(At(subject), prompt)[0] for subject, prompt in zip(SUBJECTS, coded, strict=True)]
    sources = range(models.bridge.card.n_layers - 1)
    some = [(layer, len(coded) // 2) for layer in spread(sources, 3)]
    ways = [
        Way("one call, TransformerLens bridge", lambda _: one_call(models.bridge, coded, places)),
        Way("jacrev per layer and prompt, transformers", partial(per_layer, models, coded, places), some, len(sources) * len(coded)),
    ]
    d_model = models.bridge.card.d_model
    title = f"{len(sources)} Jacobians of {d_model} x {d_model} for {len(coded)} prompts of {len(coded[0])} tokens"
    return compare(title, ways, models, repeats, {"jacrev per layer and prompt, transformers": 8.0}, unit="J| / max |J")


if __name__ == "__main__":
    main({"jacobian": bench})
