"""Peak memory of sweeps beside the model, against the budget they were given and against what was planned.

Every sweep runs in processes of its own, after a small run of the same kind has loaded what is loaded once. What is
used is the peak of the resident set (`VmHWM`, reset before the sweep) above the resident set before. It holds the
answer too, which the user asked for: where the answer alone is larger than the budget, no plan can keep to it.

glibc's malloc by default keeps freed blocks of up to 32 MiB for itself, in pieces that the next tensor may not fit in.
`used` is with a fixed threshold (`MALLOC_TRIM_THRESHOLD_`), above which freed memory goes back, so that it is what the
sweep held at once; `by default` is what a process sees that does not set one.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from all_pairs import SOURCE, every_pair
from common import Claim, Models, main, states
from heads import mean_z, prompts, scan
from jacobian import SUBJECTS, TEMPLATE
from layers import sentences
from long_prompts import long_prompt

import hookbook as hb
from hookbook.engine import cost
from hookbook.request import Each, Edit, Read, Readout, Request, Row
from hookbook.sites import Site
from hookbook.tokens import At, Tokens, resolve

MIB = 1 << 20
BUDGETS = (256, 512, 1024)
"""MiB."""
ALLOWED = 1.2
"""Times the budget, and times the plan."""


@dataclass(frozen=True)
class Sweep:
    """A sweep, and a small one of the same kind."""

    run: Callable[[], object]
    small: Callable[[], object]


def of_request(adapter: hb.Adapter, request: Request) -> Sweep:
    """A sweep that is one request."""
    some, ask = 2, request.readout
    if ask is not None and ask.tokens is not None:
        ask = replace(ask, tokens=ask.tokens[:some])
    small = replace(request, rows=request.rows[:some], readout=ask)
    return Sweep(lambda: adapter.run(request, progress=False), lambda: adapter.run(small, progress=False))


def pairs(adapter: hb.Adapter, targets: list[str], **ask: Any) -> Sweep:
    """All pairs of a state's layer and a target's layer, at each target prompt's last token."""
    coded = [adapter.encode(text) for text in targets]
    rows = every_pair(states(adapter, [adapter.encode(SOURCE)])[:, 0], range(adapter.card.n_layers))
    return of_request(adapter, Request(coded, [replace(row, prompt=i) for i in range(len(coded)) for row in rows], **ask))


def wide(adapter: hb.Adapter) -> Sweep:
    """All pairs, patched at an early token of a long target prompt, so that forks are many tokens wide."""
    target = adapter.encode(hb.prompts.ENTITY_DESCRIPTION.text)
    rows = every_pair(states(adapter, [adapter.encode(SOURCE)])[:, 0], range(adapter.card.n_layers))
    rows = [replace(row, edits=tuple(replace(edit, position=2) for edit in row.edits)) for row in rows]
    return of_request(adapter, Request([target], rows, (), Readout(k=5)))


def heads(adapter: hb.Adapter) -> Sweep:
    """Every head at the last token of 25 ten-shot prompts."""
    coded, answers = prompts(adapter)
    return of_request(adapter, scan(adapter, coded, answers, mean_z(adapter, coded)))


def reads(adapter: hb.Adapter) -> Sweep:
    """Every layer's output at every token of the hundred sentences."""
    coded = [adapter.encode(text) for text in sentences()]
    every = [Read(Site("resid_post", layer), slice(None)) for layer in range(adapter.card.n_layers)]
    return of_request(adapter, Request(coded, [Row(i) for i in range(len(coded))], every))


def long_reads(adapter: hb.Adapter) -> Sweep:
    """Every layer's output at every token of two long prompts."""
    coded = [long_prompt(adapter, 1600, start) for start in (0, 100)]
    every = [Read(Site("resid_post", layer), slice(None)) for layer in range(adapter.card.n_layers)]
    return of_request(adapter, Request(coded, [Row(i) for i in range(len(coded))], every))


def patterns(adapter: hb.Adapter) -> Sweep:
    """Every head's attention to the token before last, knocked out, in 25 ten-shot prompts."""
    coded, answers = prompts(adapter)
    sites = [Site("attn_pattern", layer, head) for layer in range(adapter.card.n_layers) for head in range(adapter.card.n_heads)]
    rows = [Row(i, (Edit(site, op="knock_out", keys=-2),)) for site in sites for i in range(len(coded))]
    return of_request(adapter, Request(coded, rows, (), Readout(k=1, tokens=answers.repeat(len(sites), 1))))


