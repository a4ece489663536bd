"""The logit lens on every adapter, against the definition: plain states, the model's own final norm and unembedding, all logits."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import hookbook as hb
from hookbook.engine import planning
from hookbook.errors import DataError, HookbookError, SiteError, TokenError
from hookbook.reply import LensReadout
from hookbook.testing import toy
from hookbook.tokens import beginnings, resolve
from hookbook.travel import readout
from tests.support.cases import Case

PROMPTS = ["The cat sat", "Hi, a rather longer one", "The cat sat", "no"]
WORDS = ["x", 7]
EXACT = 1e-10


def logprobs(case: Case, state: Tensor) -> Tensor:
    """`[d_vocab]` of one state."""
    with torch.no_grad():
        return case.adapter.unembed(case.adapter.final_norm(state[None]))[0].log_softmax(-1)


def check(case: Case, lens: hb.LogitLens, position: object) -> None:
    """Everything in a lens is what its definition gives, one state after the other."""
    adapter, k = case.adapter, lens.token_ids.shape[-1]
    rows = tuple((n, at) for n, prompt in enumerate(lens.prompts) for at in resolve(position, prompt))  # type: ignore[arg-type]
    assert lens.rows == rows
    plain = {}
    for n, (prompt, at) in enumerate(lens.rows):
        ids = lens.prompts[prompt].ids
        if ids not in plain:
            plain[ids] = case.plain(ids, (), lens.sites)
        logits, states = plain[ids]
        own = logits[at].log_softmax(-1)
        assert int(lens.own_ids[n]) == int(own.argmax()) and lens.own_tokens[n] == adapter.tokenizer.decode([int(own.argmax())])
        for s, site in enumerate(lens.sites):
            want = logprobs(case, states[site][at])
            top = want.topk(k)
            assert torch.equal(lens.token_ids[n, s], top.indices) and (lens.logprobs[n, s] - top.values).abs().max() < EXACT
            assert (lens.own_logprobs[n, s] - own[top.indices]).abs().max() < EXACT
            assert abs(float(lens.entropy[n, s] + (want.exp() * want).sum())) < EXACT
            assert abs(float(lens.kl[n, s] - torch.nn.functional.kl_div(want, own, log_target=True, reduction="sum"))) < EXACT
            assert (
                bool(lens.precision[n, s]) == (int(top.indices[0]) == int(own.argmax()))
                and abs(float(lens.surprisal[n, s] + own[top.indices[0]])) < EXACT
            )
            order = want.argsort(descending=True).tolist()
            for m, word in enumerate(lens.wanted):
                (i,) = adapter.tokenizer(word, add_special_tokens=False).input_ids
                assert abs(float(lens.wanted_logprobs[n, s, m] - want[i])) < EXACT and int(lens.wanted_ranks[n, s, m]) == order.index(i)
            for m in range(len(lens.languages)):
                chosen = [i for i in lens.language_ids[n, m].tolist() if i >= 0]
                assert abs(float(lens.language_logprobs[n, s, m].exp() - want[chosen].exp().sum())) < EXACT


@pytest.mark.parametrize("position", [-1, slice(None), [-1, 0]], ids=str)
def test_the_lens_is_what_its_definition_gives(case, position):
    sites = ["embed", 0, "resid_pre.1", "mlp_out.1", "attn_out.2", -1, 1]
    sites = [site for site in hb.sites.layers_to_sites(sites, case.adapter.card) if case.adapter.refuses(site) is None]
    lens = hb.logit_lens(
        case.adapter, PROMPTS, layers=sites, position=position, k=4, tokens=WORDS, languages={"a": ["cat", "dog"], "b": "maus"}
    )
    assert lens.sites == tuple(sites) and len(sites) >= 5
    check(case, lens, position)


def test_at_the_end_of_the_stream_the_lens_is_the_model(case):
    lens = hb.logit_lens(case.adapter, PROMPTS, position=slice(None), k=3)
    assert [site.layer for site in lens.sites] == list(range(case.adapter.card.n_layers))
    own = {prompt.ids: case.plain(prompt.ids)[0].log_softmax(-1) for prompt in lens.prompts}
    for n, (prompt, at) in enumerate(lens.rows):
        top = own[lens.prompts[prompt].ids][at].topk(3)
        assert torch.equal(lens.token_ids[n, -1], top.indices) and (lens.logprobs[n, -1] - top.values).abs().max() < EXACT
    assert bool((lens.kl[:, -1] == 0).all()) and bool(lens.precision[:, -1].all()) and bool((lens.kl[:, :-1] > 1e-3).all())
    without = hb.logit_lens(case.adapter, PROMPTS, layers=[0], position=slice(None), k=3)  # whose end is not among the layers
    for name in ("token_ids", "logprobs", "own_logprobs", "kl", "entropy"):
        assert (getattr(without, name)[:, 0].double() - getattr(lens, name)[:, 0].double()).abs().max() < EXACT


def test_it_is_the_patchscope_into_the_prompt_itself(case):
    lens = hb.logit_lens(case.adapter, PROMPTS, tokens=[7], k=4)
    scope = hb.patchscope(case.adapter, PROMPTS, target=PROMPTS, target_layers=-1, tokens=[7], k=4)
    assert torch.equal(lens.token_ids, scope.token_ids) and torch.equal(lens.precision, scope.precision)  # type: ignore[arg-type]
    for ours, theirs in ((lens.logprobs, scope.logprobs), (lens.wanted_logprobs, scope.wanted_logprobs), (lens.surprisal, scope.surprisal)):
        assert theirs is not None and (ours - theirs).abs().max() < EXACT
    assert (lens.own_ids == scope.source_ids).all() and lens.own_tokens == scope.source_tokens


def test_a_prompt_given_twice_is_run_once(case):
    twice = hb.logit_lens(case.adapter, ["ab", "ab", "abc"]).settings["cost"]
    once = hb.logit_lens(case.adapter, ["ab", "abc"]).settings["cost"]
    assert twice["token_layers"] == once["token_layers"] > 0 and twice["unembedded"] == 3 * case.adapter.card.n_layers


@pytest.mark.parametrize("held", [1, 2, 5, 7, 1000])
def test_a_few_rows_of_logits_at_a_time_give_the_same(monkeypatch, held):
    """However many fit: less than the layers of one token, or several tokens."""
    adapter, most = toy(), []
    sites = [0, "mlp_out.1", 1, "attn_out.0", 2]
    ask = {"layers": sites, "position": slice(None), "tokens": ["x"], "languages": {"a": "dog", "b": "cat"}}
    whole = hb.logit_lens(adapter, PROMPTS, **ask)
    unembed = adapter.unembed
    monkeypatch.setattr(planning, "LOGITS_BYTES", held * 4 * adapter.card.d_vocab)
    monkeypatch.setattr(adapter, "unembed", lambda normed, words=None: most.append(len(normed)) or unembed(normed))
    parts = hb.logit_lens(adapter, PROMPTS, **ask)
    assert max(most) <= held and (held > 900 or len(most) > len(parts.rows) * len(sites) // (held + 1))
    for name in ("logprobs", "own_logprobs", "entropy", "kl", "wanted_logprobs", "language_logprobs"):
        assert (getattr(whole, name) - getattr(parts, name)).abs().max() < EXACT, name
    assert (
        torch.equal(whole.token_ids, parts.token_ids)
        and torch.equal(whole.wanted_ranks, parts.wanted_ranks)
        and whole.own_tokens == parts.own_tokens
    )


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_entropy_and_divergence_of_known_distributions(rows):
    """Of a head whose logits are the state: uniform, certain, and halves."""
    head, far = SimpleNamespace(final_norm=lambda x: x, unembed=lambda x: x), -1e4
    uniform, certain = torch.zeros(16, dtype=torch.float64), torch.full((16,), far, dtype=torch.float64)
    certain[3] = 0
    halves = torch.full((16,), far, dtype=torch.float64)
    halves[:8] = 0
    states = torch.stack([uniform, certain, halves])[None].expand(2, -1, -1)
    said = LensReadout(*readout.lens(head, states, rows, 1, torch.tensor([[3, 0, 9], [9, 3, 3]]), 1))
    assert said.entropy[0].tolist() == pytest.approx([math.log(16), 0, math.log(8)])
    assert said.kl[0].tolist() == pytest.approx([math.log(2), far * -7 / 8 - math.log(8), 0])
    assert said.token_ranks[..., 0].tolist() == [[0, 0, 0], [0, 1, 8]] and said.token_logprobs.shape == (2, 3, 3)


def test_a_plan_counts_what_a_call_does(case):
    ask = {"position": slice(None), "tokens": [7], "languages": {"a": "dog", "b": "cat"}, "layers": [0, "resid_pre.1"]}
    plan, cost = hb.logit_lens.plan(case.adapter, PROMPTS, **ask), hb.logit_lens(case.adapter, PROMPTS, **ask).settings["cost"]
    assert (plan.passes, plan.token_layers, plan.unembedded) == (cost["passes"], cost["token_layers"], cost["unembedded"])
    assert plan.unembedded == 3 * sum(len(case.adapter.encode(prompt)) for prompt in PROMPTS)


BAD: dict[str, tuple[dict, type[HookbookError], str]] = {
    "no tokens kept": ({"k": 0}, TokenError, "k of 1 or more"),
    "tokens as a text": ({"tokens": "x"}, TokenError, r"write tokens=\['x'\]"),
    "a token of two": ({"tokens": ["xy"]}, TokenError, "is 2 tokens"),
    "a token outside": ({"tokens": [999]}, TokenError, "ids 0 to 257"),
    "a position outside": ({"position": 9}, TokenError, "has 3 tokens"),
    "a position outside of one prompt": ({"prompts": ["abcd", "a"], "position": [0, 3]}, TokenError, "has 2 tokens"),
    "an empty span": ({"position": slice(2, 2)}, TokenError, "is empty"),
    "text that is not there": ({"position": "zz"}, TokenError, "not in the prompt"),
    "a layer that is not there": ({"layers": [0, 3]}, SiteError, "layers 0 to 2"),
    "no layers": ({"layers": []}, SiteError, "list of layers"),
    "the output of the final norm": ({"layers": "final_norm"}, SiteError, "before the final norm"),
    "heads": ({"layers": "head_z.1"}, SiteError, "use one of embed, resid_pre, attn_out, mlp_out, resid_post"),
    "no prompts": ({"prompts": []}, TokenError, "at least one"),
    "languages that share a token": (
        {"languages": {"English": "cat", "French": ["chat"]}},
        DataError,
        "'c' begins words in English and in French",
    ),
    "a language without words": ({"languages": {"English": []}}, DataError, "no words in English"),
    "an empty word": ({"languages": {"English": " "}}, TokenError, "' ' is not a word"),
    "a word that is none": ({"languages": {"English": [3]}}, TokenError, "3 is not a word"),
    "words of too few prompts": ({"prompts": ["a", "b"], "languages": [{"English": "cat"}]}, DataError, "1 of 2 prompts"),
    "words in other languages": (
        {"prompts": ["a", "b"], "languages": [{"English": "cat"}, {"French": "chat"}]},
        DataError,
        "the same languages",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_runs(monkeypatch, name):
    more, error, match = BAD[name]
    adapter = toy()
    monkeypatch.setattr(adapter, "forward", None)
    for call in (hb.logit_lens, hb.logit_lens.plan):
        with pytest.raises(error, match=match):
            call(adapter, more.get("prompts", "ab"), **{key: value for key, value in more.items() if key != "prompts"})


def test_words_begin_with_their_bytes():
    """Of single bytes: those of the first character, each alone; of words in letters the first letter."""
    tokenizer = toy().tokenizer
    (c,), (e5, *_) = tokenizer("c", add_special_tokens=False).input_ids, tokenizer("家", add_special_tokens=False).input_ids
    assert beginnings("cat", tokenizer) == (c,) == beginnings(" cat", tokenizer) and beginnings("家a", tokenizer) == (e5,)
    lens = hb.logit_lens(toy(), ["ab", "c"], languages=[{"a": ["dog", "cat"], "b": "家"}, {"b": "pain", "a": "ours"}])
    assert lens.languages == ("a", "b") and lens.language_ids.shape == (2, 2, 2)
    assert sorted(lens.language_ids[0, 0].tolist()) == sorted(tokenizer("dc", add_special_tokens=False).input_ids)
    assert lens.language_ids[0, 1].tolist() == [e5, -1] and [lens.vocab[i] for i in lens.language_ids[1, :, 0].tolist()] == ["o", "p"]


def test_what_a_tokenizer_gives_is_read_as_its_texts(case):
    """A padded batch with its mask, on either side; and of TransformerLens `to_tokens`, one row `[1, n]`."""
    adapter, texts = case.adapter, ["The cat sat", "no"]
    tokenizer, want = copy.deepcopy(adapter.tokenizer), hb.logit_lens(adapter, texts)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for side in ("left", "right"):
        found = hb.logit_lens(adapter, tokenizer(texts, padding=True, padding_side=side, return_tensors="pt"))
        assert [prompt.ids for prompt in found.prompts] == [prompt.ids for prompt in want.prompts]
        assert torch.equal(found.token_ids, want.token_ids) and (found.logprobs - want.logprobs).abs().max() < EXACT
    if case.name.startswith(("bridge", "hooked")):
        row = adapter.model.to_tokens(texts[0])
        assert row.dim() == 2 and hb.logit_lens(adapter, row).prompts[0].ids == tuple(row[0].tolist())
