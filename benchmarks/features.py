"""Every feature of an SAE set to one value at one prompt's last token: `hb.feature_sweep`, or SAELens' hooks, one run for each feature.

The SAE is the one that ships, 4,096 features of Gemma 3 270M. Both keep what the SAE does not reconstruct, and end with the
log-probability of the answer and the likeliest token; hookbook's also gives the divergence from the plain run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from common import Answer, Claim, Models, Way, compare, main, spread
from torch import Tensor

import hookbook as hb

PROMPT, ANSWER, VALUE = "The capital of France is the city of", " Paris", 500.0


def sweep(models: Models, sae: Any) -> Answer:
    """All features as forks of one climb."""
    found = hb.feature_sweep(hb.sae.attach(models.bridge, sae), PROMPT, strengths=[VALUE], tokens=[ANSWER], progress=False)
    return Answer(found.logprobs[:, 0], found.token_ids[:, 0, 0], cost=found.settings["cost"])


@cache
def spliced(models: Models) -> Any:
    """SAELens' bridge with the SAE in it, and its error term."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    bridge: Any = hb.load(models.name, "transformer_lens", device="cpu").model
    bridge.__class__ = SAETransformerBridge  # what SAELens' boot_transformers does
    bridge._acts_to_saes, bridge._transcoder_output_hooks = {}, {}
    bridge.add_sae(hb.sae.demo(), use_error_term=True)
    return bridge


def one_by_one(models: Models, features: Sequence[int]) -> Answer:
    """SAELens: a run for each feature, with a hook on the activations."""
    bridge, (sae,) = spliced(models), spliced(models).acts_to_saes.values()
    ids = torch.tensor([models.bridge.encode(PROMPT).ids])
    answer = torch.tensor([[models.bridge.encode("x" + ANSWER).ids[-1]]])
    name, parts = bridge.get_sae_hook_name(sae), []
    with torch.no_grad():
        for feature in features:

            def clamp(acts: Tensor, hook: Any, feature: int = feature) -> Tensor:
                acts[:, -1, feature] = VALUE
                return acts

            logits = bridge.run_with_hooks(ids, fwd_hooks=[(name, clamp)], logits_to_keep=1)[:, -1]
            parts.append(Answer.from_logits(logits, range(feature, feature + 1), 1, answer))
    found = Answer.cat(parts)
    return Answer(found.values[:, -1:], found.top, found.rows)


def bench(models: Models, repeats: int) -> list[Claim]:
    """The sweep, and SAELens for some features."""
    if models.name != "gemma-3-270m":
        print("features: no SAE ships for this model")
        return []
    sae = hb.sae.demo()
    features = range(sae.cfg.d_sae)
    ways = [
        Way("hb.feature_sweep", lambda _: sweep(models, sae)),
        Way("SAELens hooks, one run per feature", partial(one_by_one, models), spread(features, 24), len(features)),
    ]
    return compare(f"{len(features)} features x 1 value, one prompt", ways, models, repeats, {}, unit="logprob")


if __name__ == "__main__":
    main({"features": bench})
