"""`hb.backpatch` on fifty questions in two hops, every pair of layers and three controls, against the loop of `backpatch.py`.

Each control is as large as the patches themselves, and the loop has none, so it does a quarter of the work. Both end with
the log-probability of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from backpatch import per_target
from common import LOOPS, Answer, Claim, Models, Way, compare, main, spread
from torch import Tensor

import hookbook as hb
from hookbook.asking import encode_questions as encode
from hookbook.tokens import Tokens


def recipe(models: Models, asked: Sequence[hb.hops.TwoHop]) -> Answer:
    """The recipe with its controls; of the patches the log-probability of the answer, in the order of the loops."""
    n = models.bridge.card.n_layers
    found = hb.backpatch(
        models.bridge, asked, pairs=[(source, target) for target in range(n) for source in range(target + 1, n)], progress=False
    )
    return Answer(found.logprobs["patch"].flatten()[:, None], found.token_ids["patch"].flatten())


def of_answers(models: Models, coded: Sequence[Tokens], answers: Tensor, items: Sequence[tuple[int, int]]) -> Answer:
    """The loop, with the same numbers."""
    found = per_target(LOOPS["TransformerLens hooks"], models, coded, items, answers)
    return Answer(found.values[:, -1:], found.top, found.rows)


def bench(models: Models, repeats: int) -> list[Claim]:
    """The recipe, and the loop for three questions."""
    n = models.bridge.card.n_layers
    asked = hb.hops.chain("city_country", "country_capital", 50, shots=2)
    coded, answers = encode(models.bridge, asked)
    targets = range(n - 1)
    some = [(i, target) for i in spread(sorted(range(len(coded)), key=lambda i: len(coded[i])), 3) for target in targets]
    ways = [
        Way("hb.backpatch with its controls", lambda _: recipe(models, asked)),
        Way("a batch per prompt and target, no controls", partial(of_answers, models, coded, answers), some, len(coded) * len(targets)),
    ]
    return compare(f"{len(asked)} questions x {n * (n - 1) // 2} pairs", ways, models, repeats, {}, unit="logprob")


if __name__ == "__main__":
    main({"questions": bench})
