"""The attribute lens: what a relation's map reads from any state, whether or not the model goes on to say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hookbook.asking import encode_prompts
from hookbook.models.loading import wrap
from hookbook.recipe import recipe
from hookbook.recipes.reading.patchscopes import Patchscope, patchscope
from hookbook.recipes.relations.linear_relations import LinearRelation
from hookbook.tokens import Position


@recipe
def attribute_lens(
    model: Any,
    relation: LinearRelation,
    prompts: Any,
    *,
    layers: Any = None,
    position: Position = -1,
    k: int = 5,
    tokens: Sequence[str | int] = (),
    bos: bool | None = None,
    progress: bool | None = None,
) -> Patchscope:
    """What a relation's map reads from any state of any prompt: the attribute, whether or not the model goes on to say it.

    Args:
        model: The model that the relation is of.
        relation: What `linear_relation` returned.
        prompts: A prompt, or a list of prompts.
        layers: Those of the relation's layers to read; None: all.
        position: The token to read: `-1` the last, an index, a text (its last token), or an `At`.
        k: How many of the likeliest tokens to keep.
        tokens: Tokens whose probability is wanted, as they would follow the token that is read; usually with a leading space.
        bos: See `hookbook.tokens.encode`.
        progress: Show a progress bar; None: for long work only.

    Returns:
        A `Patchscope` whose map is `beta W s + b` and whose target is the last layer of the prompt itself. `hookbook.logit_lens` is its
        control.

    Raises:
        EditError: The relation is of another model.
        SiteError, TokenError: It has no such layer; or the position is not in a prompt.

    Source: Hernandez et al. 2023, arXiv:2308.09124, section 6.

    Differs: any prompts and the likeliest objects of each, where the paper counts recall over prompts that distract.
    """
    adapter = wrap(model)
    relation.check_model(adapter.card)
    sites = relation.chosen(layers)
    maps = {site: relation.affine(site) for site in sites}
    prompts = encode_prompts(adapter, prompts, bos)
    return patchscope(
        adapter,
        prompts,
        target=prompts,
        source_layers=sites,
        target_layers=-1,
        source_position=position,
        target_position=position,
        readout_position=position,
        map=lambda x, read, write: maps[read](x, read, write),
        k=k,
        tokens=tokens,
        bos=bos,
        progress=progress,
    )
