"""The logit lens: what the final norm and the unembedding say about every layer's state.

It is the patchscope whose target is the source prompt itself and whose target layer is the last: the state skips every
block above it. It shows which tokens a state is already close to, not what later blocks would make of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from hookbook.loading import wrap
from hookbook.recipe import recipe
from hookbook.recipes.patchscopes import Patchscope, encode_prompts, patchscope
from hookbook.tokens import Position


@recipe
def logit_lens(
    model: Any,
    prompts: Any,
    *,
    layers: Any = "all",
    position: Position = -1,
    k: int = 5,
    tokens: Sequence[str | int] = (),
    bos: bool | None = None,
    chat: bool = False,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Patchscope:
    """Read states through the final norm and the unembedding.

    Args:
        model: Any model `hookbook.wrap` takes.
        prompts: A prompt, or a list of prompts.
        layers: `"all"`, a layer, a site, or a list; a bare layer is a block's output.
        position: The token to read: `-1` the last, an index, a text (its last token), or an `At`.
        k: How many of the likeliest tokens to keep.
        tokens: Tokens whose probability is wanted; see `hookbook.patchscope`.
        bos, chat: See `hookbook.tokens.encode`.
        progress, checkpoint: See `hookbook.patchscope`.

    Returns:
        A `Patchscope` with one pair for each layer; at the last layer its numbers are the model's own.

    Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; with the final norm.

    Example:
        >>> from hookbook.testing import toy
        >>> lens = logit_lens(toy(), "abc", k=1)
        >>> bool(lens.precision[0, -1])
        True
    """
    adapter = wrap(model)
    coded = encode_prompts(adapter, prompts, bos, chat)
    return patchscope(
        adapter,
        coded,
        target=coded,
        source_layers=layers,
        target_layers=-1,
        source_position=position,
        target_position=position,
        readout_position=position,
        k=k,
        tokens=tokens,
        bos=bos,
        chat=chat,
        progress=progress,
        checkpoint=checkpoint,
    )
