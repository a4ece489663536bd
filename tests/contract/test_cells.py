"""Every site, operation and scope on every adapter: either it runs as its definition says, or it is refused by name.

One row for each cell, all in one request that decodes from ragged prompts. The reference runs a row's prompt and what it
decoded once more, plainly and without a cache, with the edits at their absolute positions: attention is causal, so the
logits after each position are those that uncached decoding would have had there.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import hookbook as hb
from hookbook.errors import EditError, Refused
from hookbook.request import OPS as EVERY_OP, PATTERN_OPS, Readout, Request, Row
from hookbook.sites import SITES
from hookbook.travel import decoding
from tests.support.cases import Case
from tests.support.formulas import flat

EXACT = 1e-10
STEPS = 20
TEXTS = ("Hi", "The cat sat on the mat.", "A longer prompt, of a cat")
PLACES = ("prompt", "generated", "all", "absolute")
UNITS = tuple(name for name, spec in SITES.items() if spec.unit)
OPS = tuple(op for op in EVERY_OP if op != "features")  # which need an SAE: test_sae.py
CELLS = tuple(itertools.product([*SITES, *(f"{name}.unit" for name in UNITS)], OPS, PLACES))
"""Sites, of those with heads or neurons also one of these; operations; scopes."""


def site_of(what: str, card: hb.ModelCard) -> hb.Site:
    """A site of a middle layer; a head or neuron of the next, which has a window in the Gemma of these tests."""
    name, *unit = what.split(".")
    if not SITES[name].layered:
        return hb.Site(name)
    if not unit:
        return hb.Site(name, 1)
    return hb.Site(name, card.n_layers - 2, hb.Site(name, 0).units(card)[0] - 1)


def edit_of(what: str, op: str, place: str, card: hb.ModelCard, n_tokens: int) -> hb.Edit:
    """The edit of a cell; raises where the interface has none."""
    site = site_of(what, card)
    scope = (0, n_tokens - 1, n_tokens, n_tokens + 3, n_tokens + 4, 63) if place == "absolute" else place
    position = {"prompt": slice(-2, None), "all": -1}.get(place, -1)
    more = {}
    if site.name == "attn_pattern":
        value = 0.0 if op == "knock_out" else 0.4
        more = {"keys": slice(0, 2)} if site.unit is None else {}
    elif op == "scale":
        value = -0.7  # not 0.7, which a norm behind the site would take back
    elif op in ("set", "add") and site.unit is not None and place in ("generated", "absolute"):
        value = 0.8  # one number for all
    else:
        value = 3 * torch.randn(
            site.width(card), generator=torch.Generator().manual_seed(CELLS.index((what, op, place))), dtype=torch.float64
        )
    return hb.Edit(site, value, op, position, to=1.5 if op == "clamp" else 0.0, scope=scope, **more)


def allowed(what: str, op: str) -> bool:
    """Whether the interface has an operation at a site: a pattern takes numbers, only a pattern has attention to knock out, one number
    has no directions."""
    if what == "mlp_act.unit" and op == "rotate":
        return False
    return op in PATTERN_OPS if what.startswith("attn_pattern") else op != "knock_out"


def rows_of(case: Case) -> tuple[list[hb.tokens.Tokens], dict[tuple[str, str, str], Row]]:
    """The prompts, and a row for each cell that this adapter has."""
    adapter = case.adapter
    prompts, rows = [adapter.encode(text) for text in TEXTS], {}
    for i, (what, op, place) in enumerate(CELLS):
        if allowed(what, op) and adapter.refuses(site_of(what, adapter.card)) is None:
            rows[what, op, place] = Row(i % 3, (edit_of(what, op, place, adapter.card, len(prompts[i % 3])),))
    return prompts, rows


def test_every_cell_runs_as_defined_also_while_decoding(case, monkeypatch):
    """All logits: after the prompt, and after each token that was fed back."""
    adapter = case.adapter
    monkeypatch.setattr(type(adapter), "eos_ids", frozenset())
    prompts, cells = rows_of(case)
    rows = [*cells.items(), *((("clean", "", str(i)), Row(i)) for i in range(len(prompts)))]
    rows.sort(key=lambda pair: pair[1].prompt)  # prompts are in the order of their lengths, so this is the order in which rows are run
    steps, readout = [], decoding.readout

    def seen(model, resid, *args, **more):
        steps.append(model.unembed(resid).detach())
        return readout(model, resid, *args, **more)

    monkeypatch.setattr(decoding, "readout", seen)
    reply = adapter.run(Request(prompts, [row for _, row in rows], (), Readout(logits=True), generate=STEPS))
    said = torch.stack(steps, 1)
    assert said.shape == (len(rows), STEPS, adapter.card.d_vocab) and reply.cost["climbs"] == 1
    assert torch.equal(said[:, 0], reply.readout.logits)
    clean = {row.prompt: i for i, (cell, row) in enumerate(rows) if cell[0] == "clean"}
    for i, (cell, row) in enumerate(rows):
        tokens, out = prompts[row.prompt], reply.generated[i]
        assert len(out) == STEPS and out == tuple(said[i].argmax(-1).tolist()), cell
        ids = tokens.ids + out[:-1]
        logits, _ = case.plain(ids, flat(row.edits, tokens, len(ids)))
        assert (said[i] - logits[len(tokens) - 1 :]).abs().max() < EXACT, cell
        # the control: what acts on the prompt moves what is said after it, what acts on generated tokens alone what is said after the first
        moved = (said[i, :2] - said[clean[row.prompt], :2]).abs().amax(-1)
        if cell[2] == "generated":
            assert moved[0] < EXACT and moved[1] > 1e-6, cell
        elif cell in cells:
            assert moved[0] > 1e-6, cell


def test_every_cell_is_run_or_refused(case):
    adapter = case.adapter
    _, rows = rows_of(case)
    tokens, refused = adapter.encode(TEXTS[0]), set()
    for what, op, place in CELLS:
        site = site_of(what, adapter.card)
        if not allowed(what, op):
            with pytest.raises(EditError, match="has no directions|only attn_pattern has keys"):
                edit_of(what, op, place, adapter.card, len(tokens))
            refused.add((what, op, place))
        elif adapter.refuses(site) is not None:
            row = Row(0, (edit_of(what, op, place, adapter.card, len(tokens)),))
            with pytest.raises(Refused, match=site.name):
                adapter.run(Request([tokens], [row], generate=5))
            refused.add((what, op, place))
    assert set(rows) | refused == set(CELLS) and not set(rows) & refused
    # these tiny models have everything: only what the interface itself does not have is refused
    assert len(rows) == len(PLACES) * (11 * 6 - 1 + 2 * len(PATTERN_OPS))


def test_rows_stop_at_their_own_end_tokens(case, monkeypatch):
    """Every fork has its own end: where another row goes on, the tokens before and after are as if none had ended."""
    prompts, rows = rows_of(case)
    chosen = [row for (_, op, _), row in rows.items() if op in ("set", "knock_out")]
    monkeypatch.setattr(type(case.adapter), "eos_ids", frozenset())
    whole = case.adapter.run(Request(prompts, chosen, generate=STEPS)).generated
    ends = frozenset({whole[0][3], whole[-1][7]})
    monkeypatch.setattr(type(case.adapter), "eos_ids", ends)
    cut = case.adapter.run(Request(prompts, chosen, generate=STEPS)).generated
    lengths = []
    for out, ended in zip(whole, cut, strict=True):
        first = next((i for i, token in enumerate(out) if token in ends), STEPS)
        assert ended == out[:first]
        lengths.append(first)
    assert min(lengths) <= 3 < 4 < max(lengths)
