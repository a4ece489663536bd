"""The engine against plain runs: each row by itself, unpadded, through the backend's own means, in float64."""

from __future__ import annotations

import random

import torch

import hookbook as hb
from hookbook.engine import planning, selfcheck
from hookbook.request import Each, Read, Readout, Request, Row
from hookbook.tokens import resolve
from tests.support.cases import assert_plain
from tests.support.formulas import flat

EXACT = 1e-10
TEXTS = ("The cat sat on the mat.", "Hi", "A longer prompt, with more of it.", "abc abc")


def direction(seed: int, d: int) -> torch.Tensor:
    return torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_edit(
    pick: random.Random, adapter: hb.Adapter, n_tokens: int, sites: tuple[hb.Site, ...] = (), scopes: tuple = ("prompt",)
) -> hb.Edit:
    """Any edit that the interface allows."""
    site, scope = pick.choice(sites or adapter.sites), pick.choice(scopes)
    if site.name in ("head_z", "mlp_act", "attn_pattern") and pick.random() < 0.5:
        site = hb.Site(site.name, site.layer, pick.randrange(site.units(adapter.card)[0]))
    position = (
        pick.choice([-1, 0, n_tokens // 2, pick.randrange(n_tokens), slice(0, 2), slice(-2, None)]) if scope in ("prompt", "all") else -1
    )
    if site.name == "attn_pattern":
        op = pick.choice(["set", "add", "scale", "knock_out"])
        keys = pick.choice([None, 0, slice(0, 2)])
        return hb.Edit(site, 0.0 if op == "knock_out" else pick.choice([0.0, 0.4]), op, position, scope=scope, keys=keys)
    ops = ["set", "add", "scale", "project_out", "clamp", "rotate"]
    op = pick.choice(ops[: None if site.width(adapter.card) > 1 else -1])  # one number has nothing to turn to
    value = 0.7 if op == "scale" else 3 * direction(pick.randrange(1000), site.width(adapter.card))
    if op in ("set", "add") and pick.random() < 0.2:
        value = 0.3
    return hb.Edit(site, value, op, position, to=1.5 if op == "clamp" else 0.0, scope=scope)


def random_edits(pick: random.Random, adapter: hb.Adapter, n_tokens: int, scopes: tuple = ("prompt",)) -> tuple[hb.Edit, ...]:
    """One to four edits, of which the last acts on the last token's logits."""
    edits = [random_edit(pick, adapter, n_tokens, scopes=scopes) for _ in range(pick.randint(0, 3))]
    below = tuple(site for site in adapter.sites if site.name != "final_norm")
    return (*edits, random_edit(pick, adapter, n_tokens, below, scopes))


def differ(ours: torch.Tensor, plain: torch.Tensor) -> float:
    """The largest difference; a pattern is read with the keys of the longest prompt."""
    return float((ours - torch.nn.functional.pad(plain, (0, ours.shape[-1] - plain.shape[-1]))).abs().max())


def test_forks_equal_plain_runs(case):
    """Ragged prompts on the left-padded trunk; mixed sites, layers, operations and positions in every row."""
    adapter, pick = case.adapter, random.Random(7)
    prompts = [adapter.encode(text) for text in TEXTS]
    rows = [Row(i) for i in range(len(prompts))]
    rows += [Row(i, random_edits(pick, adapter, len(prompts[i]))) for _ in range(8) for i in range(len(prompts))]
    pick.shuffle(rows)
    last = [hb.Site(name, adapter.card.n_layers - 1) for name in ("attn_pattern", "head_z", "mlp_act", "attn_out", "mlp_out", "resid_post")]
    reads = [Read(site, position) for site in (*adapter.sites[:2], *last, hb.Site("final_norm")) for position in (-1, 0)]
    reads.append(Read(adapter.sites[-1], Each(tuple(len(prompts[row.prompt]) // 2 for row in rows))))
    reply = adapter.run(Request(prompts, rows, reads, Readout(logits=True)))
    for i, row in enumerate(rows):
        tokens = prompts[row.prompt]
        logits, found = case.plain(tokens.ids, flat(row.edits, tokens), tuple({read.site for read in reads}))
        assert (reply.readout.logits[i] - logits[-1]).abs().max() < EXACT, row.edits
        for read, reading in zip(reads, reply.readings, strict=True):
            position = read.position.positions[i] if isinstance(read.position, Each) else read.position
            assert differ(reading.values[i], found[read.site][position]) < EXACT, (read, row.edits)


def test_a_sweep_over_one_prompt_reuses_its_prefix(case, monkeypatch):
    adapter = case.adapter
    monkeypatch.setattr("hookbook.engine.planning.PASS_TOKENS", 0)  # however little it saves
    tokens = adapter.encode("The cat sat on the mat.")
    n_layers, n = adapter.card.n_layers, len(tokens)
    vector = 4 * direction(3, adapter.card.d_model)
    rows = [Row(0, (hb.Edit(hb.Site("resid_post", layer), vector, "set"),)) for layer in range(n_layers)]
    reply = adapter.run(Request([tokens], rows, (), Readout(logits=True)))
    for i, row in enumerate(rows):
        logits, _ = case.plain(tokens.ids, flat(row.edits, tokens))
        assert (reply.readout.logits[i] - logits[-1]).abs().max() < EXACT
    # prefix once, the last token of the trunk once, and of each fork above its layer
    assert reply.cost["token_layers"] == n_layers * n + sum(n_layers - layer - 1 for layer in range(n_layers))


def test_many_rows_of_one_token_share_batch_rows(case):
    """The packed pass: edits at every site of every layer of a prompt's last token, more rows than fit one batch row."""
    adapter = case.adapter
    # GPT-2's blocks take the mask by position, where it is not found, so its rows stay separate
    assert (adapter.packs and selfcheck.packs(adapter)) == (case.name.split("-")[0] in ("bridge", "nnsight") and "gpt2" not in case.name)
    prompts = [adapter.encode(text) for text in ("The cat sat on the mat.", "The dog sat on my hat!!")]
    assert len(prompts[0]) == len(prompts[1])
    ops, sites = ("set", "add", "project_out"), [site for site in adapter.sites if site.name not in ("attn_pattern", "embed")]
    rows = [Row(0)]
    for i, site in enumerate(sites):
        for j, op in enumerate(ops):
            rows.append(Row((i + j) % 2, (hb.Edit(site, 4 * direction(3 * i + j, site.width(adapter.card)), op),)))
    rows += [Row(0, (rows[5].edits[0], rows[-1].edits[0]))]
    reads = [Read(hb.Site(name, adapter.card.n_layers - 1)) for name in ("head_z", "attn_out", "mlp_act", "mlp_out", "resid_post")] + [
        Read("resid_post.1", 0)
    ]
    reply = adapter.run(Request(prompts, rows, reads, Readout(logits=True)))
    for i, row in enumerate(rows):
        tokens = prompts[row.prompt]
        logits, found = case.plain(tokens.ids, flat(row.edits, tokens), tuple(read.site for read in reads))
        assert (reply.readout.logits[i] - logits[-1]).abs().max() < EXACT, row.edits
        for read, reading in zip(reads, reply.readings, strict=True):
            assert (reading.values[i] - found[read.site][read.position]).abs().max() < EXACT


def test_nothing_above_the_last_read_is_computed(case):
    adapter = case.adapter
    tokens = adapter.encode("The cat")
    reply = adapter.run(Request([tokens], [Row(0)], [Read(hb.Site("resid_post", 0))]))
    assert reply.cost["token_layers"] == len(tokens) and reply.cost["unembedded"] == 0


def test_a_span_is_edited_and_read_token_by_token(case):
    adapter = case.adapter
    tokens = adapter.encode("The cat sat")
    span = hb.At("cat", "all")
    values = torch.stack([direction(i, adapter.card.d_model) for i in range(len(resolve(span, tokens)))])
    site = hb.Site("resid_post", 1)
    reply = adapter.run(Request([tokens], [Row(0, (hb.Edit(site, values, "set", span),))], [Read(site, span), Read(site, slice(None))]))
    assert torch.equal(reply.readings[0].values, values)
    assert reply.readings[1].positions.tolist() == list(range(len(tokens)))
    logits, found = case.plain(tokens.ids, flat((hb.Edit(site, values, "set", span),), tokens), (site,))
    assert (reply.readings[1].values - found[site]).abs().max() < EXACT


def test_a_budget_cuts_the_sweep_and_changes_nothing(case, monkeypatch):
    adapter = case.adapter
    prompts = [adapter.encode(text) for text in TEXTS[:2]]
    site = hb.Site("resid_post", 1)
    rows = [Row(i % 2, (hb.Edit(site, direction(i, adapter.card.d_model)),)) for i in range(9)]
    wanted = torch.arange(9)[:, None]
    request = Request(prompts, rows, [Read(site, Each(tuple([-1, 0] * 4 + [-1])))], Readout(k=2, tokens=wanted), generate=3)
    whole = adapter.run(request)
    monkeypatch.setattr("hookbook.engine.planning.BUDGET_BYTES", 1)
    cut = adapter.run(request)
    assert cut.cost["passes"] > whole.cost["passes"]
    assert (cut.readings[0].values - whole.readings[0].values).abs().max() < EXACT and torch.equal(
        cut.readings[0].rows, whole.readings[0].rows
    )
    assert torch.equal(cut.readout.topk_ids, whole.readout.topk_ids) and cut.generated == whole.generated
    assert (cut.readout.token_logprobs - whole.readout.token_logprobs).abs().max() < EXACT


def test_generation_from_forks_equals_uncached_decoding(case):
    """Each row decodes from its own keys and values; plainly, the whole sequence is run again with the edits in place."""
    adapter, pick, steps = case.adapter, random.Random(11), 20
    prompts = [adapter.encode(text) for text in TEXTS[:3]]
    rows = [Row(i) for i in range(3)]
    for i in [0, 1, 2] * 5:
        n = len(prompts[i])
        rows.append(Row(i, random_edits(pick, adapter, n, ("prompt", "generated", "all", (0, n - 1, n, n + 3)))))
    request = Request(prompts, rows, generate=steps)
    reply = adapter.run(request)
    assert_plain(case, request, reply)
    for row, out in list(zip(rows, reply.generated, strict=True))[2:6]:  # the same, token by token
        tokens = prompts[row.prompt]
        ids = list(tokens.ids)
        expected: list[int] = []
        for _ in range(steps):
            token = int(case.plain(tuple(ids), flat(row.edits, tokens, len(ids)))[0][-1].argmax())
            if token in adapter.eos_ids:
                break
            expected.append(token)
            ids.append(token)
        assert list(out) == expected


def test_packed_rows_decode_as_rows_alone(case, monkeypatch):
    """Many rows of two padded prompts; edits of generated tokens, rows that end early and rows that say the same."""
    adapter, steps = case.adapter, 7
    prompts = [adapter.encode(text) for text in ("The cat sat on the mat, and", "The dog sat on my hat!! And then")]
    rows = [Row(0), Row(1)]
    for i in range(36):
        vector = (8, 0.5)[i % 5 == 0] * direction(i, adapter.card.d_model)
        scope = ("prompt", "all", "generated", (len(prompts[i % 2]) - 1, len(prompts[i % 2]) + 2))[i // 2 % 4]
        rows.append(
            Row(i % 2, (hb.Edit(hb.Site(("resid_pre", "attn_out", "mlp_out")[i % 3], i % adapter.card.n_layers), vector, scope=scope),))
        )
    request = Request(prompts, rows, generate=steps)
    packs = adapter.packs and selfcheck.packs(adapter)
    (part,) = planning.plan(adapter, request)
    assert part.split and (part.pack_decoding > 1) == packs
    alone = [adapter.run(Request([prompts[row.prompt]], [Row(0, row.edits)], generate=steps)) for row in rows]
    ends = frozenset({alone[7].generated[0][3], alone[20].generated[0][2]})
    for adapter_ends in (adapter.eos_ids, ends):
        monkeypatch.setattr(type(adapter), "eos_ids", adapter_ends)
        reply = adapter.run(request)
        want = [adapter.run(Request([prompts[row.prompt]], [Row(0, row.edits)], generate=steps)) for row in rows]
        assert list(reply.generated) == [one.generated[0] for one in want]
        assert all((reply.token_logprobs[i] - one.token_logprobs[0]).abs().max() < EXACT for i, one in enumerate(want))
    assert len(set(reply.generated)) > 8 and len(set(map(len, reply.generated))) > 2, "rows end at different steps"
    monkeypatch.setattr(planning, "PACK_DECODING", 3)
    assert packs == (planning.plan(adapter, request)[0].pack_decoding == 3)
    assert adapter.run(request).generated == reply.generated


def test_a_row_stops_at_its_own_end_token(case, monkeypatch):
    adapter = case.adapter
    tokens = adapter.encode("The cat")
    (plain,) = adapter.run(Request([tokens], [Row(0)], generate=5)).generated
    assert len(plain) == 5
    monkeypatch.setattr(type(adapter), "eos_ids", frozenset({plain[2]}))
    vector = 5 * direction(2, adapter.card.d_model)
    first, other = adapter.run(Request([tokens], [Row(0), Row(0, (hb.Edit(hb.Site("resid_post", 1), vector),))], generate=5)).generated
    assert first == plain[: plain.index(plain[2])]
    assert plain[2] not in other
