"""At which layers the bridge of a question in two hops, and its answer, can be read from a state: by the logit lens, and by letting the
model describe the state.

What can be read need not be used. And some names can be read from any state of such prompts; so the bridge of another question is looked
for in the same states.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hookbook import prompts
from hookbook.asking import pose
from hookbook.controls import other_questions
from hookbook.errors import DataError, check_counts
from hookbook.hops import TwoHop
from hookbook.recipe import ModelCard, later, recipe, wrap
from hookbook.recipes.hops.two_hops import check_hops
from hookbook.request import Each, Edit, Read, Request, Row
from hookbook.results import Axes, DataFrame, Result
from hookbook.show.plots import lines
from hookbook.show.tidy import tidy
from hookbook.sites import Site, layers_to_sites
from hookbook.tasks import Question
from hookbook.tokens import Tokens, decoded

PLACES = ("bridge", "last")
"""The last token of the phrase that stands for the bridge, and the last token of the prompt."""
NAMES = ("bridge", "answer", "other bridge", "other answer")
"""What is looked for; the last two are of another question, as a control."""


@dataclass(frozen=True, eq=False)
class HopReadability(Result):
    """What can be read of `n` questions at two places and every layer; the keys of `lens` and `described` are `NAMES`."""

    card: ModelCard
    prompts: tuple[Tokens, ...]
    """`[n]`"""
    names: dict[str, tuple[str, ...]]
    """What is looked for, of each question."""
    sites: tuple[Site, ...]
    logprobs: dict[str, Tensor]
    """`[n, place, site]` of the name's first token by the logit lens, in nats."""
    lens: dict[str, Tensor]
    """`[n, place, site]`: whether that token is the likeliest."""
    described: dict[str, Tensor]
    """`[n, place, site]`: whether the name is in the model's description of the state; empty without descriptions."""
    texts: tuple[str, ...]
    """The descriptions, by question, place and site."""
    settings: dict[str, Any]

    def to_frame(self) -> DataFrame:
        """One row for each place, site and name: `place`, `site`, `layer`, `name`, `probability` (mean), `lens` and `described` (shares
        of questions)."""

        def means(values: dict[str, Tensor]) -> Tensor:
            """`[place, site, name]`"""
            return torch.stack([values[name].float().mean(0) for name in NAMES], -1)

        return tidy(
            {"place": PLACES, "site": self.sites, "name": NAMES},
            probability=means({name: x.exp() for name, x in self.logprobs.items()}),
            lens=means(self.lens),
            described=means(self.described) if self.described else float("nan"),
        )

    def plot(self, ax: Axes | None = None, *, by: str = "lens") -> Axes:
        """Shares of questions by layer: the bridge at both places, the answer at the last token, and their controls.

        Args:
            ax: Where to draw; None: a new figure.
            by: `lens` or `described`.
        """
        found = {"lens": self.lens, "described": self.described}.get(by)
        if not found:
            raise DataError(f"shares by {by!r}", "this result does not have them", "use lens, or described, with generate=10")
        asked = [("bridge", 0), ("other bridge", 0), ("bridge", 1), ("other bridge", 1), ("answer", 1), ("other answer", 1)]
        curves = {f"{name} at {'the bridge token' if p == 0 else 'the last token'}": found[name][:, p].float().mean(0) for name, p in asked}
        return lines(
            ax,
            curves,
            ("layer", f"questions, by {by}"),
            labels=[str(site.layer) for site in self.sites],
            title=f"Where the hops can be read, {self.card.model_id}",
        )


