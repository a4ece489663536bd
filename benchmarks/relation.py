"""A whole linear relation: five Jacobians at every layer, the best of 21 betas by layer, and eight maps judged on all other pairs.

The other way is the authors' loop without its waste, on the plain Hugging Face model: for each layer `jacrev` at every training
prompt, then every validation state through the map of every beta, the final norm and the unembedding. It stops at
the choice of beta, so it does less. Its sample is the first, the middle and the last layer but one; states are read once, which is not
counted. Answers are the shares of validation pairs that each map says, by layer and beta.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from common import Answer, Claim, Models, Way, batch, compare, main, spread
from jacobian import one_layer
from torch import Tensor

import hookbook as hb
from hookbook.asking import encode_questions
from hookbook.recipes.relations.linear_relations import BETAS

RELATION = "country_capital"


def whole(models: Models, relation: hb.Relation) -> Answer:
    """The recipe."""
    return Answer(hb.linear_relation(models.bridge, relation, progress=False).chosen_by)


def states(model: Any, prompts: Sequence[Any], places: Sequence[int], layer: int) -> tuple[Tensor, Tensor, list[int]]:
    """For each prompt a subject's state after a layer, the last block's output, and the likeliest next token."""
    subject, final, said = [], [], []
    for prompt, place in zip(prompts, places, strict=True):
        seen: dict[int, Tensor] = {}
        where = {layer, len(model.model.layers) - 1}
        handles = [
            model.model.layers[at].register_forward_hook(lambda m, a, out, at=at, seen=seen: seen.__setitem__(at, out[0].clone()))
            for at in where
        ]
        said.append(int(model(**batch(prompt, 1), logits_to_keep=1).logits[0, -1].argmax()))
        for handle in handles:
            handle.remove()
        subject.append(seen[layer][place])
        final.append(seen[max(where)][-1])
    return torch.stack(subject), torch.stack(final), said


def per_layer(models: Models, ready: dict[int, Any], items: Sequence[int]) -> Answer:
    """Layer by layer, prompt by prompt, beta by beta."""
    model, rows = models.plain, []
    for layer in items:
        (train, places), (s, o), (mine, answers, known) = ready[layer]
        jacobians = torch.stack([one_layer(model.model, prompt, place, layer) for prompt, place in zip(train, places, strict=True)])
        weight, bias = jacobians.mean(0), (o - torch.einsum("noi,ni->no", jacobians, s)).mean(0)
        with torch.no_grad():
            shares = []
            for beta in BETAS:
                said = model.lm_head(model.model.norm(beta * mine @ weight.T + bias)).argmax(-1)
                shares.append(float(((said == answers) & known).sum() / known.sum()))
        rows.append(torch.tensor(shares, dtype=torch.float64))
    return Answer(torch.stack(rows), rows=list(items))


def bench(models: Models, repeats: int) -> list[Claim]:
    """One call, and the loop for three layers."""
    relation, card = hb.relations.load(RELATION), models.bridge.card
    layers = spread(range(card.n_layers - 1), 3)
    found = hb.linear_relation(models.bridge, relation, layers=[0], betas=[1.0], progress=False)  # which pairs are drawn
    ready = {}
    for layer in layers:
        parts = []
        for pairs in (found.train, found.validation):
            asked = [found.ask(*pair) for pair in pairs]
            prompts, answers = encode_questions(models.bridge, asked)
            places = [question.subject_at(prompt) for question, prompt in zip(asked, prompts, strict=True)]
            with torch.no_grad():
                parts.append((prompts, places, answers, states(models.plain, prompts, places, layer)))
        (train, places, _, (s, o, _)), (_, _, answers, (mine, _, said)) = parts
        ready[layer] = ((train, places), (s, o), (mine, answers, torch.tensor(said) == answers))
    ways = [
        Way("one call, TransformerLens bridge", lambda _: whole(models, relation)),
        Way("per layer, transformers and jacrev", partial(per_layer, models, ready), layers, card.n_layers),
    ]
    title = (
        f"{RELATION}: {card.n_layers} layers, {len(found.train)} Jacobians, {len(BETAS)} betas, "
        f"{len(found.validation)} + {len(found.test)} other pairs"
    )
    return compare(title, ways, models, repeats, {"per layer, transformers and jacrev": 3.0}, unit="share")


if __name__ == "__main__":
    main({"relation": bench})
