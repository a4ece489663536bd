"""Steering by a feature of a sparse autoencoder: clamped to some values, beside nothing and a random feature pushed as far."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch

from hookbook.errors import EditError
from hookbook.recipe import recipe
from hookbook.recipes.steering.steering import Steering, check_strengths, steered
from hookbook.request import Scope
from hookbook.sae import AttachedSAE, checked
from hookbook.sae.saelens import directions
from hookbook.tokens import Position


@recipe
def steer_feature(
    sae: AttachedSAE,
    feature: int,
    prompts: str | Sequence[str],
    *,
    to: Sequence[float] | None = None,
    times_max: Sequence[float] | None = None,
    tokens: tuple[Sequence[str | int], Sequence[str | int]] | None = None,
    score: Callable[[Sequence[str]], float] | None = None,
    generate: int = 0,
    keep_error: bool = True,
    position: Position | None = None,
    scope: Scope = "all",
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Steering:
    """Clamp a feature, active or not, and score what the model then says; all in one forked pass.

    Args:
        sae: What `hookbook.sae.attach` gave.
        feature: Which.
        prompts: A prompt, or a list of `n` prompts.
        to: Values it is clamped to.
        times_max: Or multiples of its largest activation (the SAE's `maxima`).
        tokens, score, generate: What is scored, see `hookbook.steer`.
        keep_error: Whether what the SAE does not reconstruct stays.
        position: Of the prompt's tokens; None: every one but a beginning-of-sequence token.
        scope: See `hookbook.request.Edit`; the default is the prompt and what is generated.
        seed: Of the random feature: one of those with an activation on the texts that `maxima` are of, or of all. It is clamped to the
            value whose decoder row has the same length.
        progress, checkpoint: See `hookbook.generate`.

    Returns:
        `Steering`: of the SAE's site, by the values the feature is clamped to (`strengths`), beside no clamp and the random feature
        (`settings["random_feature"]`).

    Raises:
        EditError: Neither or both of `to` and `times_max`, or no such feature.
        DataError, TokenError: As `hookbook.steer`.

    Source: clamping with the error term kept as in Templeton et al. 2024 (Scaling Monosemanticity, "Influence on behavior"), who clamp to
    multiples of the maximum.

    Differs: the random feature that is pushed as far is ours.
    """
    sae = checked(sae)
    if (to is None) == (times_max is None):
        raise EditError(
            "to and times_max" if to is not None else "no values", "one of them says how far", "give to=[...] or times_max=[...]"
        )
    norms = directions(sae.sae).norm(dim=-1).cpu()
    sae.edit(feature, to=0)  # raises if there is none
    live = torch.ones(sae.n_features, dtype=torch.bool) if sae.maxima is None else sae.maxima > 0
    live[feature] = False
    others = live.nonzero()[:, 0]
    if not len(others):
        raise EditError("a random feature", "none but this one is ever active", "attach the SAE with the maxima of more texts")
    other = int(others[torch.randint(len(others), (), generator=torch.Generator().manual_seed(seed))])
    if times_max is None:
        values = check_strengths(to or ())
    else:
        shifts = [sae.edit(feature, times_max=c).value.shift for c in check_strengths(times_max)]  # pyright: ignore
        values = tuple(float(value) for shift in shifts for value in shift)
    ratio = float(norms[feature] / norms[other])
    edits = [
        (sae.edit(which, to=value * factor, keep_error=keep_error, position=position, scope=scope),)
        for which, factor in ((feature, 1.0), (other, ratio))
        for value in values
    ]
    settings = {"sae": sae.name, "random_feature": other}
    coded = sae.encode_prompts(prompts)
    return steered(sae.model, coded, (sae.out,), values, edits, tokens, score, generate, settings, progress, checkpoint)
