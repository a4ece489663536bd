"""Any request at all equals plain runs of its rows: what hypothesis draws, on every adapter, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

import hookbook as hb
from hookbook.engine import planning, selfcheck
from hookbook.errors import EditError
from hookbook.request import PATTERN_OPS, Each, Read, Readout, Request, Row, position_of
from hookbook.sites import SITES
from hookbook.testing import toy_tokenizer
from tests.contract.test_forks import direction
from tests.support.cases import Case, assert_plain
from tests.support.needs import require
from tests.support.tiny import DTYPE

Draw = Any
NOTHING = ("would never fire", "changes nothing", "attention to later tokens")
"""What planning says of an edit that changes nothing; such edits are left out of what is drawn."""


@st.composite
def sites(draw: Draw, card: hb.ModelCard, sweep: bool = False) -> hb.Site:
    name = draw(st.sampled_from([name for name in SITES if not sweep or name not in ("embed", "attn_pattern")]))
    if not SITES[name].layered:
        return hb.Site(name)
    layer = draw(st.integers(0, card.n_layers - 1))
    unit = draw(st.none() | st.integers(0, hb.Site(name, 0).units(card)[0] - 1)) if SITES[name].unit else None
    return hb.Site(name, layer, unit)


@st.composite
def positions(draw: Draw, n: int) -> hb.tokens.Position:
    kind = draw(st.sampled_from(["last", "index", "span", "list"]))
    if kind == "last":
        return -1
    if kind == "index":
        return draw(st.integers(-n, n - 1))
    if kind == "list":
        return draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=4, unique=True))
    start = draw(st.integers(0, n - 1))
    return slice(start, draw(st.integers(start + 1, n)))


@st.composite
def edits(draw: Draw, card: hb.ModelCard, tokens: hb.tokens.Tokens, sweep: bool = False) -> hb.Edit:
    n, site = len(tokens), draw(sites(card, sweep))
    scopes = st.sampled_from(["prompt", "prompt", "generated", "all"]) | st.sets(st.integers(0, n + 5), min_size=1, max_size=4).map(tuple)
    scope = "prompt" if sweep else draw(scopes)
    position = draw(positions(n)) if scope in ("prompt", "all") and not sweep else -1
    if site.name == "attn_pattern":
        op = draw(st.sampled_from(PATTERN_OPS))
        value = 0.0 if op == "knock_out" else draw(st.sampled_from([0.0, 0.3, 1.7, -0.8]))
        return hb.Edit(site, value, op, position, scope=scope, keys=draw(st.none() | positions(n)))
    ops = ["set", "add", "scale", "project_out", "clamp"] + ["rotate"] * (site.width(card) > 1)
    op, seed = draw(st.sampled_from(ops)), draw(st.integers(0, 99))
    if op == "scale":
        return hb.Edit(site, draw(st.sampled_from([-1.3, 0.0, 0.7])), op, position, scope=scope)
    kind = draw(st.sampled_from(["vector", "vector", "number", "vectors"])) if op in ("set", "add") else "vector"
    if kind == "number":
        return hb.Edit(site, draw(st.sampled_from([-0.6, 0.0, 1.1])), op, position, scope=scope)
    width, many = site.width(card), len(hb.tokens.resolve(position, tokens)) if scope == "prompt" else 1
    value = 2 * (torch.stack([direction(seed + i, width) for i in range(many)]) if kind == "vectors" else direction(seed, width))
    return hb.Edit(site, value, op, position, to=draw(st.sampled_from([0.0, -2.5])) if op == "clamp" else 0.0, scope=scope)


@st.composite
def requests(draw: Draw, adapter: hb.Adapter) -> Request:
    """Mostly of any kind; sometimes a sweep over the last tokens, whose rows share a prefix and can be packed."""
    card, sweep = adapter.card, draw(st.integers(0, 3)) == 0
    lengths = draw(st.sampled_from([(22, 24, 20, 21), (20, 24, 22, 24), (24, 1, 9, 2), (5, 5, 5, 5), (1, 2, 3, 2)][: 2 if sweep else 5]))
    prompts = [adapter.encode([2 + (7 * i + 3 * k * k) % 256 for k in range(n)]) for i, n in enumerate(lengths[: draw(st.integers(1, 4))])]
    shortest, n_rows = min(map(len, prompts)), draw(st.integers(6, 16) if sweep else st.integers(1, 7))
    of = [(i * i + i // 3) % len(prompts) for i in range(n_rows)]
    reads = []
    for _ in range(draw(st.integers(0, 3))):
        each = [draw(positions(len(prompts[i]))) for i in of]
        position = Each(tuple(each)) if draw(st.booleans()) else draw(positions(shortest))
        reads.append(Read(draw(sites(card, sweep)), position))
    generate = 0 if sweep else draw(st.sampled_from([0, 0, 1, 2, 6]))
    readout = None
    if draw(st.booleans()) or not (reads or generate):
        tokens = torch.arange(2 * n_rows).reshape(n_rows, 2) if draw(st.booleans()) else None
        at = Each(tuple(draw(st.integers(0, len(prompts[i]) - 1)) for i in of)) if draw(st.booleans()) else -1
        readout = Readout(at, draw(st.sampled_from([0, 5])), tokens, logits=True)
    rows: list[Row] = []
    for i, prompt in enumerate(of):
        drawn = draw(st.lists(edits(card, prompts[prompt], sweep), min_size=int(sweep), max_size=3))
        rows.append(Row(prompt, allowed(adapter, prompts, prompt, drawn, reads, readout, generate, i)))
    return Request(prompts, rows, reads, readout, generate)


def allowed(
    adapter: hb.Adapter, prompts: list, prompt: int, drawn: list, reads: list, readout: Readout | None, generate: int, row: int
) -> tuple[hb.Edit, ...]:
    """The drawn edits without those that planning refuses because they change nothing."""
    mine = [Read(read.site, position_of(read.position, row)) for read in reads]
    ask = None if readout is None else Readout(position_of(readout.position, row), logits=True)
    kept: tuple[hb.Edit, ...] = ()
    for edit in drawn:
        try:
            planning.plan(adapter, Request(prompts, [Row(prompt, (*kept, edit))], mine, ask, generate))
        except EditError as error:
            if not any(words in str(error) for words in NOTHING):
                raise
            continue
        kept = (*kept, edit)
    return kept


def holds(case: Case, examples: int) -> int:
    """Draw requests, and compare each reply with plain runs; how many there were."""
    phases = [Phase.generate, *([Phase.shrink] if case.name == "toy" else [])]  # on the others it would take minutes
    drawn: list[tuple[bool, ...]] = []
    packs = case.adapter.packs and selfcheck.packs(case.adapter)

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck))
    @given(
        requests(case.adapter),
        st.sampled_from([1 << 31, 1 << 31, 1 << 16, 1]),
        st.sampled_from([0, planning.PASS_TOKENS]),
        st.sampled_from([0, 4]),
    )
    def equal(request: Request, budget: int, pass_tokens: int, ends: int) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hookbook.engine.planning.BUDGET_BYTES", budget)
            patch.setattr("hookbook.engine.planning.PASS_TOKENS", pass_tokens)
            patch.setattr(type(case.adapter), "eos_ids", frozenset(range(0, 258, ends) if ends else ()))
            parts = planning.plan(case.adapter, request)
            edited = any(row.edits for row in request.rows)
            drawn.append(
                (len(parts) > 1, any(p.split for p in parts), any(p.pack > 1 for p in parts), any(any(p.pads) for p in parts), edited)
            )
            assert_plain(case, request, case.adapter.run(request))

    equal()
    cut, shared, packed, padded, edited = (sum(column) for column in zip(*drawn, strict=True))
    # the control: what is drawn reaches every way in which rows are laid out
    assert min(cut, shared, padded) > examples / 20 and edited > examples / 2 and (packed > 0) == packs, (
        cut,
        shared,
        packed,
        padded,
        edited,
    )
    return len(drawn)


def test_any_request_equals_plain_runs(case):
    examples = 200 if case.name == "toy" else 15
    assert holds(case, examples) >= examples


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_any_request_to_a_model_with_fused_attention_equals_plain_runs(tiny_folder, arch):
    """As people load it; the reference has eager attention."""
    require("nnsight")
    from nnsight import TransformersModel

    fused, eager = (
        hb.wrap(
            TransformersModel(
                transformers.AutoModelForCausalLM.from_pretrained(tiny_folder(arch), dtype=DTYPE, attn_implementation=attention).eval(),
                tokenizer=toy_tokenizer(),
                task="text-generation",
            )
        )
        for attention in ("sdpa", "eager")
    )
    plain = Case(f"nnsight-{arch}", eager).plain
    case = Case(f"nnsight-{arch}", fused)
    case.plain = plain  # type: ignore[method-assign]
    assert holds(case, 15) >= 15
