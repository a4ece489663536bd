"""Jacobians of one site with respect to others, all source layers from the same backward passes.

A source is a vector of zeros added to its site. One vector-Jacobian product for each output dimension then gives that
row of every source's Jacobian at once, for every prompt, instead of a set of products for each source layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hookbook.engine import planning
from hookbook.errors import EditError, TokenError
from hookbook.models.loading import wrap
from hookbook.recipe import recipe
from hookbook.request import Each, Edit, Read, Request, Row, position_of
from hookbook.tokens import Tokens, resolve
from hookbook.travel.vjps import vjps

if TYPE_CHECKING:
    from hookbook.adapter import Adapter

MOST = 128
"""How many output dimensions go through one backward pass at most; more is no faster."""


@dataclass(frozen=True, eq=False)
class Jacobian:
    """The first-order map from source states to an output, and the point around which it holds."""

    of: Read
    wrt: tuple[Read, ...]
    output: Tensor
    """`[n, d_out]`: the output of each of `n` prompts."""
    inputs: tuple[Tensor, ...]
    """For each source `[n, d_in]`: its state in each prompt."""
    matrices: tuple[Tensor, ...]
    """For each source `[n, d_out, d_in]`; the mean over prompts, `[d_out, d_in]`, if that was asked for."""
    products: tuple[Tensor, ...]
    """For each source `[n, d_out]`: the matrix of each prompt, also where only their mean is kept, times the source's state there."""


@recipe
def jacobian(
    model: Any, prompts: Sequence[Any], of: Read, wrt: Sequence[Read], *, mean: bool = False, progress: bool | None = None
) -> Jacobian:
    """The Jacobian of `of` with respect to each of `wrt`, at every prompt.

    Args:
        model: Any model `hookbook.wrap` takes whose backend keeps gradients.
        prompts: The prompts (texts, or see `hookbook.tokens.encode`).
        of: The output: a site and a position, or an `Each` of them.
        wrt: The sources, likewise; none may be after the output.
        mean: Only the mean over prompts of each matrix, which is held once.
        progress: Show a progress bar; None: for long work only.

    Returns:
        A `Jacobian` on the CPU, in the dtype of the model.

    Raises:
        EditError: A source is above the output, or after its token.
        TokenError: A position is several tokens.
        Refused: The backend cannot read or edit a site, or keeps no gradients.

    Source: the derivative that Hernandez et al. 2023, arXiv:2308.09124, section 2.2, take of a relation's output, here of any site.

    Differs: nothing is averaged unless `mean` asks for it, and all sources share their backward passes.
    """
    adapter = wrap(model)
    prompts = [adapter.encode(prompt) for prompt in prompts]
    request = _request(adapter, prompts, of, wrt)
    card, parts = adapter.card, planning.plan(adapter, request, _answer_bytes(adapter, request, mean))
    d_out = of.site.width(card)
    lead = [] if mean else [len(prompts)]
    output = torch.empty(len(prompts), d_out, dtype=getattr(torch, card.dtype))
    inputs = [torch.empty(len(prompts), read.site.width(card), dtype=output.dtype) for read in wrt]
    matrices = [torch.zeros(*lead, d_out, read.site.width(card), dtype=output.dtype) for read in wrt]
    products = [torch.zeros_like(output) for _ in wrt]
    if (account := planning.account()) is not None:
        back = [
            part.peak_bytes + min(d_out, _chunk(adapter, request, part, mean)) * _bytes_of_one(adapter, request, part) for part in parts
        ]
        kept = sum(tensor.nbytes for tensor in (output, *inputs, *matrices, *products))
        account.add([] if adapter.remote else parts, vjps=len(prompts) * d_out, peak_bytes=max(back) + kept)
    if account is not None and not adapter.remote:
        return Jacobian(of, tuple(wrt), output.zero_(), tuple(x.zero_() for x in inputs), tuple(matrices), tuple(products))
    if adapter.remote:
        return _remote(adapter, request, parts, mean)
    with tqdm(
        total=len(parts) * d_out, desc="jacobian", leave=False, disable=not (len(parts) > 1 if progress is None else progress)
    ) as bar:
        for part in parts:
            rows = [row.number for row in part.rows]
            leaves = [torch.zeros(len(rows), read.site.width(card), dtype=output.dtype, requires_grad=True) for read in wrt]
            reply = adapter.run(_request(adapter, prompts, of, wrt, rows, leaves), progress=False)
            out, *states = (reading.values for reading in reply.readings)
            output[rows] = out.detach().cpu()
            for held, state in zip(inputs, states, strict=True):
                held[rows] = state.detach().cpu()
            del reply, states
            points, all_rows = [held[rows] for held in inputs], len(prompts) if mean else rows
            found = vjps(out, leaves, points, _chunk(adapter, request, part, mean), mean, bar.update, matrices, all_rows)
            for held, product in zip(products, found[len(wrt) :], strict=True):
                held[rows] = product
    return Jacobian(of, tuple(wrt), output, tuple(inputs), tuple(matrices), tuple(products))


