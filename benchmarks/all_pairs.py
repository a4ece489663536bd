"""Every (source layer, target layer) pair of a token-identity patchscope: one climb against what people run today.

    python benchmarks/all_pairs.py [--models gemma-3-270m smollm2-135m-instruct] [--repeats 3]

All ways run the same pairs on the same machine in turns and end with the logits of the target's last token, which are
compared. Give the machine nothing else to do: ratios on a busy machine mean little.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import hookbook as hb
from hookbook.packages import PACKAGES
from hookbook.request import Edit, Read, Readout, Request, Row
from hookbook.sites import Site

SOURCE = "The Eiffel Tower is located in the city of"


def timed(run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    out = run()
    return time.perf_counter() - start, out


def climb(adapter: hb.Adapter, states: torch.Tensor, target: list[int]) -> torch.Tensor:
    n = len(states)
    rows = [Row(0, (Edit(Site("resid_post", layer), state, "set"),)) for layer in range(n) for state in states]
    reply = adapter.run(Request([adapter.encode(target)], rows, (), Readout(logits=True)), progress=False)
    assert reply.readout is not None and reply.readout.logits is not None
    return reply.readout.logits


@torch.no_grad()
def batch_per_layer(adapter: hb.Adapter, states: torch.Tensor, target: list[int]) -> torch.Tensor:
    tokens = torch.tensor([target]).expand(len(states), -1)

    def patch(x: torch.Tensor, hook: object) -> torch.Tensor:
        x[:, -1] = states
        return x

    # logits_to_keep spares the baseline the logits of all other tokens, which TransformerLens computes by default
    return torch.cat(
        [adapter.model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", patch)], logits_to_keep=1)[:, -1] for layer in range(len(states))]
    )


@torch.no_grad()
def run_per_pair(adapter: hb.Adapter, states: torch.Tensor, target: list[int], pairs: list[tuple[int, int]]) -> torch.Tensor:
    tokens, out = torch.tensor([target]), []
    for layer, source in pairs:

        def patch(x: torch.Tensor, hook: object, source: int = source) -> torch.Tensor:
            x[:, -1] = states[source]
            return x

        out.append(adapter.model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.hook_resid_post", patch)], logits_to_keep=1)[:, -1])
    return torch.cat(out)


def bench(name: str, repeats: int) -> None:
    bridge = hb.load(name, "transformer_lens", device="cpu")
    nnsight = hb.load(name, "nnsight", device="cpu")
    n = bridge.card.n_layers
    target = list(bridge.encode(hb.prompts.TOKEN_IDENTITY.text).ids)
    reads = [Read(Site("resid_post", layer)) for layer in range(n)]
    states = torch.cat([r.values for r in bridge.run(Request([bridge.encode(SOURCE)], [Row(0)], reads)).readings])
    sample = [(i * n // 12, (i * 7 + 3) % n) for i in range(12)]
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "one climb, TransformerLens bridge": lambda: climb(bridge, states, target),
        "one climb, nnsight": lambda: climb(nnsight, states, target),
        "one batch per target layer, TransformerLens hooks": lambda: batch_per_layer(bridge, states, target),
        f"one run per pair, TransformerLens hooks ({len(sample)} pairs, scaled)": lambda: run_per_pair(bridge, states, target, sample),
    }
    first = list(ways)[0]
    for adapter in (bridge, nnsight):  # warm up
        climb(adapter, states, target)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    worst = dict.fromkeys(ways, 0.0)
    agree = dict.fromkeys(ways, 1.0)
    for _ in range(repeats):
        reference = None
        for way, run in ways.items():
            took, out = timed(run)
            scaled = "scaled" in way
            seconds[way].append(took * n * n / len(sample) if scaled else took)
            reference = out if reference is None else reference
            same = reference[[layer * n + source for layer, source in sample]] if scaled else reference
            worst[way] = max(worst[way], float((same - out).abs().max()))
            agree[way] = min(agree[way], float((same.argmax(-1) == out.argmax(-1)).float().mean()))
            del out
    print(f"\n{name}: {n} x {n} = {n * n} pairs, target of {len(target)} tokens, {torch.get_num_threads()} threads, median of {repeats}")
    print(f"{'way':70s} {'seconds':>9s} {'times one climb':>16s} {'max |d logit|':>14s} {'same top-1':>11s}")
    for way, took in seconds.items():
        ratio = statistics.median(t / base for t, base in zip(took, seconds[first], strict=True))
        print(f"{way:70s} {statistics.median(took):9.2f} {ratio:16.2f} {worst[way]:14.1e} {agree[way]:11.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=list(PACKAGES))
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for name in args.models:
        bench(name, args.repeats)


if __name__ == "__main__":
    main()
