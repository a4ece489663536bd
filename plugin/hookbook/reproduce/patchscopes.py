"""`hookbook reproduce patchscopes`: what states say when another prompt reads them: the next token, an entity, an attribute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hookbook import prompts, relations, tasks
from hookbook.recipes.reading.logit_lens import logit_lens
from hookbook.recipes.reading.patchscopes import Patchscope, patchscope
from hookbook.reproduce.effect import Expected, Found, Line, least, most
from hookbook.reproduce.suite import Suite

if TYPE_CHECKING:
    from hookbook.adapter import Adapter

GENERATED = 20
COUNTRIES = 20
KINDS = ("person", "company", "country")


@dataclass(frozen=True, kw_only=True)
class Setup(Expected):
    """Where an effect is looked for, and how large it must be."""

    identity: int | None = None
    """At this layer token identity is compared with the logit lens; None: two thirds up."""
    early: tuple[int, ...] = ()
    """Layers whose states should describe an entity; none: one ninth and two ninths up."""
    late: tuple[int, ...] = ()
    """Layers whose states should not; none: seven ninths and eight ninths up."""
    described: float = 0.5


SETUPS = {
    "gemma-3-270m": Setup(
        identity=12,
        early=(2, 4),
        late=(14, 16),
        described=0.75,
        counted=frozenset([("token identity", ""), ("entity description", "person")]),
    ),
    "smollm2-135m-instruct": Setup(
        identity=23,
        early=(5, 10),
        late=(20, 22),
        described=0.3,
        counted=frozenset([("token identity", ""), ("entity description", "person")]),
    ),
}

SUITE = Suite("Patchscopes", SETUPS, Setup(), "Layers count block outputs from 0; texts are compared in any case.")


@SUITE.effect("The next token, beside the logit lens", minutes=1)
def identity(model: Adapter, setup: Setup) -> Found:
    """The next token, read from a middle layer's state of a sentence's last token (Ghandeharioun et al. 2024, section 4.1).

    The state goes into `cat -> cat; 1135 -> 1135; hello -> hello; ?`, at the same layer. Precision is the share of 100 beginnings of news
    sentences whose likeliest next token is the one that the whole model gives. Controls: the logit lens at that layer, the states of other
    sentences, and the prompt without a patch.
    """
    texts, n = tasks.openings("news"), model.card.n_layers
    layer = setup.identity if setup.identity is not None else 2 * n // 3
    found, lens = patchscope(model, texts, source_layers="all", k=1), logit_lens(model, texts, k=1)
    assert found.precision is not None and lens.precision is not None
    own, at = found.source_ids, [write.layer for _, write in found.pairs].index(layer)
    precision = float(found.precision[:, at].double().mean())
    controls = {
        "logit lens": float(lens.precision[:, layer].double().mean()),
        "other sentences": float((found.token_ids[:, at, 0] == own.roll(37)).double().mean()),
        "unpatched": float((found.control_ids[:, 0] == own).double().mean()),
    }
    rule = (
        (f"0.3 above the logit lens: {precision - controls['logit lens']:.2f}", precision - controls["logit lens"] >= 0.3),
        *most(controls, {"other sentences": 0.08, "unpatched": 0.08}),
    )
    what, paper = f"precision, layer {layer}", "above the logit lens from middle layers on"
    line = Line("token identity", what, precision, controls, paper, rule, setup.expects("token identity"))
    return {"token_identity": found, "logit_lens": lens}, [line]


@SUITE.effect("Who is it?", minutes=2)
def entities(model: Adapter, setup: Setup) -> Found:
    """An entity, described from the state of its name's last token (section 4.3): early layers say who or what it is, late ones hold the
    next word instead.

    The state goes into `Syria: Country in the Middle East, Leonardo DiCaprio: American actor, ..., x`, at the same layer, and 20 tokens
    are generated. A text describes if it has one of the words that are known of the entity. Controls: the words of another entity of that
    kind in the same texts, and the prompt without a patch.
    """
    n, results, lines = model.card.n_layers, {}, []
    early = setup.early or tuple(dict.fromkeys((n // 9, 2 * n // 9)))
    late = setup.late or tuple(dict.fromkeys((7 * n // 9, 8 * n // 9)))
    for kind in KINDS:
        known = tasks.entities(kind)
        found = results[f"describe_{kind}"] = patchscope(
            model,
            [name for name, _ in known],
            target=prompts.ENTITY_DESCRIPTION,
            source_layers=sorted({*range(0, n, 2), *early, *late}),
            generate=GENERATED,
            k=1,
        )
        words = [words for _, words in known]
        shares, others = said(found, words).mean(0), said(found, words[7:] + words[:7]).mean(0)
        at = {write.layer: i for i, (_, write) in enumerate(found.pairs)}
        controls = {
            "late": max(float(shares[at[layer]]) for layer in late),
            "words of others": max(float(others[at[layer]]) for layer in early),
            "unpatched": sum(_has(text, some) for text, some in zip(found.control_texts, words, strict=True)) / len(words),
        }
        measured = min(float(shares[at[layer]]) for layer in early)
        rule = (least("described early", measured, setup.described), *most(controls, {"late": 0.3, "unpatched": 0.3}))
        what = f"{kind}, layers {' and '.join(map(str, early))}"
        lines.append(Line("entity description", what, measured, controls, "early layers", rule, setup.expects("entity description", kind)))
    return results, lines


@SUITE.effect("An attribute that no one asked for", minutes=1)
def attributes(model: Adapter, setup: Setup) -> Found:
    """A country's capital, out of the middle of a sentence which does not ask for it (section 4.2, one template).

    The state of the country's name in `She spent a summer in ...` goes into `The capital city of x`, at every third layer on both sides,
    and six tokens are generated. The paper counts a country if any pair of layers names it, which flatters. So the pair that does best on
    one half of the countries is judged on the other. Controls: the capital of another country in the same texts, and the prompt without a
    patch.
    """
    pairs = relations.load("country_capital").pairs[:COUNTRIES]
    layers = list(range(0, model.card.n_layers, 3))
    found = patchscope(
        model,
        [f"She spent a summer in {country}" for country, _ in pairs],
        target=prompts.attribute("The capital city of {}"),
        source_layers=layers,
        target_layers=layers,
        generate=6,
        k=1,
    )
    capitals = [(capital,) for _, capital in pairs]
    right, wrong = said(found, capitals), said(found, capitals[7:] + capitals[:7])
    one, other = judged(right), judged(wrong)
    controls = {
        "others' capitals": other,
        "any pair": float(right.amax(1).mean()),
        "any pair, others' capitals": float(wrong.amax(1).mean()),
    }
    controls["unpatched"] = sum(_has(text, some) for text, some in zip(found.control_texts, capitals, strict=True)) / len(pairs)
    rule = (least("named", one, 0.5), *most(controls, {"others' capitals": 0.1, "unpatched": 0.1}))
    what = f"capitals of {len(pairs)} countries, a pair of layers chosen on the other half"
    line = Line("attribute", what, one, controls, "any pair, of most subjects", rule, setup.expects("attribute"))
    return {"attribute_capital": found}, [line]


def said(found: Patchscope, words: Sequence[Sequence[str]]) -> Tensor:
    """`[prompt, pair]`: 1 where a text has one of its prompt's words, in any case."""
    return torch.tensor([[float(_has(text, some)) for text in texts] for texts, some in zip(found.texts, words, strict=True)])


def _has(text: str, words: Sequence[str]) -> bool:
    return any(word.strip().lower() in text.lower() for word in words)


def judged(right: Tensor) -> float:
    """Mean over both halves of the prompts of the pair that was best on the other half."""
    halves = right[0::2], right[1::2]
    return sum(float(half[:, int(other.mean(0).argmax())].mean()) for half, other in (halves, halves[::-1])) / 2
