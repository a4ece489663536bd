"""A plain pass with fused attention and with the model's own eager one, by length: from where on the first is worth it.

Both are the same call; only the number of keys from which passes are fused differs. Both end with the logits of the last token.
"""

from __future__ import annotations

from common import Answer, Claim, Models, Way, compare, main
from long_prompts import long_prompt

import hookbook as hb
from hookbook.engine import planning
from hookbook.request import Readout, Request, Row
from hookbook.tokens import Tokens

LENGTHS = (32, 362, 1446)
NEVER = 1 << 30
TARGETS = {("smollm2-135m-instruct", 1446): 2.0, ("gemma-3-270m", 1446): 1.2}


def one_pass(adapter: hb.Adapter, prompt: Tokens, keys: int) -> Answer:
    """Without edits."""
    before, planning.FUSED_FROM = planning.FUSED_FROM, keys
    try:
        return Answer.of(adapter.run(Request([prompt], [Row(0)], (), Readout(logits=True)), progress=False))
    finally:
        planning.FUSED_FROM = before


def bench(models: Models, repeats: int) -> list[Claim]:
    """On both backends, at each length."""
    claims = []
    for n in LENGTHS:
        prompt = long_prompt(models.bridge, n)
        ways = [
            Way(f"{kind}, {name}", lambda _, adapter=adapter, keys=keys, prompt=prompt: one_pass(adapter, prompt, keys))
            for name, adapter in (("TransformerLens bridge", models.bridge), ("nnsight", models.nnsight))
            for kind, keys in (("fused", 1), ("eager", NEVER))
        ]
        goal = {"eager, TransformerLens bridge": TARGETS.get((models.name, n), 0.0)}
        claims += compare(f"one pass of {len(prompt)} tokens", ways, models, repeats, goal)
    return claims


if __name__ == "__main__":
    main({"fused": bench})
