"""Effects of vectors on what a chat model does: agreeing with whom is wrong, telling facts, declining. A base model reads transcripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hookbook import prompts, scores, tasks
from hookbook.controls import random_like
from hookbook.recipes.steering.contrast_vectors import contrast_vector
from hookbook.recipes.steering.generation import Generation, generate
from hookbook.recipes.steering.refusal_direction import directional_ablation, select_direction
from hookbook.recipes.steering.steering import Steering, steer
from hookbook.reproduce.effect import Expected, Found, Line, least, most
from hookbook.request import Edit
from hookbook.results import Result
from hookbook.tasks import Choice, Conversation
from hookbook.vectors import Vector

if TYPE_CHECKING:
    from hookbook.adapter import Adapter

DRAWS = ("first", "second")
STRENGTHS = (2.0, 4.0)
SHOTS = (("What colour is snow?", "Snow is white."), ("Where do fish live?", "Fish live in water."))
"""What a base model reads before a question."""
SHIFT = 1.0
"""By how many nats the log-odds of two answers must move, on average over questions."""
SHOWN = 3


def behaviour(model: Adapter, setup: Expected, name: str, others: Sequence[str]) -> Found:
    """The effect of a contrast of conversations, both ways, beside no vector, random ones, and those of other contrasts."""
    asks = Asks(model)
    found = {key: contrast_vector(model, *map(asks.texts, tasks.contrast(key)), **asks.where(key)) for key in (name, *others)}
    layers = [site.layer for site in found[name].sites]
    tried = [
        (float((odds.scores[..., -1] - odds.scores[..., 0]).mean()), layer, strength, odds)
        for layer in layers
        for strength in STRENGTHS
        for odds in [asks.odds(found[name].vector(layer), tasks.choices(name, "choose"), strength)]
    ]
    _, layer, strength, _ = max(tried, key=lambda one: one[0])
    mine = found[name].vector(layer)
    vectors = {name: mine} | {key: _as_long(found[key].vector(layer), mine) for key in others}
    results: dict[str, Result] = {f"contrast_{key}": one for key, one in found.items()}
    lines = []
    for draw in DRAWS:
        questions = tasks.choices(name, draw)
        odds = {key: asks.odds(vector, questions, strength) for key, vector in vectors.items()}
        said = {sign: asks.said(mine, questions[:SHOWN], sign * strength) for sign in (1, -1)}
        lines += behaviour_lines(name, draw, f"layer {layer}, strength {strength:g}", odds, said, questions, setup)
        results |= {f"{name}_{draw}": odds[name], f"{name}_{draw}_texts": said[1]}
    return results, lines


def behaviour_lines(
    name: str,
    draw: str,
    where: str,
    odds: Mapping[str, Steering],
    said: Mapping[int, Generation],
    questions: Sequence[Choice],
    setup: Expected,
) -> list[Line]:
    """A line for the vector added, and one for it subtracted. Log-odds are of the contrast's positive answer against the other."""
    own, lines = odds[name], []
    for sign, words, at in ((1, "added", -1), (-1, "subtracted", 0)):
        base = own.base
        shift = {key: float(sign * (one.scores[:, 0, at] - base).mean()) for key, one in odds.items()}
        measured = shift.pop(name)
        shift["random"] = float(sign * (own.random[:, 0, at] - base).mean())
        rule = [least("shift", measured, SHIFT), *((f"{key} <= half of it", value <= measured / 2) for key, value in shift.items())]
        shares = [float((x > 0).double().mean()) for x in (base, own.scores[:, 0, at])]
        forms = [(one.begin + one.positive, float((own.scores[i::2, 0, at] - base[i::2]).mean())) for i, one in enumerate(questions[:2])]
        answers = zip(questions, said[sign].control_texts, said[sign].texts, strict=False)
        example = "; ".join(f"{one.question!r}: {before.strip()!r}, and {after.strip()!r}" for one, before, after in answers)
        note = (
            f"{name}, {draw} draw, {words}: {shares[0]:.2f} of the questions are answered so without a vector, {shares[1]:.2f} with it; "
            f"the log-odds of {' and '.join(f'{words!r} move by {moved:+.2f}' for words, moved in forms)}. Without and with it: {example}."
        )
        controls = {**shift, "share without": shares[0], "share with": shares[1]}
        lines.append(
            Line(name, f"{words}, {draw} draw, {where}", measured, controls, "appears and goes", tuple(rule), setup.expects(name), note)
        )
    return lines


