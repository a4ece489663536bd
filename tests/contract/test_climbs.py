"""How requests are cut and laid out: what is shared, what it costs, and that rows come back as they were asked for."""

from __future__ import annotations

import random

import pytest
import torch

import hookbook as hb
from hookbook.engine import planning, runs, selfcheck
from hookbook.engine.checkpoint import fingerprint
from hookbook.engine.checks import check
from hookbook.engine.cost import total
from hookbook.request import Each, Read, Readout, Request, Row
from hookbook.testing import toy
from tests.contract.test_forks import direction, random_edits
from tests.support.cases import assert_plain

TEXT = "The cat sat on the mat."
CAUSES = (
    "embed",
    "resid_pre.1",
    "attn_pattern.1",
    "head_z.1",
    "attn_out.1",
    "mlp_in.1",
    "mlp_act.1.3",
    "mlp_out.1",
    "resid_post.1",
    "final_norm",
)


def edit_at(adapter: hb.Adapter, site: hb.Site | str, seed: int = 0, position: hb.tokens.Position = -1) -> hb.Edit:
    site = hb.Site.parse(site)
    if site.name == "attn_pattern":
        return hb.Edit(site, op="knock_out", position=position, keys=0)
    return hb.Edit(site, 3 * direction(seed, site.width(adapter.card)), "set", position)


@pytest.mark.parametrize("site", CAUSES)
def test_one_edited_row_costs_what_a_plain_run_costs(case, site):
    """No clean trunk is kept beside it, wherever the edit is."""
    adapter = case.adapter
    tokens = adapter.encode(TEXT)
    request = Request([tokens], [Row(0, (edit_at(adapter, site),))], [Read("resid_post.1")], Readout(logits=True))
    reply = adapter.run(request)
    assert reply.cost == total({"climbs": 1, "passes": 1, "token_layers": len(tokens) * adapter.card.n_layers, "unembedded": 1})
    assert_plain(case, request, reply)


def test_the_last_fork_goes_on_in_place_of_a_trunk_nobody_reads(case):
    """Two rows of one prompt are two rows above where the first leaves; with a clean row beside them, three."""
    adapter = case.adapter
    tokens, n_layers = adapter.encode(TEXT), adapter.card.n_layers
    n = len(tokens)
    rows = [Row(0, (edit_at(adapter, "resid_post.1", 1, 0),)), Row(0, (edit_at(adapter, "attn_out.1", 2, 0),))]
    for more, layers in (((), n_layers + (n_layers - 1)), ((Row(0),), n_layers + (n_layers - 1) + (n_layers - 2))):
        request = Request(
            [tokens], [*rows, *more], [Read("resid_post.0", 0), Read("attn_out.1", 0), Read("mlp_out.1", -1)], Readout(logits=True)
        )
        reply = adapter.run(request)
        assert reply.cost["token_layers"] == n * layers
        assert_plain(case, request, reply)


def test_prompts_of_one_length_share_a_climb(case):
    adapter = case.adapter
    prompts = [adapter.encode(f"The {animal} sat on the mat.") for animal in ("cat", "dog", "cow", "pig", "emu", "yak")]
    rows = [Row(i % 6, (edit_at(adapter, f"resid_post.{i % 2}", i),)) for i in range(18)] + [Row(4)]
    request = Request(prompts, rows, [Read("mlp_out.1", slice(-2, None))], Readout(k=3, logits=True))
    reply = adapter.run(request)
    assert reply.cost["climbs"] == 1
    assert_plain(case, request, reply)


@pytest.mark.parametrize("generate", [0, 5])
def test_prompts_of_very_different_lengths_take_few_climbs_and_come_back_in_order(case, generate):
    """A climb for the short ones and one for the long ones: forty tokens of padding in every row would cost more."""
    adapter, pick = case.adapter, random.Random(3)
    prompts = [adapter.encode(("abc" if i % 2 else "a prompt much longer than the others are, of") + "ghijkl"[i % 6]) for i in range(12)]
    prompts.append(adapter.encode("a prompt of a length between, which nobody runs"))
    rows = [Row(i, random_edits(pick, adapter, len(prompts[i])) if i % 3 else ()) for i in range(12) for _ in range(2)]
    pick.shuffle(rows)
    wanted = torch.arange(len(rows))[:, None] + torch.tensor([[0, 100]])
    ends = Each(tuple(pick.choice([-1, 0, 2]) for _ in rows))
    reads = [Read("resid_post.1", ends), Read("attn_pattern.1", slice(None)), Read("head_z.0.1", slice(0, 3)), Read("final_norm", -2)]
    request = Request(prompts, rows, reads, Readout(k=2, tokens=wanted, logits=True), generate=generate)
    reply = adapter.run(request)
    assert reply.cost["climbs"] == 2
    assert_plain(case, request, reply)


