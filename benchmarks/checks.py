"""What looking at the model before each run costs (docs/explanation/what-is-checked.md): beside the same calls without it.

All pairs of layers of one prompt should take at most 1.01 times as long; one call on a wrapped model at most 5 ms more, whatever it asks. A
fingerprint of all weights, which is taken once, is compared with SHA-256 of the same bytes.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

from common import Answer, Claim, Models, Way, compare, main

import hookbook as hb
from hookbook.engine import state
from hookbook.engine.weights import digests
from hookbook.request import Readout, Request, Row


@contextmanager
def blind() -> Iterator[None]:
    """Models are not looked at."""
    kept, state.look = state.look, lambda *args, **more: None
    try:
        yield
    finally:
        state.look = kept


def all_pairs(adapter: hb.Adapter) -> Answer:
    """Every source layer into every target layer."""
    found = hb.patchscope(adapter, "The Eiffel Tower is in", target_layers="all", k=1, progress=False)
    return Answer(found.logprobs.flatten(0, 1))


def bench(models: Models, repeats: int) -> list[Claim]:
    """A sweep, a call, a fingerprint."""
    claims = []
    for backend in ("bridge", "nnsight"):
        adapter: hb.Adapter = getattr(models, backend)

        def unseen(_: object, adapter: hb.Adapter = adapter) -> Answer:
            with blind():
                return all_pairs(adapter)

        ways = [Way(f"all pairs, {backend}", lambda _, adapter=adapter: all_pairs(adapter)), Way("without looking", unseen)]
        claims += compare("all pairs, looked at", ways, models, repeats, {"without looking": 1.01}, at_most=True)
        request = Request([adapter.encode("A")], [Row(0)], (), Readout(k=1))
        adapter.run(request)
        more = []
        for _ in range(20 * repeats):
            began = time.perf_counter()
            adapter.look()
            more.append(1e3 * (time.perf_counter() - began))
        claims.append(Claim(f"{models.name}, {backend}: looking once, ms", statistics.median(more), 5.0, at_most=True))
    began = time.perf_counter()
    digests(models.nnsight.weights())
    taken = time.perf_counter() - began
    began = time.perf_counter()
    hashed = hashlib.sha256()
    for _, x, _ in models.nnsight.weights():
        hashed.update(x.detach().contiguous().numpy().tobytes())
    beside = time.perf_counter() - began
    print(f"\n{models.name}: a fingerprint in float32 and bfloat16 {taken:.2f} s; SHA-256 of the float32 alone {beside:.2f} s")
    return claims


if __name__ == "__main__":
    main({"checks": bench})
