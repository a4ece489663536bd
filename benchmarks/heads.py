"""The causal scan of all heads, as for function vectors: one request, or a padded batch per head.

25 ten-shot prompts; the last token's `z` of one head is replaced by its mean over the prompts, for every head of every
layer. All ways end with the likeliest token and the log-probability of the right answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import torch
from common import LOOPS, Answer, Claim, Loop, Models, Way, compare, main, padded, spread, states
from torch import Tensor

import hookbook as hb
from hookbook.request import Edit, Readout, Request, Row
from hookbook.sites import Site
from hookbook.tokens import Tokens, answer_ids

PAIRS = """
    apple:apples ant:ants baby:babies bag:bags ball:balls bird:birds boat:boats book:books box:boxes boy:boys bus:buses car:cars cat:cats
    chair:chairs child:children church:churches city:cities coat:coats country:countries cow:cows cup:cups dish:dishes dog:dogs door:doors
    eye:eyes farm:farms fox:foxes friend:friends game:games girl:girls glass:glasses hand:hands hat:hats horse:horses house:houses key:keys
    king:kings lady:ladies lake:lakes lamp:lamps leaf:leaves letter:letters man:men mouse:mice night:nights party:parties pen:pens
    potato:potatoes river:rivers road:roads ship:ships shoe:shoes song:songs star:stars story:stories table:tables tooth:teeth tree:trees
    watch:watches wolf:wolves woman:women
"""
PLURALS: dict[str, str] = {word: plural for word, _, plural in (pair.partition(":") for pair in PAIRS.split())}


def prompts(adapter: hb.Adapter, n: int = 25, shots: int = 10) -> tuple[list[Tokens], Tensor]:
    """Prompts of some shots and a question, and the first token of each answer `[prompt, 1]`."""
    draw, coded, answers = random.Random(0), [], []
    for _ in range(n):
        *examples, question = draw.sample(list(PLURALS), shots + 1)
        text = "".join(f"Q: {word}\nA: {PLURALS[word]}\n\n" for word in examples) + f"Q: {question}\nA:"
        coded.append(adapter.encode(text))
        answers.append(answer_ids(coded[-1], " " + PLURALS[question], adapter.tokenizer)[:1])
    return coded, torch.tensor(answers)


def scan(adapter: hb.Adapter, coded: Sequence[Tokens], answers: Tensor, means: Tensor) -> Request:
    """All heads and prompts as one request, head by head; `means` is `[layer, head, d_head]`."""
    heads = [(layer, head) for layer in range(means.shape[0]) for head in range(means.shape[1])]
    edits = [(Edit(Site("head_z", layer, head), means[layer, head], "set"),) for layer, head in heads]
    rows = [Row(i, edit) for edit in edits for i in range(len(coded))]
    return Request(coded, rows, (), Readout(k=1, tokens=answers.repeat(len(heads), 1)))


def per_head(
    loop: Loop, models: Models, coded: Sequence[Tokens], answers: Tensor, means: Tensor, heads: Sequence[tuple[int, int]]
) -> Answer:
    """For each head a batch of all prompts, padded on the left."""
    n, parts = len(coded), []
    with torch.no_grad():
        for layer, head in heads:

            def put(x: Tensor, layer: int = layer, head: int = head) -> None:
                x[:, -1, head] = means[layer, head]

            start = (layer * means.shape[1] + head) * n
            logits = loop(models, padded(coded), Site("head_z", layer), put)
            parts.append(Answer.from_logits(logits, range(start, start + n), 1, answers))
    return Answer.cat(parts)


def mean_z(adapter: hb.Adapter, coded: Sequence[Tokens]) -> Tensor:
    """Each head's mean `z` at the last token: `[layer, head, d_head]`."""
    return states(adapter, coded, "head_z").mean(1).unflatten(-1, (adapter.card.n_heads, -1))


def bench(models: Models, repeats: int) -> list[Claim]:
    """One request on both backends, and each loop for some heads."""
    coded, answers = prompts(models.bridge)
    means = mean_z(models.bridge, coded)
    heads = [(layer, head) for layer in range(means.shape[0]) for head in range(means.shape[1])]
    ways = [
        Way(
            "one request, TransformerLens bridge",
            lambda _: Answer.of(models.bridge.run(scan(models.bridge, coded, answers, means), progress=False)),
        ),
        Way("one request, nnsight", lambda _: Answer.of(models.nnsight.run(scan(models.nnsight, coded, answers, means), progress=False))),
        *(
            Way(f"a batch per head, {name}", partial(per_head, loop, models, coded, answers, means), spread(heads, 6), len(heads))
            for name, loop in LOOPS.items()
        ),
    ]
    title = f"{len(heads)} heads x {len(coded)} prompts of up to {max(map(len, coded))} tokens"
    return compare(title, ways, models, repeats, {"a batch per head, TransformerLens hooks": 40.0}, unit="logprob")


if __name__ == "__main__":
    main({"heads": bench})