def test_a_span_that_is_not_ascending_comes_back_in_one_order_whatever_the_plan(monkeypatch):
    adapter = toy()
    request = Request(
        [adapter.encode("abcdef")],
        [Row(0), Row(0, (edit_at(adapter, "resid_post.0"),))],
        [Read("resid_pre.1", [6, 1])],
        Readout(logits=True),
    )
    (whole,) = adapter.run(request).readings
    monkeypatch.setattr("hookbook.engine.planning.PASS_TOKENS", 0)
    (split,) = adapter.run(request).readings
    assert torch.equal(split.positions, whole.positions) and (split.values - whole.values).abs().max() < 1e-10


def test_a_prefix_is_run_by_itself_only_where_that_saves_more_than_a_pass(case, monkeypatch):
    adapter = case.adapter
    tokens, n_layers = adapter.encode(TEXT), adapter.card.n_layers
    saved = len(tokens) - 1  # by each row beside the first, in every layer it is in
    few = 1 + planning.PASS_TOKENS // saved
    for rows, passes in ((few, 1), (few + 1, 2)):
        request = Request([tokens], [Row(0, (edit_at(adapter, "embed", i),)) for i in range(rows)], (), Readout(logits=True))
        assert adapter.run(request).cost["passes"] == 1  # what is edited at the embedding shares no blocks, nor a prefix
        request = Request([tokens], [Row(0, (edit_at(adapter, "resid_pre.0", i),)) for i in range(rows)], (), Readout(logits=True))
        reply = adapter.run(request)
        assert reply.cost["passes"] == passes
        assert reply.cost["token_layers"] == n_layers * (rows * len(tokens) if passes == 1 else saved + rows)
        assert_plain(case, request, reply)


def test_ragged_prompts_are_packed_each_into_its_own_rows(case):
    adapter = case.adapter
    prompts = [adapter.encode(text) for text in (TEXT, "A cat, or a hat", "The dog sat on it")]
    rows = [Row(i % 3, (edit_at(adapter, CAUSES[1 + i % 8].replace("attn_pattern", "attn_out"), i),)) for i in range(48)] + [Row(1), Row(2)]
    request = Request(prompts, rows, [Read("resid_post.1"), Read("mlp_act.1.3"), Read("resid_pre.1", 0)], Readout(logits=True))
    packs = adapter.packs and selfcheck.packs(adapter)
    assert packs == (adapter.packs and "gpt2" not in case.name)
    (part,) = planning.plan(adapter, request)
    assert (part.pack > 1) == packs
    assert_plain(case, request, adapter.run(request))


def test_forks_of_a_prefix_decode_past_a_window(case, monkeypatch):
    """The prefix is longer than the window of four of the Gemma of these tests; keys and values are kept of all of it."""
    adapter, pick = case.adapter, random.Random(5)
    monkeypatch.setattr("hookbook.engine.planning.PASS_TOKENS", 0)
    monkeypatch.setattr(type(adapter), "eos_ids", frozenset())
    prompts = [adapter.encode(TEXT), adapter.encode("A hat, on a mat.")]
    n = [len(tokens) for tokens in prompts]
    rows = [Row(0), Row(1)]
    for i in range(16):
        late = hb.Edit(
            pick.choice(["resid_post.0", "mlp_out.1", "embed"]),
            2 * direction(i, adapter.card.d_model),
            scope=pick.choice(["generated", (n[i % 2] + 4,)]),
        )
        rows.append(Row(i % 2, (edit_at(adapter, pick.choice(CAUSES[1:-1]), i), *([late] if i % 4 == 0 else []))))
    request = Request(prompts, rows, [Read("attn_pattern.1", slice(None))], Readout(logits=True), generate=16)
    reply = adapter.run(request)
    (part,) = planning.plan(adapter, request)
    assert part.split == n[0] - 1 > 4 and all(len(out) == 16 for out in reply.generated)
    assert_plain(case, request, reply)


