"""What a model makes of prompts about subjects: the states that relations are maps of, and whether it knows the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from hookbook.asking import encode_questions
from hookbook.relations import Statement
from hookbook.request import Each, Read, Readout, Request, Row
from hookbook.sites import Site
from hookbook.tokens import Tokens

if TYPE_CHECKING:
    from hookbook.adapter import Adapter


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
