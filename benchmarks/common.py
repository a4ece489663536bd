"""What the benchmarks share: the models, the loops that people write today, measuring in turns, and the tables.

A benchmark does the same work in several ways. The first is hookbook's; the others are the best loop that a careful user
would write: batched, with one hook where it is needed, without gradients, and with the logits of the last token only. All
ways run in turns on the same machine, a ratio is the median over the turns, and every way must give the same answer.

A way that would take too long does an even sample of the work, and its time is scaled; its line says so.

GFLOP/s are counted, not measured: two for each weight in a block's matrices and each token-layer, and 2 d_model d_vocab
for each row that is unembedded. Attention's own products (queries with keys, weights with values) are left out, so the
true figure is a little higher. The peak is that of products of two 2048 x 2048 matrices in float32.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

import hookbook as hb
from hookbook.models.loading import load_module
from hookbook.models.packages import PACKAGES
from hookbook.reply import Reply
from hookbook.request import Read, Request, Row
from hookbook.sites import Site
from hookbook.tokens import Tokens

Change = Callable[[Tensor], object]
"""Changes a site's value `[row, pos, ...]` in place."""
Loop = Callable[["Models", dict[str, Tensor], Site, Change], Tensor]
"""One pass over a batch with one site changed, by another library: the last token's logits `[row, d_vocab]`."""


class Models:
    """One model as every library has it, each loaded when it is first needed."""

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def bridge(self) -> hb.Adapter:
        """TransformerLens' bridge, wrapped."""
        return hb.load(self.name, "transformer_lens", device="cpu")

    @cached_property
    def nnsight(self) -> hb.Adapter:
        """nnsight's model, wrapped."""
        return hb.load(self.name, "nnsight", device="cpu")

    @cached_property
    def plain(self) -> Any:
        """The Hugging Face model that no library has touched."""
        return load_module(self.name, "float32", "cpu")[0].requires_grad_(False)


def bridge_loop(models: Models, inputs: dict[str, Tensor], site: Site, change: Change) -> Tensor:
    """TransformerLens: `run_with_hooks`, told to spare the logits of all other tokens."""

    def hook(x: Tensor, hook: object) -> Tensor:
        change(x)
        return x

    return models.bridge.model.run_with_hooks(inputs["input_ids"], **_beside(inputs), fwd_hooks=[(site.hook_name, hook)], logits_to_keep=1)[
        :, -1
    ]


def nnsight_loop(models: Models, inputs: dict[str, Tensor], site: Site, change: Change) -> Tensor:
    """nnsight: the same in a trace."""
    model: Any = models.nnsight.model
    n_heads = models.nnsight.card.n_heads
    with model.trace(inputs["input_ids"], **_beside(inputs), logits_to_keep=1):
        block = model.model.layers[site.layer]
        if site.name == "head_z":
            change(block.self_attn.o_proj.input.unflatten(-1, (n_heads, -1)))
        else:
            change(block.output)
        logits = model.output.logits.save()
    return logits[:, -1]


LOOPS: dict[str, Loop] = {"TransformerLens hooks": bridge_loop, "nnsight trace": nnsight_loop}


def _beside(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in inputs.items() if key != "input_ids"}


def batch(prompt: Tokens, rows: int) -> dict[str, Tensor]:
    """One prompt several times, as a model takes it."""
    return {"input_ids": torch.tensor([prompt.ids]).expand(rows, -1)}