def test_rows_that_said_the_same_decode_as_one_until_they_differ(case, monkeypatch):
    """Three clean rows are one; an edit of generated tokens leaves it where it is first edited."""
    adapter, n_layers = case.adapter, case.adapter.card.n_layers
    monkeypatch.setattr(type(adapter), "eos_ids", frozenset())
    tokens = adapter.encode(TEXT)
    late = hb.Edit(hb.Site("resid_post", n_layers - 2), 5 * direction(1, adapter.card.d_model), "set", scope="generated")
    for rows, layers in (
        ([Row(0)] * 3, n_layers),
        ([Row(0)] * 3 + [Row(0, (late,))] * 2, n_layers + 2),
        ([Row(0, (late,))] * 2, n_layers + 1),
    ):
        request = Request([tokens], rows, generate=2)
        reply = adapter.run(request)
        assert reply.cost == total({"climbs": 1, "passes": 2, "token_layers": len(tokens) * n_layers + layers, "unembedded": 2 * len(rows)})
        assert_plain(case, request, reply)
    request = Request([tokens], [Row(0)] * 3 + [Row(0, (late,))] * 2, generate=12)
    reply = adapter.run(request)
    assert_plain(case, request, reply)
    assert reply.generated[0] == reply.generated[2] != reply.generated[3] == reply.generated[4]


def test_rows_that_ended_are_left_out(case, monkeypatch):
    adapter, n_layers = case.adapter, case.adapter.card.n_layers
    monkeypatch.setattr(type(adapter), "eos_ids", frozenset())
    tokens = adapter.encode(TEXT)
    rows = [Row(0), Row(0, (edit_at(adapter, "embed", 1),)), Row(0, (edit_at(adapter, "embed", 2),))]
    whole = adapter.run(Request([tokens], rows, generate=8)).generated
    ends = frozenset({whole[0][0], whole[1][3]})
    monkeypatch.setattr(type(adapter), "eos_ids", ends)
    request = Request([tokens], rows, generate=8)
    reply = adapter.run(request)
    assert_plain(case, request, reply)
    fed = [min(len(out), 7) for out in reply.generated]  # what a row said is fed back, but for the last
    assert fed[0] == 0 and reply.cost["token_layers"] == n_layers * (3 * len(tokens) + sum(fed)) and reply.cost["passes"] == 1 + max(fed)


def test_a_plan_counts_what_a_run_costs(case, monkeypatch):
    adapter, pick = case.adapter, random.Random(9)
    monkeypatch.setattr(type(adapter), "eos_ids", frozenset())
    prompts = [adapter.encode(text) for text in (TEXT, "Hi", "abc", "A much longer one, that is alone in its climb", "a")]
    rows = [Row(i, random_edits(pick, adapter, len(prompts[i]), ("prompt", "all"))) for i in range(5) for _ in range(5)]
    for generate in (0, 4):
        request = Request(prompts, rows, [Read("resid_post.0")], Readout(k=1), generate=generate)
        parts, cost = planning.plan(adapter, request), adapter.run(request).cost
        assert cost["climbs"] == len(parts) and cost["passes"] == sum(part.passes for part in parts)
        assert cost["unembedded"] == sum(part.unembedded for part in parts)
        most, prompts_alone = sum(part.token_layers for part in parts), sum(part.prompt_token_layers for part in parts)
        assert cost["token_layers"] == most if not generate else prompts_alone < cost["token_layers"] <= most


def test_a_tally_counts_what_is_laid_out(case):
    """Row by row: where each leaves its trunk, and what stays of it, is counted without laying anything out."""
    adapter, pick = case.adapter, random.Random(11)
    prompts = [adapter.encode(text) for text in (TEXT, "A cat, or a hat", "The dog")]
    sites = ("embed", "resid_pre.0", "resid_post.0", "attn_out.1", "resid_post.1", "mlp_act.1.3")
    for _ in range(12):
        some = [
            Row(pick.randrange(3), (edit_at(adapter, pick.choice(sites), i, pick.randrange(-3, 0)),) * pick.randint(0, 1))
            for i in range(20)
        ]
        request = Request(prompts, some, (), Readout(k=1))
        rows, tally = check(adapter, request), planning.Tally(request, adapter.card)
        for n, row in enumerate(rows, 1):
            tally.add(row)
            part = planning.Part(request, adapter.card, rows[:n])
            assert tally.row_layers == sum(part.layout.rows_at)
            assert (tally.trunk, tally.trunk + tally.forks) == (part.layout.n_trunk, len(part.layout.trunk))
            firsts = [part.pads[part.trunk_of[i]] + one.first for i, one in enumerate(rows[:n]) if one.first is not None]
            assert part.n - tally.width == min(firsts, default=part.n)