def jacobian(adapter: hb.Adapter, template: str = TEMPLATE) -> Sweep:
    """The Jacobians of the last layer's output with respect to every layer's, for one relation."""
    coded = [adapter.encode(template.format(subject)) for subject in SUBJECTS]
    last = adapter.card.n_layers - 1

    def run(some: list[Tokens], layers: range) -> object:
        places = Each(tuple(resolve(At(subject), prompt)[0] for subject, prompt in zip(SUBJECTS, some, strict=False)))
        wrt = [Read(Site("resid_post", layer), places) for layer in layers]
        return hb.jacobian(adapter, some, Read(Site("resid_post", last)), wrt, progress=False)

    return Sweep(lambda: run(coded, range(last)), lambda: run(coded[:1], range(last - 1, last)))


IDENTITY = hb.prompts.TOKEN_IDENTITY.text
LONG = (
    "Question: What is the name of the city that is the seat of government of {}, a country that most people know from maps "
    "and from the news? Answer: it is"
)
SWEEPS: dict[str, Callable[[hb.Adapter], Sweep]] = {
    "all pairs, 4 targets": lambda adapter: pairs(
        adapter,
        [f"{IDENTITY.removesuffix('?')}{word} -> {word}\n?" for word in ("a cat", "dog", "the sea", "7")],
        readout=Readout(k=5),
    ),
    "all pairs, wide forks": wide,
    "all pairs, logits": lambda adapter: pairs(adapter, [IDENTITY], readout=Readout(logits=True)),
    "all pairs, generation": lambda adapter: pairs(adapter, [IDENTITY], generate=20),
    "heads, 25 long prompts": heads,
    "heads' attention, 25 long prompts": patterns,
    "reads, 100 prompts": reads,
    "reads, 2 prompts of 1,600 tokens": long_reads,
    "jacobian, 5 prompts": jacobian,
    "jacobian, 5 long prompts": lambda adapter: jacobian(adapter, LONG),
}


def resident(field: str) -> int:
    """A line of this process's memory status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def size(value: object) -> int:
    """The bytes of the tensors in an answer."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, (tuple, list)):
        return sum(map(size, value))
    return sum(size(getattr(value, field.name)) for field in fields(value)) if is_dataclass(value) else 0


def used(model: str, name: str) -> dict[str, float]:
    """Run one sweep in this process, which is fresh."""
    adapter = hb.load(model, "transformer_lens", device="cpu")
    sweep = SWEEPS[name](adapter)
    with cost.accounting() as account:
        sweep.run()
    sweep.small()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free but still resident would hide what the sweep takes
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    answer = sweep.run()
    return {"used": resident("VmHWM") - before, "planned": account.plan.peak_bytes, "climbs": account.plan.climbs, "answer": size(answer)}


def in_fresh_process(model: str, name: str, budget: int, **environment: str) -> dict[str, float]:
    """Run one sweep in a process of its own, within a budget of some MiB."""
    environment |= {"HOOKBOOK_BUDGET_BYTES": str(budget * MIB)}
    done = subprocess.run([sys.executable, __file__, "--child", model, name], env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} of {model} within {budget} MiB:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def bench(models: Models, repeats: int) -> list[Claim]:
    """A line for each sweep and budget. Memory is measured once: it does not vary with the machine's load."""
    print(f"\n{models.name}: peak memory beside the model, in MiB")
    print(
        f"{'sweep':36s} {'budget':>7s} {'planned':>8s} {'used':>7s} {'answer':>7s} {'climbs':>7s} {'used/budget':>12s} "
        f"{'used/planned':>13s} {'by default':>11s}"
    )
    claims = []
    for name, budget in itertools.product(SWEEPS, BUDGETS):
        found = in_fresh_process(models.name, name, budget, MALLOC_TRIM_THRESHOLD_=str(1 << 16))
        default = in_fresh_process(models.name, name, budget)["used"] / MIB
        took, planned, answer = (found[key] / MIB for key in ("used", "planned", "answer"))
        share, wrong = took / budget, took / planned
        print(
            f"{name:36s} {budget:7d} {planned:8.0f} {took:7.0f} {answer:7.0f} {found['climbs']:7.0f} {share:12.2f} {wrong:13.2f} "
            f"{default:11.0f}",
            flush=True,
        )
        claims.append(Claim(f"{name}: memory / budget of {budget} MiB", share, ALLOWED, at_most=True))
        claims.append(Claim(f"{name}: memory / plan within {budget} MiB", wrong, ALLOWED, at_most=True))
    return claims


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(used(*sys.argv[2:4])))
    else:
        main({"memory": bench})