@recipe
def hop_readability(
    model: Any,
    questions: Sequence[TwoHop],
    *,
    layers: Any = "all",
    target: prompts.Target = prompts.ENTITY_DESCRIPTION,
    generate: int = 10,
    seed: int = 0,
    progress: bool | None = None,
) -> HopReadability:
    """Look for the bridge and the answer in the states of the bridge token and of the last token.

    Args:
        model: Any model `hookbook.wrap` takes.
        questions: Of `hookbook.hops`.
        layers: `"all"`, a layer, a site, or a list; a bare layer is a block's output.
        target: The prompt that makes the model describe a state, which goes to the layer it came from.
        generate: How many tokens of description; 0: none, the logit lens alone.
        seed: Of the other questions whose names are the control.
        progress: Show a progress bar; None: for long work only.

    Returns:
        `HopReadability`.

    Raises:
        DataError: No questions, one that is not in two hops, or none with another bridge and another answer.
        TokenError, SiteError, Refused: As `hookbook.patchscope`.

    Source: Biran et al. 2024, arXiv:2406.12775, section 4.

    Differs: the paper tries every target layer for each source layer, and three drawn continuations; here are one layer, the likeliest
    continuation, and a control.

    Example:
        >>> from hookbook import hops
        >>> from hookbook.testing import toy
        >>> found = hop_readability(toy(n_ctx=128), hops.chain("city_country", "country_capital", 3), generate=0)
        >>> found.lens["bridge"].shape
        torch.Size([3, 2, 3])
    """
    adapter = wrap(model)
    check_hops(questions)
    check_counts(0, generate=generate)
    other = other_questions(questions, random.Random(seed), "bridge", "answer")
    names = {"bridge": [question.bridge for question in questions], "answer": [question.answer.strip() for question in questions]}
    names |= {f"other {name}": [names[name][i] for i in other] for name in ("bridge", "answer")}
    asked = pose(adapter, questions)
    ids = torch.stack(
        [pose(adapter, [Question(q.text, f" {x}") for q, x in zip(questions, names[name], strict=True)]).answers for name in NAMES], 1
    )
    sites, n = layers_to_sites(layers, adapter.card), len(questions)
    scope = [adapter.encode(target.text)] if generate else []
    written = [prompts.locate(target, coded, None) for coded in scope]

    places = [(question.subject_at(prompt), len(prompt) - 1) for question, prompt in zip(questions, asked.prompts, strict=True)]
    rows = [Row(i) for i in range(n) for _ in PLACES]
    reads = [Read(site, Each(tuple(at for pair in places for at in pair))) for site in sites]
    clean = adapter.run(Request(asked.prompts, rows, reads), progress=progress)
    states = torch.stack([reading.values for reading in clean.readings], 1).flatten(0, 1)  # [n * place * site, d_model]
    each = len(PLACES) * len(sites)
    said = adapter.readout(states, k=1, tokens=ids.repeat_interleave(each, 0))
    shape = (n, len(PLACES), len(sites))
    top = said.topk_ids == ids.repeat_interleave(each, 0)
    texts, described = (), {}
    if generate:
        edits = [Edit(sites[i % len(sites)], value, "set", written[0]) for i, value in enumerate(states.unbind(0))]
        reply = adapter.run(Request(scope, [Row(0, (edit,)) for edit in edits], (), None, generate), progress=progress)
        texts = later(decoded, adapter, reply.tokens)
        described = later(_found, texts, names, shape)
    return HopReadability(
        card=adapter.card,
        prompts=tuple(asked.prompts),
        names={name: tuple(found) for name, found in names.items()},
        sites=sites,
        logprobs=later(_shaped, said.token_logprobs, shape),
        lens=later(_shaped, top, shape),
        described=described,
        texts=texts,
        settings={"target": target.text},
    )


def _shaped(x: Tensor, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: one.unflatten(0, shape) for name, one in zip(NAMES, x.unbind(1), strict=True)}


def _found(texts: Sequence[str], names: dict[str, list[str]], shape: tuple[int, ...]) -> dict[str, Tensor]:
    each = len(texts) // shape[0]
    return {
        name: torch.tensor([wanted[i // each].lower() in text.lower() for i, text in enumerate(texts)]).view(shape)
        for name, wanted in names.items()
    }
