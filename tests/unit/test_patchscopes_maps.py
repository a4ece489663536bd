"""Patchscopes through maps, into other models, and what a result keeps."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import hookbook as hb
from hookbook.errors import EditError, SiteError, TokenError
from hookbook.prompts import Target
from hookbook.sites import Site
from hookbook.testing import ToyAdapter, toy, toy_tokenizer
from tests.support.cases import Case
from tests.unit.test_patchscopes import ALL, EXACT, SOURCES, TOY, WIDE, close, decoded, edits, everything, spoken, state

# maps and other models


def affine(d_target: int, d_source: int) -> hb.Affine:
    make = torch.Generator().manual_seed(5)
    return hb.Affine(
        torch.randn(d_target, d_source, generator=make, dtype=torch.float64), torch.randn(d_target, generator=make, dtype=torch.float64)
    )


def test_an_affine_map_is_applied_to_every_state():
    f = affine(16, 16)
    out = hb.patchscope(TOY.adapter, SOURCES, target="cd?", target_layers="all", map=f, k=ALL, generate=3)
    said = everything(out.token_ids, out.logprobs)
    for n, source in enumerate(SOURCES):
        for p, (read, write) in enumerate(out.pairs):
            patch = edits(f.weight @ state(TOY, source, -1, read) + f.bias, 3, write)
            assert close(said[n, p], spoken(TOY, "cd?", patch)) and out.texts[n][p] == decoded(TOY, "cd?", 3, patch)


def test_the_identity_map_is_no_map():
    unit = hb.Affine(torch.eye(16), torch.zeros(16))
    one, other = (hb.patchscope(TOY.adapter, SOURCES, target="cd?", target_layers="all", map=f) for f in (None, unit))
    assert torch.equal(one.token_ids, other.token_ids) and close(one.logprobs, other.logprobs)


def test_fitting_recovers_a_planted_map():
    f = affine(5, 7)
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fitted = hb.Affine.fit(x, x @ f.weight.T + f.bias)
    assert close(fitted.weight, f.weight) and close(fitted.bias, f.bias)
    site = Site("resid_post", 0)
    assert close(fitted(x, site, site), x @ f.weight.T + f.bias)


def test_fitting_is_in_float64_and_least_squares():
    make = torch.Generator().manual_seed(1)
    x, y = torch.randn(30, 3, generator=make), torch.randn(30, 2, generator=make)
    fitted = hb.Affine.fit(x, y)
    assert fitted.weight.dtype == fitted.bias.dtype == torch.float64 and fitted.weight.shape == (2, 3) and fitted.bias.shape == (2,)
    site = Site("resid_post", 0)
    rest = y.double() - fitted(x.double(), site, site)
    assert close(rest.sum(0), torch.zeros(2, dtype=torch.float64)) and close(rest.T @ x.double(), torch.zeros(2, 3, dtype=torch.float64))


def test_a_callable_map_gets_the_states_and_their_sites():
    calls: list[tuple[Tensor, Site, Site]] = []

    def f(x: Tensor, read: Site, write: Site) -> Tensor:
        calls.append((x, read, write))
        return x * (1 + read.layer) - write.layer

    out = hb.patchscope(TOY.adapter, SOURCES, target="cd?", source_layers=["mlp_out.1", 2], target_layers=[0, "attn_out.1"], map=f, k=ALL)
    assert (
        tuple((read, write) for _, read, write in calls)
        == out.pairs
        == tuple((Site.parse(r), Site.parse(w)) for r in ("mlp_out.1", "resid_post.2") for w in ("resid_post.0", "attn_out.1"))
    )
    said = everything(out.token_ids, out.logprobs)
    for p, (x, read, write) in enumerate(calls):
        assert x.shape == (2, 16)
        for n, source in enumerate(SOURCES):
            assert close(x[n], state(TOY, source, -1, read))
            assert close(said[n, p], spoken(TOY, "cd?", edits(x[n] * (1 + read.layer) - write.layer, -1, write)))


def test_states_go_to_another_model_through_a_map():
    f = affine(24, 16)
    out: Any = hb.patchscope(
        TOY.adapter,
        SOURCES,
        target=Target("ab?cd", "?"),
        target_layers="all",
        target_model=WIDE.adapter,
        map=f,
        k=ALL,
        generate=3,
        tokens=["x"],
    )
    assert (out.source_card.d_model, out.target_card.d_model) == (16, 24)
    said, control = everything(out.token_ids, out.logprobs), everything(out.control_ids, out.control_logprobs)
    for n, source in enumerate(SOURCES):
        own = spoken(TOY, source)
        assert (
            close(control[n], spoken(WIDE, "ab?cd"))
            and out.control_texts[n] == decoded(WIDE, "ab?cd", 3)
            and int(out.source_ids[n]) == int(own.argmax())
        )
        for p, (read, write) in enumerate(out.pairs):
            patch = edits(f.weight @ state(TOY, source, -1, read) + f.bias, 3, write)
            assert close(said[n, p], spoken(WIDE, "ab?cd", patch)) and out.texts[n][p] == decoded(WIDE, "ab?cd", 3, patch)
            assert abs(float(out.surprisal[n, p] + own[out.token_ids[n, p, 0]])) < EXACT


def test_states_go_to_another_model_of_the_same_width_as_they_are():
    other = Case("toy", toy(seed=3, n_layers=5))
    out = hb.patchscope(TOY.adapter, "hi", target="cd?", target_layers=[0, 4], target_model=other.adapter, k=ALL)
    for p, (read, write) in enumerate(out.pairs):
        assert close(everything(out.token_ids, out.logprobs)[0, p], spoken(other, "cd?", edits(state(TOY, "hi", -1, read), -1, write)))


def test_another_width_needs_a_map_that_fits():
    for f, message in (
        (None, "states of width 16 for a model of width 24"),
        (affine(16, 24), r"a map of shape \[16, 24\]"),
        (lambda x, read, write: x, "whose width is 24"),
    ):
        with pytest.raises(EditError, match=message):
            hb.patchscope(TOY.adapter, "hi", target="cd?", target_model=WIDE.adapter, map=f)


def test_layers_are_those_of_the_model_they_are_in():
    with pytest.raises(SiteError, match="in the target model: it has layers 0 to 1"):
        hb.patchscope(TOY.adapter, "hi", target="cd?", target_model=toy(n_layers=2))
    out = hb.patchscope(TOY.adapter, "hi", target="cd?", target_layers=-1, target_model=toy(n_layers=2))
    assert {write for _, write in out.pairs} == {Site("resid_post", 1)}


def reversed_toy() -> ToyAdapter:
    """The toy with a tokenizer that numbers its bytes the other way round."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    plain = json.loads(toy_tokenizer().backend_tokenizer.to_str())
    vocab = plain["model"]["vocab"]
    plain["model"]["vocab"] = {letter: i if i < 2 else 259 - i for letter, i in vocab.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    return ToyAdapter(TOY.adapter.model, tokenizer)


def test_precision_and_surprisal_need_one_vocabulary():
    for other in (reversed_toy(), toy(d_vocab=300, seed=1)):
        out = hb.patchscope(TOY.adapter, SOURCES, target="cd?", target_model=other)
        assert out.precision is None and out.surprisal is None
    assert hb.patchscope(TOY.adapter, SOURCES, target="cd?", target_model=toy(seed=1)).precision is not None


def test_tokens_of_two_vocabularies_keep_their_own_texts():
    out: Any = hb.patchscope(TOY.adapter, SOURCES, target="cd?", target_model=reversed_toy(), k=ALL)
    read, write = TOY.adapter.tokenizer, reversed_toy().tokenizer
    for row in out.to_frame().query("layer == 0 and rank < 9").itertuples():
        n = SOURCES.index(row.prompt)
        assert row.token == write.decode([int(out.token_ids[n, 0, row.rank])]) and row.control_token == write.decode(
            [int(out.control_ids[n, row.rank])]
        )
        assert row.source_token == read.decode([int(out.source_ids[n])])


# what is kept


def test_a_patchscope_keeps_what_was_asked():
    out = hb.patchscope(TOY.adapter, SOURCES, target=Target("ab?cd", "?"), source_position=1, bos=True, k=2, generate=1)
    encode = TOY.adapter.encode
    assert out.sources == tuple(encode(text) for text in SOURCES) and out.targets == (encode("ab?cd"),)
    assert out.source_card == out.target_card == TOY.adapter.card and out.source_positions == (1, 1)
    asked = {
        "source_position": "1",
        "target_position": "None",
        "readout_position": "-1",
        "map": "identity",
        "generate": 1,
        "k": 2,
        "bos": True,
        "chat": False,
    }
    assert {name: out.settings[name] for name in asked} == asked
    for i, text in out.vocab.items():
        assert text == TOY.adapter.tokenizer.decode([i])
    assert set(out.vocab) == {int(i) for t in (out.token_ids, out.control_ids, out.source_ids) for i in t.flatten()}


def test_prompts_come_as_texts_ids_or_tokens():
    tokens = TOY.adapter.encode("hi")
    want = hb.patchscope(TOY.adapter, "hi", target="cd?", k=3)
    for source in (
        ["hi"],
        ("hi",),
        tokens,
        [tokens],
        list(tokens.ids),
        [list(tokens.ids)],
        torch.tensor(tokens.ids),
        [torch.tensor(tokens.ids)],
    ):
        out = hb.patchscope(TOY.adapter, source, target=TOY.adapter.encode("cd?"), k=3)
        assert torch.equal(out.token_ids, want.token_ids) and torch.equal(out.logprobs, want.logprobs)


def test_nothing_is_left_on_the_model():
    before = spoken(TOY, "hi")
    hb.patchscope(TOY.adapter, SOURCES, target="cd?", target_layers="all", generate=2)
    assert torch.equal(spoken(TOY, "hi"), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in TOY.adapter.model.modules())


def test_what_cannot_be_asked_is_refused_before_the_model_runs():
    runs: list[int] = []
    handle = TOY.adapter.model.register_forward_pre_hook(lambda *_: runs.append(1))
    bad: list[tuple[dict[str, Any], type[Exception]]] = [
        ({"source_layers": 3}, SiteError), ({"target_layers": "resid_pots.1"}, SiteError), ({"source_position": "zz"}, TokenError),
        ({"source_position": slice(0, 2)}, TokenError),
        ({"target_position": 9}, TokenError), ({"target_position": [0, 1]}, TokenError), ({"target": []}, TokenError),
        ({"target": ["a", "b", "c"]}, TokenError),
        ({"target": Target("éab", "é")}, TokenError), ({"tokens": ["xy"]}, TokenError), ({"tokens": [""]}, TokenError),
        ({"tokens": [258]}, TokenError), ({"tokens": [-1]}, TokenError),
        ({"k": 0}, TokenError), ({"generate": -1}, TokenError), ({"generate": 99}, TokenError),
        ({"chat": True}, TokenError), ({"map": affine(24, 16)}, EditError),
    ]  # fmt: skip
    for more, error in bad:
        with pytest.raises(error):
            hb.patchscope(TOY.adapter, SOURCES, **{"target": "cd?", **more})
    handle.remove()
    assert runs == []