def padded(prompts: Sequence[Tokens]) -> dict[str, Tensor]:
    """Prompts of different lengths, padded on the left, as a model takes them."""
    n = max(map(len, prompts))
    mask = torch.tensor([[0] * (n - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    ids = torch.tensor([[0] * (n - len(prompt)) + list(prompt.ids) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def read_last(adapter: hb.Adapter, prompts: Sequence[Tokens], name: str = "resid_post") -> Reply:
    """A read of a site at the last token of every prompt, for every layer."""
    reads = [Read(Site(name, layer)) for layer in range(adapter.card.n_layers)]
    return adapter.run(Request(prompts, [Row(i) for i in range(len(prompts))], reads), progress=False)


def stacked(reply: Reply) -> Tensor:
    """What was read: `[layer, prompt, width]`."""
    return torch.stack([reading.values for reading in reply.readings])


def states(adapter: hb.Adapter, prompts: Sequence[Tokens], name: str = "resid_post") -> Tensor:
    """A site's value at the last token of every prompt, in every layer: `[layer, prompt, width]`."""
    return stacked(read_last(adapter, prompts, name))


@dataclass(frozen=True, eq=False)
class Answer:
    """What a way found."""

    values: Tensor
    """`[row, ...]`: numbers, compared by their difference."""
    top: Tensor | None = None
    """`[row, ...]`: tokens, compared for equality; None: the place of each row's largest value."""
    rows: Sequence[int] | None = None
    """Which rows of the whole work these are; None: all of them."""
    cost: Mapping[str, int] = field(default_factory=dict)
    """What hookbook counted."""

    @staticmethod
    def of(reply: Reply, *before: Reply) -> Answer:
        """Hookbook's answer: all logits if they were asked for, else log-probabilities. What went before counts in its cost."""
        said = reply.readout
        assert said is not None
        cost = {key: sum(r.cost[key] for r in (reply, *before)) for key in reply.cost}
        if said.logits is not None:
            return Answer(said.logits, cost=cost)
        return Answer(torch.cat([said.topk_logprobs, said.token_logprobs], 1), said.topk_ids[:, 0], cost=cost)

    @staticmethod
    def from_logits(logits: Tensor, rows: Sequence[int], k: int, tokens: Tensor | None = None) -> Answer:
        """The same from logits: log-probabilities of the `k` likeliest tokens, then of `tokens` `[row, m]`."""
        total, top = logits.logsumexp(-1, keepdim=True), logits.topk(k)
        wanted = [] if tokens is None else [logits.gather(-1, tokens) - total]
        return Answer(torch.cat([top.values - total, *wanted], 1), top.indices[:, 0], rows)

    @staticmethod
    def cat(answers: Sequence[Answer]) -> Answer:
        """Several answers about different rows as one."""
        tops = [answer.top for answer in answers if answer.top is not None]
        rows = [row for answer in answers for row in answer.rows or ()]
        return Answer(torch.cat([answer.values for answer in answers]), torch.cat(tops) if tops else None, rows)

    def compare(self, other: Answer) -> tuple[float, float]:
        """The largest difference from another answer, which may be about fewer rows, and how many rows have the same top token."""
        rows = slice(None) if other.rows is None else list(other.rows)
        values = self.values[rows]
        tops = (
            [values.flatten(1).argmax(-1), other.values.flatten(1).argmax(-1)]
            if self.top is None or other.top is None
            else [self.top[rows], other.top]
        )
        same = (tops[0] == tops[1]).flatten(1) if tops[0].dim() > 1 else (tops[0] == tops[1])[:, None]
        return float((values - other.values).abs().max()) if values.numel() else 0.0, float(same.all(-1).float().mean())


@dataclass(frozen=True)
class Way:
    """One way of doing the work: `run` does it for `items`, pieces that cost the same on average, out of `of` of them."""

    name: str
    run: Callable[[Any], Answer]
    items: Sequence[Any] = ()
    of: int = 0
    """How many there are in all; 0: as many as are measured."""

    @property
    def scale(self) -> float:
        """The time of the whole work over the time of what is measured."""
        return self.of / len(self.items) if self.of else 1.0

    def __str__(self) -> str:
        return self.name + (f" ({len(self.items)} of {self.of}, scaled)" if self.scale > 1 else "")


def spread(items: Sequence[Any], n: int) -> list[Any]:
    """`n` items evenly from the first to the last; their mean place is that of all items."""
    n = min(n, len(items))
    return [items[round(i * (len(items) - 1) / (n - 1))] for i in range(n)] if n > 1 else [items[len(items) // 2]]


@dataclass(frozen=True)
class Measured:
    """What the turns gave for one way."""

    seconds: float
    ratio: float
    """How many times as long as the first way."""
    difference: float
    same: float
    """The share of rows with the first way's top token."""
    gflops: float
    """Floating point operations in 1e9 a second; NaN if hookbook did not count."""
    share: float
    """The same as a share of the machine's peak."""


def measure(ways: Sequence[Way], models: Models, repeats: int) -> dict[str, Measured]:
    """Run ways in turns, `repeats` times, after the first has run once and the others have run one item each."""
    first = ways[0]
    for way in ways:
        way.run(way.items if way is first else way.items[:1])
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    worst = {way.name: (0.0, 1.0) for way in ways}
    flops = {way.name: math.nan for way in ways}
    fastest = peak()
    for _ in range(repeats):
        reference = None
        for way in ways:
            start = time.perf_counter()
            answer = way.run(way.items)
            seconds[way.name].append((time.perf_counter() - start) * way.scale)
            reference = answer if reference is None else reference
            difference, same = reference.compare(answer)
            worst[way.name] = (max(worst[way.name][0], difference), min(worst[way.name][1], same))
            if answer.cost:
                flops[way.name] = operations(models.bridge, answer.cost)
            del answer
        fastest = max(fastest, peak())
    found = {}
    for name, took in seconds.items():
        median = statistics.median(took)
        ratio = statistics.median(t / base for t, base in zip(took, seconds[first.name], strict=True))
        found[name] = Measured(median, ratio, *worst[name], flops[name] / median / 1e9, flops[name] / median / fastest)
    return found


def operations(adapter: hb.Adapter, cost: Mapping[str, int]) -> float:
    """Floating point operations in matrices of weights; see the top of this file."""
    block = next(adapter.model.blocks.children())
    weights = sum(parameter.numel() for parameter in block.parameters() if parameter.dim() == 2)
    return 2.0 * weights * cost["token_layers"] + 2.0 * adapter.card.d_model * adapter.card.d_vocab * cost["unembedded"]


def peak(size: int = 2048, times: int = 5) -> float:
    """Floating point operations a second in the fastest of several products of two matrices in float32."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    took = []
    for _ in range(times):
        start = time.perf_counter()
        torch.mm(a, b)
        took.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(took)


def show(title: str, ways: Sequence[Way], found: Mapping[str, Measured], repeats: int, unit: str) -> None:
    """Print a table of ways."""
    print(f"\n{title}; {torch.get_num_threads()} threads, median of {repeats}")
    header = (
        f"{'way':72s} {'seconds':>9s} {'ratio':>7s} {f'max |d {unit}|' if unit else '':>15s} "
        f"{'same top-1':>11s} {'GFLOP/s':>8s} {'of peak':>8s}"
    )
    print(header)
    for way in ways:
        m = found[way.name]
        counted = "" if math.isnan(m.gflops) else f"{m.gflops:8.1f} {m.share:8.0%}"
        difference = f"{m.difference:.1e}" if unit else ""
        print(f"{way!s:72s} {m.seconds:9.3f} {m.ratio:7.2f} {difference:>15s} {m.same:11.3f} {counted}".rstrip(), flush=True)


@dataclass(frozen=True)
class Claim:
    """A number that a benchmark measured, and what it should be."""

    what: str
    value: float
    target: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        """Whether it is."""
        return self.value <= self.target if self.at_most else self.value >= self.target

    def __str__(self) -> str:
        return (
            f"{self.what:100s} {self.value:9.3f}   target {'<=' if self.at_most else '>='} {self.target:6.2f}   "
            f"{'ok' if self.holds else 'MISSED'}"
        )


Bench = Callable[[Models, int], list[Claim]]
"""A benchmark of one model, in some turns."""


def compare(
    title: str,
    ways: Sequence[Way],
    models: Models,
    repeats: int,
    target: Mapping[str, float],
    *,
    at_most: bool = False,
    share: float = 0,
    unit: str = "logit",
) -> list[Claim]:
    """Measure and print ways.

    Args:
        title: What the work is.
        ways: Hookbook's first.
        models: The models.
        repeats: How many turns.
        target: For names of ways, what their ratio should be at least.
        at_most: `target` says instead what the first way's time over theirs should be at most.
        share: The share of the machine's peak that the first way should reach; 0: not claimed.
        unit: What the answers' numbers are; empty if they are tokens only.
    """
    found = measure(ways, models, repeats)
    show(f"{models.name}: {title}", ways, found, repeats, unit)
    ours = ways[0].name
    if at_most:
        claims = [Claim(f"{ours} / {name}", 1 / found[name].ratio, value, at_most) for name, value in target.items()]
    else:
        claims = [Claim(f"{name} / {ours}", found[name].ratio, value) for name, value in target.items()]
    if share:
        claims.append(Claim("share of the machine's peak", found[ways[0].name].share, share))
    return [*claims, Claim("share of rows with the same top token in all ways", min(m.same for m in found.values()), 0.99)]


def main(benches: Mapping[str, Bench]) -> None:
    """The command line of one benchmark, or of several, which can be named or lettered."""
    letters: dict[str, str] = dict(zip("abcdefghijklmnopqrstuvwxyz", benches, strict=False))
    parser = argparse.ArgumentParser(description=(sys.modules["__main__"].__doc__ or "").splitlines()[0])
    if len(benches) > 1:
        parser.add_argument(
            "which", nargs="*", metavar="benchmark", help=", ".join(f"{letter} or {name}" for letter, name in letters.items())
        )
    parser.add_argument("--models", nargs="+", default=list(PACKAGES))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    named: list[str] = getattr(args, "which", [])
    chosen = [letters.get(name, name) for name in named] or list(benches)
    if unknown := set(chosen) - set(benches):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(benches)}")
    summary = []
    for model in args.models:
        models = Models(model)
        summary += [f"{model:22s} {name:12s} {claim}" for name in chosen for claim in benches[name](models, args.repeats)]
    print("\n" + "\n".join(summary))
