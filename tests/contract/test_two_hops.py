"""Questions in two hops on every adapter, against loops of plain runs: the cells, what states say, and attention that is knocked out."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from string import ascii_letters, ascii_lowercase, digits
from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.errors import DataError, Refused, TokenError
from hookbook.recipes.hops.two_hops import WAYS
from hookbook.relations import Relation
from hookbook.tasks import Question
from tests.contract.test_backpatching import letters, says
from tests.support.cases import Case


def relations(n: int) -> tuple[Relation, Relation]:
    """Of words to words to digits; the phrase goes on after the entity."""
    draw = random.Random(2)
    first, second = (["".join(draw.sample(some, 3)) for _ in range(n)] for some in (ascii_lowercase[:13], ascii_lowercase[13:]))
    pairs = {bridge: digits[i % 10] * (1 + i // 10) for i, bridge in enumerate(second)}
    return (
        Relation(tuple(dict(zip(first, second, strict=True)).items()), "first", templates=("{} in",), phrase="q {}r"),
        Relation(tuple(pairs.items()), "second", templates=("t {} is",)),
    )


def ids_of(case: Case, question: Question) -> tuple[tuple[int, ...], int]:
    ids = case.adapter.encode(question.text).ids
    return ids, case.adapter.encode(question.text + question.answer).ids[len(ids)]


def test_the_cells_of_planted_questions(case):
    """One question for each way in which its five parts can be answered or not."""
    known, unknown, *_ = letters(case)
    (like,) = hb.hops.chain(*relations(1))
    every = list(itertools.product((True, False), repeat=len(WAYS)))
    asked = []
    for composed, *parts in every:
        own = known if composed else unknown
        asked.append(
            replace(
                like,
                text=own.text,
                answer=own.answer,
                **{way: known if part else unknown for way, part in zip(WAYS[1:], parts, strict=True)},
            )
        )
    found = hb.two_hops(case.adapter, asked)
    ids = [int(case.plain(case.adapter.encode(question.text).ids)[0][-1].argmax()) for question in (unknown, known)]
    for at, way in enumerate(WAYS):
        assert found.right[way].tolist() == [parts[at] for parts in every] and found.token_ids[way].tolist() == [
            ids[parts[at]] for parts in every
        ]
    cells = found.cells()
    assert cells[["first", "second"]].values.tolist() == [[True, True], [True, False], [False, True], [False, False]]
    assert cells[["n", "answered", "rate", "n_clean", "answered_clean", "rate_clean"]].values.tolist() == [[8, 4, 0.5, 2, 1, 0.5]] * 4
    assert found.cells(by_chain=True).drop(columns="chain").equals(cells)
    chosen = found.select(first=True, second=False, composed=False, shortcut=False)
    assert [every[i] for i in chosen] == [(False, True, False, False, False)]
    assert len(found.select(composed=True)) == 4 and len(found.select(first=None, second=None)) == 32
    frame = found.to_frame()
    assert frame["composed"].tolist() == [parts[0] for parts in every] and set(frame["said first"]) == {found.vocab[i] for i in ids}


def test_an_answer_in_generated_text_counts(case):
    asked, steps = [replace(question, answer="~~") for question in hb.hops.chain(*relations(4))], 3
    texts = hb.generate(case.adapter, [question.text for question in asked], max_new_tokens=steps).texts
    at = next((i for i, text in enumerate(texts) if len(text[1:].strip()) > 1 and text.isascii() and text.isprintable()), None)
    if at is not None:
        asked[at] = replace(asked[at], answer=texts[at][1:].swapcase())
    asked = [replace(q, first=q, second=q, entity_shortcut=q, relation_shortcut=q) for q in asked]
    found = hb.two_hops(case.adapter, asked, generate=steps)
    assert found.right["composed"].tolist() == [i == at for i in range(4)] == found.right["entity_shortcut"].tolist()


TARGET = hb.prompts.Target("ab: c, x", "x")


def test_what_states_say_is_what_plain_runs_say(case):
    """The lens of a state: the model's own logits where its last block gives this state. The description: plain decoding behind the
    patched target."""
    adapter, asked = case.adapter, hb.hops.chain(*relations(3))
    layers, steps = adapter.card.n_layers, 2
    found = hb.hop_readability(adapter, asked, target=TARGET, generate=steps)
    sites, target = tuple(hb.Site("resid_post", layer) for layer in range(layers)), adapter.encode(TARGET.text).ids
    for i, question in enumerate(asked):
        ids, _ = ids_of(case, question)
        _, states = case.plain(ids, (), sites)
        for p, at in enumerate((len(adapter.encode(question.text[: question.end])) - 1, len(ids) - 1)):
            for layer, site in enumerate(sites):
                logits = case.plain(ids, ((sites[-1], len(ids) - 1, hb.Edit(sites[-1], states[site][at], "set"), []),))[0][-1]
                for name in ("bridge", "answer", "other bridge", "other answer"):
                    first = adapter.encode(f"{question.text} {found.names[name][i]}").ids[len(ids)]
                    assert abs(float(found.logprobs[name][i, p, layer]) - float(logits.log_softmax(-1)[first])) < 1e-10
                    assert bool(found.lens[name][i, p, layer]) == (int(logits.argmax()) == first)
                edit = ((site, len(target) - 1, hb.Edit(site, states[site][at], "set"), []),)
                out: list[int] = []
                while len(out) < steps and not (out and out[-1] in adapter.eos_ids):
                    out.append(int(case.plain((*target, *out), edit)[0][-1].argmax()))
                text = adapter.tokenizer.decode([token for token in out if token not in adapter.eos_ids])
                assert found.texts[(i * 2 + p) * layers + layer] == text
    for i, question in enumerate(asked):
        assert (found.names["bridge"][i], found.names["answer"][i]) == (question.bridge, question.answer.strip())
        assert found.names["other bridge"][i] != question.bridge and found.names["other answer"][i] != question.answer.strip()
    assert len({round(float(x), 6) for x in found.logprobs["bridge"].flatten()}) > 4


def test_a_name_in_a_description_is_found():
    """Of a model whose every description is known."""
    from hookbook.testing import toy

    adapter, asked = toy(), hb.hops.chain(*relations(3))
    said = hb.hop_readability(adapter, asked, target=TARGET, generate=3)
    texts = [text for text in said.texts if len(text.strip()) > 1 and text.isprintable()]
    assert texts
    named = [replace(question, bridge=texts[0].swapcase() if i == 1 else question.bridge) for i, question in enumerate(asked)]
    found = hb.hop_readability(adapter, named, target=TARGET, generate=3)
    want = torch.tensor([texts[0] in text for text in said.texts]).view(3, 2, -1)
    assert (found.described["bridge"][1] == want[1]).all() and not found.described["bridge"][[0, 2]].any()
    others = torch.tensor([name == named[1].bridge for name in found.names["other bridge"]])
    assert (found.described["other bridge"] == want & others[:, None, None]).all() and want.any()


def test_windows_without_attention_are_plain_runs(case):
    adapter, asked, k = case.adapter, hb.hops.chain(*relations(4), shots=1), 1
    try:
        found = hb.hop_knock_out(adapter, asked, k=k)
    except Refused as refusal:
        pytest.fail(f"attn_pattern: {refusal}")
    layers = adapter.card.n_layers
    assert found.windows == tuple(tuple(range(max(0, at - k), min(layers, at + k + 1))) for at in range(layers))
    for i, question in enumerate(asked):
        ids, answer = ids_of(case, question)
        text, last = question.text, len(ids) - 1

        def tokens(start: int, end: int, text: str = text) -> tuple[int, ...]:  # one byte is one token
            before = len(adapter.encode(text[:start])) if start else len(adapter.encode("a")) - 1
            return tuple(range(before, before + end - start))

        line, phrase, entity = text.rindex("\n") + 1, text.rindex("q "), text.rindex(question.entity)
        first = (*tokens(phrase, entity), *tokens(entity + 3, entity + 4))
        second = (*tokens(line, phrase), *tokens(entity + 4, len(text) - 1))
        want = {"entity": tokens(entity, entity + 3), "bridge": tokens(entity + 3, entity + 4), "first": first, "second": second}
        bridge = want["bridge"][0]
        for e, (who, seen) in enumerate(found.edges):
            query = last if who == "last" else bridge
            keys, control = found.keys[i][e], found.control_keys[i][e]
            assert keys == tuple(key for key in want[seen] if key < query), (who, seen)
            others = {*tokens(line, len(text))} & {*range(query)} - {*keys, 0}
            assert len(control) == len(set(control)) == min(len(keys), len(others)) and {*control} <= others
            for c, some in enumerate((keys, control)):
                for w, window in enumerate(found.windows):
                    sites = [hb.Site("attn_pattern", layer) for layer in window]
                    logits = case.plain(ids, tuple((site, query, hb.Edit(site, op="knock_out"), list(some)) for site in sites))[0][-1]
                    assert abs(float(found.logprobs[i, e, c, w]) - float(logits.log_softmax(-1)[answer])) < 1e-6
                    assert float(found.right[i, e, c, w]) == (int(logits.argmax()) == answer)
        clean = case.plain(ids)[0][-1]
        assert abs(float(found.clean_logprobs[i]) - float(clean.log_softmax(-1)[answer])) < 1e-10 and bool(found.clean[i]) == (
            int(clean.argmax()) == answer
        )
    assert (found.logprobs - found.clean_logprobs[:, None, None, None]).abs().amax() > 1e-3


def test_an_answer_that_needs_attention_is_lost_without_it(case):
    """Of short questions, whose answers are what the model says."""
    pairs = tuple((letter, letter + "#") for letter in ascii_lowercase)
    first = Relation(pairs, "first", templates=("{} in",), phrase="{}r")
    second = [
        Relation(tuple((y, "~") for _, y in pairs), "second", templates=("{}" + end,)) for end in (*ascii_letters, *digits, *"!?.:;,")
    ]
    asked = (question for relation in second for question in hb.hops.chain(first, relation, 5))
    known = [replace(question, answer=said) for question in asked if (said := says(case, question.text))][:20]
    found = hb.hop_knock_out(case.adapter, known, edges=[("last", "entity"), ("last", "bridge")], k=9)
    assert found.clean.all() and found.windows == (tuple(range(case.adapter.card.n_layers)),) * case.adapter.card.n_layers
    for i, question in enumerate(known):
        ids, answer = ids_of(case, question)
        assert found.keys[i] == ((len(ids) - 3,), (len(ids) - 2,)) and found.control_keys[i] == found.keys[i][::-1]
        for e, keys in enumerate(found.keys[i]):
            cut = tuple(
                (hb.Site("attn_pattern", layer), len(ids) - 1, hb.Edit(hb.Site("attn_pattern", layer), op="knock_out"), [*keys])
                for layer in found.windows[0]
            )
            assert bool(found.right[i, e, 0, 0]) == (int(case.plain(ids, cut)[0][-1].argmax()) == answer)
    assert 0 < found.right.mean() < 1


def test_rates_of_planted_windows(tmp_path):
    from hookbook.testing import toy

    found = hb.hop_knock_out(toy(), hb.hops.chain(*relations(3)), edges=[("last", "bridge"), ("bridge", "entity")])
    right = torch.zeros(3, 2, 2, 3)
    right[0, 0, 0], right[1, 0, 0, 2], right[:, 1, 1], right[1, 1, 1] = 1, 1, 1, float("nan")
    found = replace(found, clean=torch.tensor([True, True, False]), right=right)
    assert found.kept().tolist() == [[[0.5, 0.5, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 1]]]
    frame = found.to_frame().set_index(["edge", "control", "layer"])
    assert frame.loc[("last to bridge", "edge", 2), "kept"] == 1 and frame.loc[
        ("bridge to entity", "other tokens", 0), ["n", "kept"]
    ].tolist() == [
        1,
        1,
    ]
    assert frame.loc[("bridge to entity", "edge", 0), "n"] == 2 and len(frame) == 12
    again = hb.HopKnockOut.load(found.save(tmp_path / "found"))
    assert again.to_frame().equals(found.to_frame())


def test_pictures_say_what_the_tables_say():
    import matplotlib

    matplotlib.use("Agg")
    from hookbook.testing import toy

    asked = hb.hops.chain(*relations(4))
    cells = hb.two_hops(toy(), asked)
    right = {way: torch.zeros(4).bool() for way in WAYS} | {"first": torch.tensor([1, 1, 0, 1]).bool(), "second": torch.ones(4).bool()}
    cells = replace(cells, right=right | {"composed": torch.tensor([1, 0, 0, 0]).bool()})
    assert [text.get_text() for text in cells.plot().texts] == ["1 of 3", "0 of 0", "0 of 1", "0 of 0"] and "0.33" in cells.view().html
    cut = hb.hop_knock_out(toy(), asked, edges=[("last", "entity")])
    cut = replace(cut, clean=torch.ones(4).bool())
    solid, dashed = cut.plot().lines
    assert (
        torch.as_tensor(solid.get_ydata()).tolist() == cut.kept()[0, 0].tolist()
        and dashed.get_linestyle() == "--"
        and "last to entity" in cut.view().html
    )
    lens = hb.hop_readability(toy(), asked, generate=0)
    assert (
        lens.texts == ()
        and torch.as_tensor(lens.plot().lines[0].get_ydata()).tolist() == lens.lens["bridge"][:, 0].float().mean(0).tolist()
        and "bridge" in lens.view().html
    )
    with pytest.raises(DataError, match="shares by 'described'"):
        lens.plot(by="described")


def test_plans_count_what_is_run():
    from hookbook.testing import toy

    asked = hb.hops.chain(*relations(3))
    calls: list[Any] = [(hb.two_hops, {}), (hb.hop_knock_out, {}), (hb.hop_readability, {"generate": 0})]
    for call, ask in calls:
        plan, cost = call.plan(toy(), asked, **ask), call(toy(), asked, **ask).settings["cost"]
        assert (plan.passes, plan.token_layers) == (cost["passes"], cost["token_layers"])


@pytest.mark.parametrize(
    ("call", "ask", "error", "match"),
    [
        ("two_hops", {"questions": []}, DataError, "no questions"),
        ("two_hops", {"questions": [Question("a", "b")]}, DataError, "as a question in two hops"),
        ("two_hops", {"generate": 3}, DataError, "so short a text"),
        ("hop_knock_out", {"edges": [("entity", "last")]}, DataError, "last or bridge"),
        ("hop_knock_out", {"edges": []}, DataError, "last or bridge"),
        ("hop_knock_out", {"edges": [("bridge", "bridge")]}, DataError, "no question has such tokens"),
        ("hop_knock_out", {"k": -1}, TokenError, "0 or more"),
        ("hop_readability", {"generate": -1}, TokenError, "generate=-1"),
        ("hop_readability", {"questions": "one"}, DataError, "no other bridge and answer than"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_runs(call, ask, error, match, monkeypatch):
    from hookbook.testing import ToyModel, toy

    adapter, asked = toy(), hb.hops.chain(*relations(3))
    monkeypatch.setattr(ToyModel, "forward", lambda *args: pytest.fail("the model was run"))
    given = ask.pop("questions", asked)
    with pytest.raises(error, match=match):
        getattr(hb, call)(adapter, asked[:1] if given == "one" else given, **ask)


def test_a_model_without_patterns_refuses(monkeypatch):
    from hookbook.testing import ToyAdapter, ToyModel, toy

    monkeypatch.setattr(ToyModel, "forward", lambda *args: pytest.fail("the model was run"))
    refusal = Refused("attn_pattern", "its attention is fused", "load it otherwise")
    monkeypatch.setattr(ToyAdapter, "refuses", lambda self, site: refusal if site.name == "attn_pattern" else None)
    with pytest.raises(Refused, match="its attention is fused"):
        hb.hop_knock_out(toy(), hb.hops.chain(*relations(3)))
