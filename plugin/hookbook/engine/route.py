"""The route of a climb through a stack of torch modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from hookbook.travel.climb import Climb, Stop, enter


@contextmanager
def routed(blocks: Sequence[nn.Module], climb: Climb) -> Iterator[list[Any]]:
    """Hooks that take a climb through `blocks`; all are gone afterwards, also when the pass raised.

    Args:
        blocks: The stack. Each block takes the stream first, or as `hidden_states`, and returns it, alone or in a tuple.
        climb: What to do at each boundary. `Stop` is raised at the last one; the caller catches it.

    Yields:
        A list for the caller's own handles, which are removed with the others.
    """

    def before(layer: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            found = enter(climb, layer, args, kwargs)
            if layer == climb.last:
                raise Stop
            return found

        return hook

    def above(module: nn.Module, args: tuple, output: Any) -> None:
        climb.boundary(len(blocks), output[0] if isinstance(output, tuple) else output)
        raise Stop

    handles: list[Any] = []
    try:
        for layer in range(min(climb.last + 1, len(blocks))):
            handles.append(blocks[layer].register_forward_pre_hook(before(layer), with_kwargs=True))
        if climb.last == len(blocks):
            handles.append(blocks[-1].register_forward_hook(above))
        yield handles
    finally:
        for handle in handles:
            handle.remove()