def test_a_prefix_is_kept_from_climb_to_climb(case, monkeypatch):
    """What is cut into climbs of the same prompts runs these once; if a climb reads in them, or prompts change, they run again."""
    adapter = case.adapter
    prompts = [adapter.encode(text) for text in (TEXT, "A cat, or a hat")]
    rows = [Row(i // 24, (edit_at(adapter, ("resid_pre.1", "attn_out.1", "resid_post.0")[i % 3], i),)) for i in range(48)]
    monkeypatch.setattr("hookbook.engine.planning.PASS_TOKENS", 0)
    for early, generate in ((-1, 0), (-1, 3), (0, 0)):
        request = Request(prompts, rows, [Read("resid_post.1", early)], Readout(logits=True), generate=generate)
        planned, one = check(adapter, request), planning.Tally(request, adapter.card, adapter.packs)
        for row in planned[:7]:
            one.add(row)
        answer = len(rows) * (adapter.card.d_model * adapter.card.itemsize + 4 * adapter.card.d_vocab)
        monkeypatch.setattr("hookbook.engine.planning.BUDGET_BYTES", one.peak_bytes + answer)
        parts, reply = planning.plan(adapter, request), adapter.run(request)
        follow = [part.follows for part in parts]
        assert all(part.split for part in parts) and len(parts) > 4
        assert [part.lasts for part in parts[:-1]] == follow[1:] and not follow[0]
        new = {0} | {i for i in range(1, len(parts)) if parts[i].prompts != parts[i - 1].prompts}
        assert follow == ([i not in new for i in range(len(parts))] if early else [False] * len(parts))
        assert reply.cost["passes"] == sum(part.passes for part in parts) == len(parts) * (1 + max(0, generate - 1)) + follow.count(False)
        assert reply.cost["token_layers"] <= sum(part.token_layers for part in parts)
        assert_plain(case, request, reply)


def test_a_climb_after_one_on_file_runs_its_prefix(tmp_path, monkeypatch):
    adapter = toy()
    tokens = adapter.encode(TEXT)
    monkeypatch.setattr("hookbook.engine.planning.PASS_TOKENS", 0)
    rows = [Row(0, (edit_at(adapter, "resid_pre.1", i),)) for i in range(24)]
    request = Request([tokens], rows, (), Readout(k=2))
    monkeypatch.setattr(
        "hookbook.engine.planning.BUDGET_BYTES", planning.Part(request, adapter.card, check(adapter, request)[:8]).peak_bytes
    )
    first, *_, last = planning.plan(adapter, request)
    assert last.follows
    whole = adapter.run(request, checkpoint=tmp_path / "kept")
    names = [f"{fingerprint(part)}.safetensors" for part in planning.plan(adapter, request)]
    for n, name in enumerate(names):  # any one of them is missing, then another
        (tmp_path / "kept" / name).unlink()
        again = adapter.run(request, checkpoint=tmp_path / "kept")
        assert torch.equal(again.readout.topk_logprobs, whole.readout.topk_logprobs)
        assert again.cost["passes"] - whole.cost["passes"] == n, "what was run again had no prefix of the climb before"
        assert again.cost["token_layers"] - whole.cost["token_layers"] == n * first.split * adapter.card.n_layers


def test_the_bar_moves_inside_a_climb(case, monkeypatch):
    """By token-layers, block by block and step by step, and ends at what was planned."""
    adapter, moved = case.adapter, []

    class Bar(runs.tqdm):
        def update(self, n=1):
            moved.append(n)
            return super().update(n)

    monkeypatch.setattr(runs, "tqdm", Bar)
    tokens = adapter.encode(TEXT)
    rows = [Row(0, (edit_at(adapter, f"resid_post.{i % 2}", i),)) for i in range(20)]
    for generate in (0, 4):
        request, moved[:] = Request([tokens], rows, (), Readout(k=1), generate=generate), []
        (part,) = planning.plan(adapter, request)
        adapter.run(request, progress=True)
        assert sum(moved) == part.token_layers and all(n >= 0 for n in moved)
        *inside, _ = moved  # the last is what rows that end early or say the same did not need
        assert len(inside) >= 2 * adapter.card.n_layers and max(inside) <= max(len(tokens), len(rows))
