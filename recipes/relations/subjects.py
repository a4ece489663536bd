"""What a model makes of prompts about subjects: the states that relations are maps of, and whether it knows the answers; maps that know
less, and how often a map says the answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hookbook.adapter import Adapter
from hookbook.asking import encode_questions
from hookbook.controls import random_like
from hookbook.deferred import Deferred
from hookbook.errors import DataError
from hookbook.recipes.reading.jacobians import Jacobian
from hookbook.relations import Relation, Statement
from hookbook.request import Each, Read, Readout, Request, Row
from hookbook.sites import Site
from hookbook.tokens import Tokens

Pair = tuple[str, str]
"""A subject and its object."""


@dataclass(frozen=True)
class SubjectStates:
    """What a model makes of prompts about subjects."""

    prompts: list[Tokens]
    places: tuple[int, ...]
    """Of each prompt the subject's last token."""
    answers: Tensor
    """`[n]`: the first token of each object."""
    subject: tuple[Tensor, ...]
    """At each site `[n, d_model]`."""
    final: Tensor
    """`[n, d_model]`: the last block's output at the last token."""
    known: Tensor
    """`[n]`: whether the model says the answer."""


def subject_states(adapter: Adapter, asked: Sequence[Statement], sites: Sequence[Site], progress: bool | None) -> SubjectStates:
    """Run prompts about subjects once."""
    prompts, answers = encode_questions(adapter, asked)
    places = tuple(question.subject_at(tokens) for question, tokens in zip(asked, prompts, strict=True))
    reads = [Read(site, Each(places)) for site in sites] + [Read(Site("resid_post", adapter.card.n_layers - 1))]
    reply = adapter.run(Request(prompts, [Row(i) for i in range(len(prompts))], reads, Readout(k=1)), progress=progress)
    *subject, final = (reading.values.cpu() for reading in reply.readings)
    return SubjectStates(prompts, places, answers, tuple(subject), final, reply.said.topk_ids[:, 0] == answers)


OTHERS = ("logit lens", "shift", "bias", "least squares", "least squares, validation", "random")


def others(
    found: Jacobian, k: int, beta: Tensor, bias: Tensor, states: SubjectStates, first: slice, second: slice, ridge: float, seed: int
) -> dict[str, Tensor]:
    """What other maps make of the test subjects' states at a site, `[n, d_model]` each."""
    s, train, weight = states.subject[k][second], found.inputs[k], found.matrices[k]
    noise = random_like(weight, seed + k, whole=True)
    fits = least_squares(train, found.output, s, ridge), least_squares(states.subject[k][first], states.final[first], s, ridge)
    said = (s, s + (found.output - train).mean(0), bias.expand(len(s), -1), *fits, beta * (s @ noise.T) + bias)
    return dict(zip(OTHERS, said, strict=True))


def least_squares(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
    """Ridge regression with a bias from `x` `[n, d_in]` to `y` `[n, d_out]`, at `new` `[m, d_in]`; the penalty is `ridge` times the mean
    squared norm of centred `x`."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, y, new = x.to(wide), y.to(wide), new.to(wide)
    centre, middle = x.mean(0), y.mean(0)
    u, s, v = torch.linalg.svd(x - centre, full_matrices=False)
    penalty = ridge * (s**2).sum() / len(x)
    shrunk = torch.where(s > torch.finfo(wide).eps * s[0], s / (s**2 + penalty), 0)
    return ((new - centre) @ v.T * shrunk @ u.T @ (y - middle) + middle).to(dtype)


def share(adapter: Adapter, outputs: Tensor, answers: Tensor, known: Tensor) -> Tensor:
    """Of outputs `[map, n, d_model]` how often each map says the answer, over what is known, `[map]`."""
    if not isinstance(known, Deferred):  # the others need not be read; while it is not here which these are, all are
        outputs, answers, known = outputs[:, known], answers[known], known[known]
    said = adapter.readout(outputs.flatten(0, 1), k=1).topk_ids[:, 0].unflatten(0, (len(outputs), -1))
    return ((said == answers) & known).sum(1).double() / known.sum().clamp(min=1)


def split(relation: Relation, n_train: int, queries: int | None, seed: int) -> tuple[tuple[Pair, ...], tuple[Pair, ...], tuple[Pair, ...]]:
    """Pairs to expand around, to choose by and to judge by; the same for the same seed, whatever the order of the pairs."""
    if len(relation) < n_train + 2:
        raise DataError(
            f"{len(relation)} pairs of {relation.name!r}",
            f"{n_train} are to train, and others to choose and to judge by",
            "give more pairs, or use a smaller n_train",
        )
    pairs = sorted(relation.pairs)
    random.Random(f"{seed} {relation.name}").shuffle(pairs)
    train, rest = pairs[:n_train], pairs[n_train:]
    half = len(rest) // 2
    return tuple(train), tuple(rest[:half][:queries]), tuple(rest[half:][:queries])
