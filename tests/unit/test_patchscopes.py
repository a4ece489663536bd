"""Patchscopes against their definition: naive runs with torch's own hooks, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hookbook as hb
from hookbook.errors import TokenError
from hookbook.prompts import Target
from hookbook.sites import Site
from hookbook.testing import ToyAdapter, toy
from tests.support.cases import Case

EXACT = 1e-10
TOY = Case("toy", toy())
WIDE = Case("toy", toy(seed=1, d_model=24))
ALL = TOY.adapter.card.d_vocab
SOURCES = ["The cat sat", "Hi, a rather longer one"]
WORDS = ["resid_pre", "attn_out", "mlp_out", "resid_post"]


def state(case: Case, text: str, position: int, site: Site) -> Tensor:
    """A state of a source prompt."""
    return case.plain(case.adapter.encode(text).ids, (), (site,))[1][site][position]


def edits(value: Tensor, position: int, site: Site) -> tuple:
    return ((site, position, hb.Edit(site, value, "set"), []),)


def spoken(case: Case, text: str, patch: tuple = ()) -> Tensor:
    """Log-probabilities `[d_vocab]` of what follows a target prompt."""
    return case.plain(case.adapter.encode(text).ids, patch)[0][-1].log_softmax(-1)


def decoded(case: Case, text: str, steps: int, patch: tuple = ()) -> str:
    """Greedy decoding that runs the whole sequence again for each token, with the patch in place."""
    ids, out = list(case.adapter.encode(text).ids), []
    for _ in range(steps):
        out.append(int(case.plain(tuple(ids), patch)[0][-1].argmax()))
        if out[-1] in case.adapter.eos_ids:
            out.pop()
            break
        ids.append(out[-1])
    return case.adapter.tokenizer.decode(out)


def everything(ids: Tensor, logprobs: Tensor) -> Tensor:
    """Log-probabilities in the order of the vocabulary, from all of it in the order of likelihood."""
    assert ids.shape[-1] == ALL and bool((logprobs.diff(dim=-1) <= 0).all())
    return torch.full_like(logprobs, float("nan")).scatter(-1, ids, logprobs)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < EXACT)


# the definition


@pytest.mark.parametrize("position", [0, 2, -1, "cat"])
@pytest.mark.parametrize("name", WORDS)
def test_a_state_patched_where_it_came_from_changes_nothing(name, position):
    sites = [Site(name, layer) for layer in range(3)]
    text = "The cat sat"
    out = hb.patchscope(TOY.adapter, text, target=text, source_layers=sites, source_position=position, target_position=position, k=ALL)
    assert out.pairs == tuple((site, site) for site in sites) and out.source_positions == out.target_positions
    control = everything(out.control_ids, out.control_logprobs)
    assert close(everything(out.token_ids, out.logprobs), control[:, None].expand(1, 3, ALL)) and close(control[0], spoken(TOY, text))


def test_every_pair_of_layers_equals_a_naive_loop():
    """Sources of different lengths, positions given as text, a placeholder inside the target, and decoding."""
    sources = ["The cat sat", "A longer one, of a cat"]
    out = hb.patchscope(TOY.adapter, sources, target=Target("ab?cd", "?"), target_layers="all", source_position="cat", k=ALL, generate=4)
    assert len(out.pairs) == 9 and out.token_ids.shape == (2, 9, ALL) and out.source_positions == (7, 22) and out.target_positions == (3,)
    said = everything(out.token_ids, out.logprobs)
    for n, source in enumerate(sources):
        for p, (read, write) in enumerate(out.pairs):
            patch = edits(state(TOY, source, out.source_positions[n], read), 3, write)
            assert close(said[n, p], spoken(TOY, "ab?cd", patch)), (source, read, write)
            assert out.texts[n][p] == decoded(TOY, "ab?cd", 4, patch)


@pytest.mark.parametrize("position", [0, 2, -1, -2, "c", hb.At("on", "first", occurrence=-1), hb.At("on", occurrence=0)])
def test_the_state_of_the_source_position_is_patched(position):
    sources = ["on cat on", "a rather longer one on, or c"]
    out = hb.patchscope(TOY.adapter, sources, target="cd?", source_position=position, k=ALL)
    for n, source in enumerate(sources):
        i = hb.tokens.resolve(position, TOY.adapter.encode(source))[0]
        assert out.source_positions[n] == i
        for p, (read, write) in enumerate(out.pairs):
            assert close(everything(out.token_ids, out.logprobs)[n, p], spoken(TOY, "cd?", edits(state(TOY, source, i, read), 3, write)))


@pytest.mark.parametrize("write", WORDS)
@pytest.mark.parametrize("read", WORDS)
def test_every_kind_of_site_is_read_and_written(read, write):
    out = hb.patchscope(TOY.adapter, SOURCES, target="cd?", source_layers=[f"{read}.1", f"{read}.2"], target_layers=f"{write}.1", k=ALL)
    assert out.pairs == ((Site(read, 1), Site(write, 1)), (Site(read, 2), Site(write, 1)))
    said = everything(out.token_ids, out.logprobs)
    for n, source in enumerate(SOURCES):
        for p, (site, there) in enumerate(out.pairs):
            assert close(said[n, p], spoken(TOY, "cd?", edits(state(TOY, source, -1, site), -1, there)))


def test_a_site_goes_back_to_the_site_it_came_from():
    out = hb.patchscope(TOY.adapter, "ab", target="cd?", source_layers=["mlp_out.1", 0, Site("attn_out", 2)])
    assert [str(read) for read, _ in out.pairs] == [str(write) for _, write in out.pairs] == ["mlp_out.1", "resid_post.0", "attn_out.2"]
    patch = edits(state(TOY, "ab", -1, Site("mlp_out", 1)), -1, Site("mlp_out", 1))
    assert abs(float(out.logprobs[0, 0, 0] - spoken(TOY, "cd?", patch)[out.token_ids[0, 0, 0]])) < EXACT


def test_each_source_can_have_its_own_target():
    targets: list[Any] = [Target("ab?cd", "?"), "x, and something longer"]
    out = hb.patchscope(TOY.adapter, SOURCES, target=targets, target_layers="all", k=ALL, generate=4, tokens=["x", 7])
    assert [target.text for target in out.targets] == ["ab?cd", "x, and something longer"] and out.target_positions == (
        3,
        len(out.targets[1]) - 1,
    )
    assert out.control_texts[0] != out.control_texts[1]
    said, control = everything(out.token_ids, out.logprobs), everything(out.control_ids, out.control_logprobs)
    for n, (source, target) in enumerate(zip(SOURCES, out.targets, strict=True)):
        assert close(control[n], spoken(TOY, target.text)) and out.control_texts[n] == decoded(TOY, target.text, 4)
        for p, (read, write) in enumerate(out.pairs):
            patch = edits(state(TOY, source, -1, read), out.target_positions[n], write)
            assert close(said[n, p], spoken(TOY, target.text, patch)) and out.texts[n][p] == decoded(TOY, target.text, 4, patch)


def test_a_source_says_the_same_whatever_it_is_run_with():
    together = hb.patchscope(TOY.adapter, SOURCES, target="cd?", target_layers="all", k=ALL)
    for n, source in enumerate(SOURCES):
        alone = hb.patchscope(TOY.adapter, source, target="cd?", target_layers="all", k=ALL)
        assert close(everything(together.token_ids, together.logprobs)[n], everything(alone.token_ids, alone.logprobs)[0])


def test_the_control_is_the_target_unpatched():
    out = hb.patchscope(TOY.adapter, SOURCES, target="cd?", k=ALL, generate=3, tokens=["x"])
    control = everything(out.control_ids, out.control_logprobs)
    for n in range(2):
        assert close(control[n], spoken(TOY, "cd?")) and out.control_texts[n] == decoded(TOY, "cd?", 3)
        assert torch.equal(out.control_wanted_logprobs[n, 0], control[n, TOY.adapter.tokenizer.convert_tokens_to_ids("x")])


def test_the_placeholder_the_position_or_the_last_token_is_patched():
    asked: list[tuple[Any, Any, int]] = [
        (Target("a?b", "?"), None, 2), (Target("?a?b", "?"), None, 3), (Target("a?b", "?"), 0, 0), ("a?b", None, 3),
        ("a?b", "?", 2), ("a?b", hb.At("a?", "first"), 1), ("a?b", -2, 2),
    ]  # fmt: skip
    for target, position, want in asked:
        out = hb.patchscope(TOY.adapter, "hi", target=target, target_position=position, source_layers=1, k=1)
        assert out.target_positions == (want,)
        patch = edits(state(TOY, "hi", -1, Site("resid_post", 1)), want, Site("resid_post", 1))
        assert abs(float(out.logprobs[0, 0, 0] - spoken(TOY, "a?b" if "?a" not in out.targets[0].text else "?a?b", patch).max())) < EXACT


def test_the_patch_of_an_early_token_reaches_the_last_one_only_through_the_blocks_above():
    out = hb.patchscope(TOY.adapter, "hi", target=Target("?abc", "?"), target_layers="all", k=ALL)
    said, control = everything(out.token_ids, out.logprobs)[0], everything(out.control_ids, out.control_logprobs)[0]
    for p, (_, write) in enumerate(out.pairs):
        assert close(said[p], control) == (write.layer == 2)


@pytest.mark.parametrize("position", [3, -1, -2, "?", hb.At("cd", "first")])
def test_what_is_said_can_be_read_after_any_token_the_patch_reaches(position):
    target = Target("ab?cd", "?")
    out = hb.patchscope(TOY.adapter, SOURCES, target=target, target_layers="all", readout_position=position, k=ALL, generate=2)
    plain = hb.patchscope(TOY.adapter, SOURCES, target=target, target_layers="all", generate=2)
    assert (out.texts, out.control_texts) == (plain.texts, plain.control_texts)  # which follow the whole target
    said, control, ids = everything(out.token_ids, out.logprobs), everything(out.control_ids, out.control_logprobs), out.targets[0].ids
    (i,) = hb.tokens.resolve(position, out.targets[0])
    for n, source in enumerate(SOURCES):
        assert close(control[n], TOY.plain(ids)[0][i].log_softmax(-1))
        for p, (read, write) in enumerate(out.pairs):
            want = TOY.plain(ids, edits(state(TOY, source, -1, read), 3, write))[0][i].log_softmax(-1)
            assert close(said[n, p], want)


@pytest.mark.parametrize("position", [0, 2, -4, hb.At("ab", "last")])
def test_a_token_before_the_patch_says_nothing_about_it(position):
    with pytest.raises(TokenError, match="a patch of token 3 cannot reach token"):
        hb.patchscope(TOY.adapter, SOURCES, target=Target("ab?cd", "?"), readout_position=position)


# the logit lens


def test_the_last_target_layer_is_the_logit_lens():
    lens = hb.logit_lens(TOY.adapter, SOURCES, k=ALL)
    want = everything(lens.token_ids, lens.logprobs)
    for target in (SOURCES, "cd?", "another, longer target"):
        out = hb.patchscope(TOY.adapter, SOURCES, target=target, target_layers=-1, k=ALL)
        assert (
            close(everything(out.token_ids, out.logprobs), want)
            and torch.equal(out.precision, lens.precision)
            and close(out.surprisal, lens.surprisal)
        )


@pytest.mark.parametrize("position", [-1, 0, 2, "cat", hb.At("c", "first")])
def test_the_logit_lens_is_the_unembedded_state(position):
    lens: Any = hb.logit_lens(TOY.adapter, "The cat sat", position=position, k=ALL)
    (i,) = hb.tokens.resolve(position, lens.prompts[0])
    said = everything(lens.token_ids, lens.logprobs)[0]
    for p, read in enumerate(lens.sites):
        assert close(said[p], TOY.adapter.unembed(TOY.adapter.final_norm(state(TOY, "The cat sat", i, read))).detach().log_softmax(-1)), (
            read
        )
    own = TOY.adapter.plain_logits(torch.tensor([lens.prompts[0].ids]))[0, i].log_softmax(-1)
    assert close(said[-1], own) and bool(lens.precision[0, -1]) and int(lens.own_ids[0]) == int(own.argmax())


def test_at_the_last_layers_the_source_says_its_own_next_token():
    out: Any = hb.patchscope(TOY.adapter, SOURCES, target="cd?", source_layers=-1, target_layers=-1, k=ALL)
    for n, source in enumerate(SOURCES):
        assert close(everything(out.token_ids, out.logprobs)[n, 0], spoken(TOY, source))
    assert bool(out.precision.all())
    assert close(out.surprisal[:, 0], -out.logprobs[:, 0, 0])


# the numbers


def test_precision_and_surprisal_are_of_the_plain_source_run():
    out: Any = hb.patchscope(TOY.adapter, SOURCES, target="cd?", target_layers="all", source_position=hb.At("a", occurrence=0))
    assert out.precision.shape == out.surprisal.shape == (2, 9)
    for n, source in enumerate(out.sources):
        own = TOY.plain(source.ids)[0][out.source_positions[n]].log_softmax(-1)
        assert int(out.source_ids[n]) == int(own.argmax())
        for p in range(9):
            top = int(out.token_ids[n, p, 0])
            assert bool(out.precision[n, p]) == (top == int(own.argmax()))
            assert abs(float(out.surprisal[n, p] + own[top])) < EXACT
    assert bool(out.precision.any()) and not bool(out.precision.all())


def test_a_wanted_tokens_logprob_is_its_entry_of_the_log_softmax():
    words = ["x", " ", 7, 0]
    out = hb.patchscope(TOY.adapter, SOURCES, target="cd?", target_layers="all", k=ALL, tokens=words)
    convert = TOY.adapter.tokenizer.convert_tokens_to_ids
    ids = [convert("x"), convert("Ġ"), 7, 0]
    assert out.wanted == ("x", " ", TOY.adapter.tokenizer.decode([7]), "<s>") and out.wanted_logprobs.shape == (2, 9, 4)
    assert torch.equal(out.wanted_logprobs, everything(out.token_ids, out.logprobs)[..., ids])
    assert torch.equal(out.control_wanted_logprobs, everything(out.control_ids, out.control_logprobs)[..., ids])


def test_logprobs_are_those_of_a_distribution_likeliest_first():
    out = hb.patchscope(TOY.adapter, SOURCES, target="cd?", target_layers="all", k=ALL)
    assert close(out.logprobs.exp().sum(-1), torch.ones(2, 9, dtype=torch.float64))
    few = hb.patchscope(TOY.adapter, SOURCES, target="cd?", target_layers="all", k=3)
    assert torch.equal(few.token_ids, out.token_ids[..., :3]) and torch.equal(few.logprobs, out.logprobs[..., :3])


def test_without_generation_there_are_no_texts():
    out = hb.patchscope(TOY.adapter, SOURCES, target="cd?", k=2)
    assert out.texts == () and out.control_texts == () and out.wanted == () and out.wanted_logprobs.shape == (2, 3, 0)


def test_generation_stops_at_the_end_token(monkeypatch):
    plain = hb.patchscope(TOY.adapter, "hi", target="cd?", generate=4, source_layers=1)
    first = int(plain.control_ids[0, 0])
    monkeypatch.setattr(ToyAdapter, "eos_ids", frozenset({first}))
    assert hb.patchscope(TOY.adapter, "hi", target="cd?", generate=4, source_layers=1).control_texts == ("",)
