"""Drawn tokens: repeatable, whatever the climbs, and from the distribution the model has."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import hookbook as hb
from hookbook.request import Request, Row
from hookbook.testing import toy
from tests.support.cases import Case
from tests.support.formulas import flat

TOY = toy()
STEPS = 6
TEXTS = ("The cat sat on the mat.", "Hi", "abc abc")


def forks(adapter: hb.Adapter, n: int = 12) -> tuple[list[hb.tokens.Tokens], list[Row]]:
    """Ragged prompts under edits of the prompt and of generated tokens."""
    prompts, rows = [adapter.encode(text) for text in TEXTS], []
    for i in range(n):
        vector = 2 * torch.randn(adapter.card.d_model, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        rows.append(Row(i % 3, (hb.Edit(hb.Site("resid_post", i % 2), vector, scope=("prompt", "all", "generated")[i // 3 % 3]),)))
    return prompts, rows


def drawn(
    adapter: hb.Adapter, sampling: hb.Sampling | None, *, rows: list[Row] | None = None, steps: int = STEPS
) -> tuple[tuple[int, ...], ...]:
    prompts, usual = forks(adapter)
    return adapter.run(Request(prompts, usual if rows is None else rows, generate=steps, sampling=sampling)).generated


@pytest.fixture
def endless(monkeypatch):
    """The toy, of which no token ends a row. Drawing is the same code for all adapters; that they give it the same logits is tested on
    each."""
    monkeypatch.setattr(type(TOY), "eos_ids", frozenset())
    return TOY


def test_a_seed_gives_the_same_tokens_and_another_seed_others(endless):
    once, again, other = (drawn(endless, hb.Sampling(seed)) for seed in (3, 3, 4))
    assert once == again and all(len(out) == STEPS for out in once)
    assert sum(a != b for a, b in zip(once, other, strict=True)) >= 10 and len(set(once)) == len(once)


def test_drawing_leaves_the_global_generator_alone(endless):
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    drawn(endless, hb.Sampling(3), steps=2)
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("sampling", [hb.Sampling(5), hb.Sampling(5, temperature=0.6, top_k=20, top_p=0.9)], ids=str)
def test_the_budget_does_not_change_what_is_drawn(endless, monkeypatch, sampling):
    whole = drawn(endless, sampling)
    monkeypatch.setattr("hookbook.engine.planning.BUDGET_BYTES", 1)
    monkeypatch.setattr("hookbook.engine.planning.LOGITS_BYTES", 1)
    assert drawn(endless, sampling) == whole


def test_what_a_row_draws_does_not_depend_on_other_rows(endless):
    _, rows = forks(endless)
    whole = drawn(endless, hb.Sampling(5))
    others = [row if i == 7 else Row(2) for i, row in enumerate(rows)]
    assert drawn(endless, hb.Sampling(5), rows=others)[7] == whole[7]
    assert drawn(endless, hb.Sampling(5), rows=rows[:8])[7] == whole[7]


def test_equal_rows_draw_their_own_tokens(endless):
    assert len(set(drawn(endless, hb.Sampling(5), rows=[Row(0)] * 12))) == 12


def test_decoding_longer_begins_with_the_same_tokens(endless):
    long, short = (drawn(endless, hb.Sampling(5), steps=steps) for steps in (STEPS, 3))
    assert tuple(out[:3] for out in long) == short


@pytest.mark.parametrize(
    "sampling",
    [
        hb.Sampling(1, temperature=1e-4),
        hb.Sampling(1, temperature=1e-300),
        hb.Sampling(1, temperature=1e-320),
        hb.Sampling(1, top_k=1),
        hb.Sampling(1, top_p=1e-9),
        hb.Sampling(1, 5.0, top_k=1, top_p=0.5),
    ],
    ids=str,
)
def test_the_cold_limits_are_greedy(endless, sampling):
    assert drawn(endless, sampling) == drawn(endless, None) != drawn(endless, hb.Sampling(1))


def test_a_drawn_row_stops_at_its_own_end_token(endless, monkeypatch):
    whole = drawn(endless, hb.Sampling(2))
    ends = frozenset({whole[0][2], whole[5][4]})
    monkeypatch.setattr(type(endless), "eos_ids", ends)
    for out, ended in zip(whole, drawn(endless, hb.Sampling(2)), strict=True):
        assert ended == out[: next((i for i, token in enumerate(out) if token in ends), STEPS)]


@pytest.mark.parametrize("sampling", [None, hb.Sampling(2), hb.Sampling(2, temperature=0.3, top_k=9, top_p=0.8)], ids=str)
def test_a_tokens_logprob_is_the_models_own_whatever_the_sampling(case, monkeypatch, sampling):
    monkeypatch.setattr(type(case.adapter), "eos_ids", frozenset())
    prompts, rows = forks(case.adapter)
    reply = case.adapter.run(Request(prompts, rows, generate=STEPS, sampling=sampling))
    for row, out, logprobs in zip(rows, reply.generated, reply.logprobs, strict=True):
        ids = prompts[row.prompt].ids + out
        plain, _ = case.plain(ids, flat(row.edits, prompts[row.prompt], len(ids)))
        said = plain.log_softmax(-1)[len(ids) - STEPS - 1 : -1]
        assert (torch.tensor(logprobs, dtype=torch.float64) - said.gather(-1, torch.tensor(out)[:, None])[:, 0]).abs().max() < 1e-10


def expected(logits: torch.Tensor, sampling: hb.Sampling) -> torch.Tensor:
    """What is drawn from, written from the definition: the likeliest `top_k`, of these the fewest that reach `top_p`, renormalised."""
    p = (logits / sampling.temperature).softmax(-1)
    order = sorted(range(len(p)), key=lambda i: -float(p[i]))[: sampling.top_k or len(p)]
    p_k = {i: float(p[i]) for i in order}
    whole = sum(p_k.values())
    allowed, reached = [], 0.0
    for i in order:
        if reached >= sampling.top_p:
            break
        allowed.append(i)
        reached += p_k[i] / whole
    out = torch.zeros_like(p)
    out[allowed] = p[allowed]
    return out / out.sum()


def check(counts: Counter, p: torch.Tensor) -> None:
    """Each token as often as it should be, within five standard deviations; those that may not be drawn, never."""
    n = sum(counts.values())
    seen = torch.tensor([float(counts[i]) for i in range(len(p))], dtype=torch.float64)
    assert seen[p == 0].sum() == 0
    if bool((p < 1).all()):
        assert ((seen - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1).all()


@pytest.mark.parametrize(
    "sampling",
    [
        hb.Sampling(0),
        hb.Sampling(1, temperature=0.5),
        hb.Sampling(2, temperature=2.5),
        hb.Sampling(3, top_k=5),
        hb.Sampling(4, top_p=0.7),
        hb.Sampling(5, temperature=0.8, top_k=4, top_p=0.6),
        hb.Sampling(6, top_k=10_000),
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_softmax(sampling, monkeypatch):
    """Thousands of rows of one prompt, plain and edited: their first token, and their second given the first."""
    adapter, n = toy(d_vocab=12), 4000
    monkeypatch.setattr(type(adapter), "eos_ids", frozenset())
    case, tokens = Case("toy", adapter), adapter.encode([0, 5, 7])
    edited = (hb.Edit("final_norm", torch.linspace(-2, 2, 16, dtype=torch.float64), scope="all"),)
    said = adapter.run(Request([tokens], [Row(0)] * n + [Row(0, edited)] * n, generate=2, sampling=sampling)).generated
    checked = 0
    for edits, rows in (((), said[:n]), (edited, said[n:])):
        plain = expected(case.plain(tokens.ids, flat(edits, tokens))[0][-1], sampling)
        firsts = Counter(out[0] for out in rows)
        check(firsts, plain)
        for first, count in firsts.items():
            if count > 200:
                ids = (*tokens.ids, first)
                check(
                    Counter(out[1] for out in rows if out[0] == first),
                    expected(case.plain(ids, flat(edits, tokens, len(ids)))[0][-1], sampling),
                )
                checked += 1
    assert checked >= 4