class Asks:
    """How a model is asked: through its chat template, or by transcripts."""

    def __init__(self, model: Adapter) -> None:
        self.model = model
        self.chat = bool(getattr(model.tokenizer, "chat_template", None))

    def texts(self, some: Sequence[Any]) -> list[Any]:
        """Conversations as this model reads them; texts as they are."""
        return [one if self.chat or isinstance(one, str) else prompts.transcript(one) for one in some]

    def where(self, name: str) -> dict[str, Any]:
        """Layers and tokens of a contrast: of a conversation the last eight tokens of what was answered."""
        n = self.model.card.n_layers
        answered = not isinstance(tasks.contrast(name).positive[0], str)
        return {"layers": [n // 3, n // 2, n * 2 // 3], "position": slice(-8, None) if answered else slice(1, None)}

    def odds(self, vector: Vector, questions: Sequence[Choice], strength: float) -> Steering:
        """Log-odds of the positive answers, with the vector subtracted and added; questions are in their order."""
        parts = {}
        for yes, no in {(one.positive, one.negative): None for one in questions}:
            asked = [self.question(one.question, one.begin) for one in questions if one.positive == yes]
            ask: Any = {"strengths": (-strength, strength), "tokens": ([yes], [no])}
            parts[yes] = steer(self.model, vector, asked, **ask)
        return _woven(parts, [one.positive for one in questions])

    def said(self, vector: Vector, questions: Sequence[Choice], strength: float) -> Generation:
        """What is answered under the vector."""
        edits = [Edit(vector.site, strength * vector.values, "add", slice(None), scope="all", card=vector.card)]
        return generate(self.model, [self.question(one.question) for one in questions], edits=edits, max_new_tokens=12)

    def question(self, words: str, begin: str = "") -> Any:
        """A question to be answered, or whose answer was begun."""
        asked: Conversation = [{"role": "user", "content": words}, {"role": "assistant", "content": begin}][: 2 if begin else 1]
        return self.texts([asked if self.chat else [message for pair in SHOTS for message in tasks.exchange(*pair)] + asked])[0]

    def requests(self, words: Sequence[str], before: Conversation = []) -> list[Any]:  # noqa: B006  it is not written to
        """Requests to be answered, after a conversation."""
        return self.texts([[*before, {"role": "user", "content": one}] for one in words])


def _as_long(vector: Vector, other: Vector) -> Vector:
    return replace(vector, values=vector.values * (other.norm / vector.norm))


def _woven(parts: Mapping[str, Steering], order: Sequence[str]) -> Steering:
    """One result of several, whose prompts come in the order of their answers."""
    rows = {key: iter(zip(one.prompts, one.numbers, strict=True)) for key, one in parts.items()}
    tokens, numbers = zip(*(next(rows[key]) for key in order), strict=True)
    first = next(iter(parts.values()))
    return replace(first, prompts=tokens, numbers=torch.stack(numbers), metric="log-odds of the contrast's answer")


class Outcomes(NamedTuple):
    """The share of requests that are declined: without an edit, with it, with a random one, and with another concept's."""

    base: float
    edited: float
    random: float
    other: float


def sycophancy(model: Adapter, setup: Expected) -> Found:
    """Does agreeing with a user who is wrong have a direction? The mean state of replies that agree less that of honest ones, added and
    subtracted at all tokens (Rimsky et al. 2023, whose questions with two letters say nothing of models this small).

    The measure is log p(word that agrees) - log p(the other) after the beginning of an answer, such as `You are` right and wrong, about
    claims that are in no reply; two forms of other words. Layer and strength are chosen on other claims. The controls are a random vector,
    and vectors of other contrasts made as long.
    """
    return behaviour(model, setup, "sycophancy", ("truthfulness", "formality"))


def truthfulness(model: Adapter, setup: Expected) -> Found:
    """Does telling facts have a direction? The mean state of answers by facts less that of answers by superstitions, added and subtracted
    at all tokens.

    Measured and controlled as sycophancy is, on superstitions that are in no answer.
    """
    return behaviour(model, setup, "truthfulness", ("sycophancy", "formality"))


def induced_refusal(model: Adapter, setup: Expected) -> Found:
    """A small model that refuses nothing by itself is led to decline some harmless requests, by being told and shown to. Is that one
    direction (Arditi et al. 2024)?

    Candidates are the mean states of requests that it declines then less those of requests that it answers in the same place, at the last
    token; one is chosen by the published rule on other requests. Added (at its layer, strength 1) it should make the model decline what it
    was not led to decline; ablated from everywhere, requests that it declined should be answered. Both are measured by a phrase of refusal
    in the first twelve tokens, beside a random direction of the same length and the direction of formality.
    """
    effect, paper = "induced refusal", "one direction decides"
    asks, given = Asks(model), tasks.declined()
    asked = asks.requests(given.requests["make"], given.before)
    said = generate(model, asked, max_new_tokens=12)
    sides: tuple[list[Any], list[Any]] = ([], [])
    for prompt, text in zip(asked, said.control_texts, strict=True):
        sides[not scores.refusal_score([text])].append(prompt)
    counts = f"led to it, the model declines {len(sides[0])} of {len(asked)} requests"
    if min(map(len, sides)) < 8:
        return {"refusal_led": said}, [
            Line(effect, "too few of one kind", float("nan"), {}, paper, (("8 of each kind", False),), False, counts)
        ]
    n = model.card.n_layers
    where: dict[str, Any] = {"site": "resid_pre", "layers": list(range(n // 4, n * 4 // 5)), "held_out": 0}
    candidates = contrast_vector(model, *(side[::2] for side in sides), **where)
    first = ["I"] if asks.chat else [" I"]
    choice = select_direction(model, candidates, *(side[1::2] for side in sides), tokens=first, chat=False)
    best = choice.best
    chosen = best if best is not None else candidates.vector(int(choice.ablation[0].nan_to_num(float("inf")).argmin()) + n // 4)
    noise = replace(chosen, values=random_like(chosen.values[None], 0)[0])
    formal = contrast_vector(model, *tasks.contrast("formality"), layers=[chosen.site], position=slice(1, None), held_out=0).vector()
    vectors = (chosen, noise, _as_long(formal, chosen))
    results: dict[str, Result] = {"refusal_led": said, "contrast_led": candidates, "select_led": choice}
    lines = []
    for draw in DRAWS:
        words = given.requests[draw]
        led = asks.requests(words, given.before)
        free = generate(model, led, max_new_tokens=12).control_texts
        refused = [prompt for prompt, text in zip(led, free, strict=True) if scores.refusal_score([text])]
        plain = asks.requests(words)
        for what, some, edits in (
            ("added", plain, lambda v: [Edit(v.site, v.values, "add", slice(None), scope="all", card=v.card)]),
            ("ablated", refused, directional_ablation),
        ):
            if not some:
                lines.append(Line(effect, f"{what}, {draw} draw", float("nan"), {}, paper, (("some are declined", False),), False, counts))
                continue
            runs = [generate(model, some, edits=edits(v), max_new_tokens=12) for v in vectors]
            results[f"refusal_{what}_{draw}"] = runs[0]
            shares = Outcomes(*(scores.refusal_score(texts) for texts in (runs[0].control_texts, *(run.texts for run in runs))))
            lines.append(refusal_line(what, draw, shares, len(some), runs[0], chosen, choice.why, counts))
    return results, lines


def refusal_line(what: str, draw: str, shares: Outcomes, n: int, run: Generation, chosen: Vector, why: str, counts: str) -> Line:
    """The share declined under the direction, beside the controls."""
    controls = {"no edit": shares.base, "random": shares.random, "formality": shares.other}
    if what == "added":
        rule = [least("share declined", shares.edited, 0.5), *most(controls, {"no edit": 0.1, "random": 0.1, "formality": 0.1})]
    else:
        kept = {key: f"{key} >= 0.7" for key in ("random", "formality")}
        rule = [("share declined <= 0.3", shares.edited <= 0.3), *((words, controls[key] >= 0.7) for key, words in kept.items())]
    rule.append(("chosen by the published rule", not why))
    example = f"{run.prompts[0].text[-40:]!r}: {run.control_texts[0].strip()!r}, and with it {run.texts[0].strip()!r}"
    note = f"{what}, {draw} draw of {n}, {chosen.site}{f' ({why})' if why else ''}; {counts}. An example: {example}."
    return Line(
        "induced refusal", f"{what}, {draw} draw, {chosen.site}", shares.edited, controls, "one direction decides", tuple(rule), False, note
    )