def _remote(adapter: Any, request: Request, parts: Sequence[planning.Part], mean: bool) -> Jacobian:
    """The same beside the model, of which only promises come back."""
    of, *wrt = request.reads
    order = torch.argsort(torch.tensor([row.number for part in parts for row in part.rows]))
    outputs, inputs, matrices, products = [], [], [], []
    for part in parts:
        rows = [row.number for row in part.rows]
        leaves = [adapter.leaf(len(rows), read.site.width(adapter.card)) for read in wrt]
        reply = adapter.run(_request(adapter, request.prompts, of, wrt, rows, leaves), progress=False)
        out, *states = (reading.values for reading in reply.readings)
        found = adapter.vjps(out, leaves, states, _chunk(adapter, request, part, mean), mean)
        products.append(found[len(wrt) :])
        outputs.append(out)
        inputs.append(states)
        matrices.append([matrix * (len(rows) / len(request.prompts)) for matrix in found[: len(wrt)]] if mean else found[: len(wrt)])
    several = [torch.stack(pieces).sum(0) if mean else torch.cat(pieces)[order] for pieces in zip(*matrices, strict=True)]
    points, products = (tuple(torch.cat(pieces)[order] for pieces in zip(*some, strict=True)) for some in (inputs, products))
    return Jacobian(of, tuple(wrt), torch.cat(outputs)[order], points, tuple(several), products)


def _bytes_of_one(adapter: Adapter, request: Request, part: planning.Part) -> int:
    """About how much memory one output dimension takes on its way back."""
    card, width, rows = adapter.card, part.n - part.split, len(part.rows)
    per_token = 6 * card.d_model + 4 * card.d_mlp + 4 * (card.n_heads + card.n_kv_heads) * card.d_head
    numbers = width * per_token + 2 * card.n_heads * width * part.n + 3 * card.n_kv_heads * card.d_head * part.n
    return rows * (numbers + sum(read.site.width(card) for read in request.reads)) * card.itemsize


def _answer_bytes(adapter: Adapter, request: Request, mean: bool) -> int:
    """How much memory the matrices take."""
    of, *wrt = request.reads
    numbers = of.site.width(adapter.card) * sum(read.site.width(adapter.card) for read in wrt)
    return numbers * (1 if mean else len(request.rows)) * adapter.card.itemsize


def _chunk(adapter: Adapter, request: Request, part: planning.Part, mean: bool) -> int:
    """How many output dimensions go through one backward pass, so that it fits the byte budget beside the graph."""
    kept = _answer_bytes(adapter, request, mean)
    return max(1, min(MOST, (planning.BUDGET_BYTES - kept - part.peak_bytes) // _bytes_of_one(adapter, request, part)))


def _request(
    adapter: Adapter,
    prompts: Sequence[Tokens],
    of: Read,
    wrt: Sequence[Read],
    rows: Sequence[int] | None = None,
    leaves: Sequence[Tensor] | None = None,
) -> Request:
    if not prompts or not wrt:
        raise EditError("a Jacobian without prompts or sources", "there is nothing to differentiate", "give at least one of each")
    rows = range(len(prompts)) if rows is None else rows
    edits: list[list[Edit]] = [[] for _ in rows]
    for k, read in enumerate(wrt):
        if read.site.order > of.site.order:
            raise EditError(
                f"the Jacobian of {of.site} with respect to {read.site}", "the source is above the output", "give an earlier source"
            )
        for at, i in enumerate(rows):
            positions = [resolve(position_of(r.position, i), prompts[i]) for r in (read, of)]
            if any(len(p) != 1 for p in positions):
                raise TokenError("a Jacobian at several tokens", "it is from one state to one", "give one position each")
            if positions[0] > positions[1]:
                raise EditError(
                    f"the Jacobian at token {positions[1][0]} with respect to token {positions[0][0]}",
                    "tokens see only those before them",
                    "give an earlier source",
                )
            value = torch.zeros(read.site.width(adapter.card)) if leaves is None else leaves[k][at]
            edits[at].append(Edit(read.site, value, "add", positions[0][0]))

    def cut(read: Read) -> Read:
        return replace(read, position=Each(tuple(position_of(read.position, i) for i in rows)))

    return Request(
        [prompts[i] for i in rows], [Row(at, tuple(e)) for at, e in enumerate(edits)], [cut(read) for read in (of, *wrt)], grad=True
    )
