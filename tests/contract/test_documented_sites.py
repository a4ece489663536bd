"""Every `yes` of docs/reference/sites.md, on the models of which it says so: what is read there and written there does what the page
says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hookbook as hb
from hookbook.request import Read, Readout, Request, Row
from hookbook.sites import SITES
from tests.support.needs import marked, require

CLOSE = 2e-4
"""These models are float32."""


COUNT = {"TransformerBridge": 7, "HookedTransformer": 5, "nnsight": 7, "toy": 1}
"""How many models the page asks."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    chosen = [part for part in metafunc.config.getoption("--adapters").split(",") if part]
    metafunc.parametrize("backend", marked(name for name in COUNT if not chosen or any(part in name.lower() for part in chosen)))


def pages() -> SimpleNamespace:
    """What docs/generate.py defines."""
    path = Path(__file__).parents[2] / "docs" / "generate.py"
    namespace: dict[str, Any] = {"__file__": str(path), "__name__": "generate"}
    exec(path.read_text(), namespace)
    return SimpleNamespace(**namespace)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() < CLOSE * (1 + b.abs().max()))


def test_what_the_page_says_can_be_read_and_edited_is(backend):
    if backend != "toy":
        require("nnsight" if backend == "nnsight" else "transformer_lens")
    generate, whole = pages(), 0
    found = list(generate.adapters(backend))
    assert tuple(COUNT) == generate.BACKENDS and len(found) == COUNT[backend]
    for _, family, adapter in found:
        has = {name for name in SITES if generate.refusal(adapter, hb.Site(name, 0 if SITES[name].layered else None)) is None}
        assert {"embed", "resid_pre", "resid_post", "final_norm"} <= has, family
        whole += len(has) == len(SITES)
        check(adapter, has)
    assert whole >= COUNT[backend] / 2


def check(adapter: hb.Adapter, has: set[str]) -> None:
    card, here = adapter.card, f"{adapter.card.backend} {adapter.card.architecture}"
    prompts = [adapter.encode([0, 41, 7, 99]), adapter.encode([0, 3, 200, 18])]
    layers, every = range(card.n_layers), slice(None)
    sites = [hb.Site(name, layer) for name in sorted(has) if SITES[name].layered for layer in layers] + [
        hb.Site("embed"),
        hb.Site("final_norm"),
    ]
    reply = adapter.run(Request(prompts, [Row(0), Row(1)], [Read(site, every) for site in sites], Readout(logits=True)))
    ours, theirs = ({site: r.values[r.rows == i] for site, r in zip(sites, reply.readings, strict=True)} for i in (0, 1))
    want = torch.stack([adapter.plain_logits(torch.tensor([tokens.ids]))[0, -1] for tokens in prompts])
    assert close(reply.readout.logits, want), here  # type: ignore[union-attr]

    def edited(*edits: hb.Edit) -> torch.Tensor:
        return adapter.run(Request(prompts, [Row(0, edits)], (), Readout(logits=True))).readout.logits[0]  # type: ignore[union-attr]

    # the whole state at once, of another prompt: what is said is what that prompt says
    for site in (
        hb.Site("embed"),
        hb.Site("final_norm"),
        *(hb.Site(name, layer) for name in ("resid_pre", "resid_post") for layer in layers),
    ):
        assert close(edited(hb.Edit(site, theirs[site], "set", every)), want[1]), (here, site)
    for layer in layers:
        names = ("resid_pre", "head_z", "attn_out", "mlp_in", "mlp_act", "mlp_out", "resid_post")
        pre, z, attn, taken, act, mlp, post = (hb.Site(name, layer) for name in names)
        if {"attn_out", "mlp_out"} <= has:
            assert close(ours[pre] + ours[attn] + ours[mlp], ours[post]), (here, layer)
        for inner, outer in ((z, attn), (act, mlp)):
            if not {inner.name, outer.name} <= has:
                continue
            project, norm = adapter.writer(inner.name, layer)
            with torch.no_grad():
                through = project(ours[inner])
                assert close(through if norm is None else norm(through), ours[outer]), (here, inner)
            moved = edited(hb.Edit(inner, theirs[inner][-1], "set"))
            assert close(moved, edited(hb.Edit(outer, theirs[outer][-1], "set"))) and not close(moved, want[0]), (here, inner)
        if {"mlp_in", "mlp_out"} <= has:  # what an MLP takes is all that it makes its addition of
            moved = edited(hb.Edit(taken, theirs[taken][-1], "set"))
            assert close(moved, edited(hb.Edit(mlp, theirs[mlp][-1], "set"))) and not close(moved, want[0]), (here, taken)
        if "attn_pattern" in has:
            pattern = hb.Site("attn_pattern", layer)
            assert close(ours[pattern].sum(-1), torch.ones(len(prompts[0]), card.n_heads, dtype=ours[pattern].dtype)), (here, layer)
            assert close(edited(hb.Edit(pattern, 0.0, "set")), edited(hb.Edit(z, 0.0, "set"))), (here, layer)
            # values mixed anew by hand: the last token attends to the first alone
            first = edited(hb.Edit(pattern, op="knock_out", keys=slice(1, None)))
            assert close(first, edited(hb.Edit(z, ours[z][0], "set"))) and not close(first, want[0]), (
                here,
                layer,
            )  # the first attends to itself alone
