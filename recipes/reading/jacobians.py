"""Jacobians of one site with respect to others, all source layers from the same backward passes.

A source is a vector of zeros added to its site. One vector-Jacobian product for each output dimension then gives that
row of every source's Jacobian at once, for every prompt, instead of a set of products for each source layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hookbook.adapter import Adapter
from hookbook.asking import encode_prompts
from hookbook.engine import cost, planning
from hookbook.errors import EditError, TokenError
from hookbook.recipe import ModelCard, recipe, wrap
from hookbook.request import Each, Edit, Read, Request, Row, position_of
from hookbook.results import Axes, DataFrame, Result
from hookbook.show.plots import lines, site_labels
from hookbook.show.tidy import Over, tidy
from hookbook.tokens import Tokens, resolve

MOST = 128
"""How many output dimensions go through one backward pass at most; more is no faster."""


@dataclass(frozen=True, eq=False)
class Jacobian(Result):
    """The first-order map from source states to an output, and the point around which it holds."""

    card: ModelCard
    prompts: tuple[Tokens, ...]
    """`[n]`: the prompts as the model saw them."""
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
    settings: dict[str, Any]

    @property
    def norms(self) -> Tensor:
        """`[source, n]`, or `[source, 1]` of means: the Frobenius norm of each matrix."""
        return torch.stack([matrix.flatten(-2).norm(dim=-1).reshape(-1) for matrix in self.matrices])

    def to_frame(self) -> DataFrame:
        """One row for each source and prompt: `site`, `layer` (of the source), `prompt`, `position`, `matrix_norm` (of means, the mean's),
        `input_norm`, `product_norm` and `output_norm`."""
        at = [[resolve(position_of(read.position, n), prompt)[0] for n, prompt in enumerate(self.prompts)] for read in self.wrt]
        lengths = {
            f"{name}_norm": torch.stack([x.norm(dim=-1) for x in values])
            for name, values in (("input", self.inputs), ("product", self.products))
        }
        lengths |= {"matrix_norm": self.norms.expand(-1, len(self.prompts)), "output_norm": Over("prompt", self.output.norm(dim=-1))}
        return tidy({"site": [read.site for read in self.wrt], "prompt": self.prompts}, position=at, **lengths)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The norm of the matrix by source, the mean over prompts."""
        names, title = ("source", "Frobenius norm"), f"Jacobians of {self.of.site}, {self.card.model_id}"
        return lines(ax, {str(self.of.site): self.norms.mean(1)}, names, labels=site_labels([read.site for read in self.wrt]), title=title)


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

    Example:
        >>> from hookbook.testing import toy
        >>> found = jacobian(toy(), ["ab", "cd"], Read("resid_post.2"), [Read("resid_post.0"), Read("resid_post.1")])
        >>> [tuple(matrix.shape) for matrix in found.matrices]
        [(2, 16, 16), (2, 16, 16)]
    """
    adapter = wrap(model)
    prompts = encode_prompts(adapter, prompts)
    request = _request(adapter, prompts, of, wrt)
    parts = planning.plan(adapter, request, _answer_bytes(adapter, request, mean))
    found = _Gathered(adapter, request, mean)
    chunks = [_chunk(adapter, request, part, mean) for part in parts]
    if (account := cost.account()) is not None:
        back = (
            min(found.d_out, n) * _bytes_of_one(adapter, request, part) + part.peak_bytes for n, part in zip(chunks, parts, strict=True)
        )
        account.add([], peak_bytes=max(back) + found.nbytes)
    hidden = found.promised or not (len(parts) > 1 if progress is None else progress)
    with tqdm(total=len(parts) * found.d_out, desc="jacobian", leave=False, disable=hidden) as bar:
        for part, chunk in zip(parts, chunks, strict=True):
            rows = [row.number for row in part.rows]
            leaves = [adapter.leaf(len(rows), read.site.width(adapter.card)) for read in wrt]
            reply = adapter.run(_request(adapter, prompts, of, wrt, rows, leaves), progress=False)
            out, *states = (reading.values for reading in reply.readings)
            points = found.states(rows, out, states)
            del reply, states
            found.products_of(rows, adapter.vjps(out, leaves, points, chunk, mean, tick=bar.update, **found.into(rows)))
    return Jacobian(adapter.card, tuple(prompts), of, tuple(wrt), *found.whole(), settings={})


class _Gathered:
    """All prompts' numbers, part by part: written into what holds all of them, or, while they are promises, put together in the end.

    Args:
        adapter: The model.
        request: Of all prompts, whose reads are the output and the sources.
        mean: Whether of matrices only means over prompts are kept.
    """

    def __init__(self, adapter: Adapter, request: Request, mean: bool) -> None:
        self.promised = adapter.remote or cost.account() is not None
        self.n, self.mean, self.d_out, *widths = len(request.rows), mean, *(read.site.width(adapter.card) for read in request.reads)
        like: Any = {"dtype": getattr(torch, adapter.card.dtype), "device": "meta" if self.promised else "cpu"}
        self.ends = [torch.empty(self.n, width, **like) for width in (self.d_out, *widths)]
        self.matrices = [torch.zeros(*([] if mean else [self.n]), self.d_out, width, **like) for width in widths]
        self.products = [torch.empty(self.n, self.d_out, **like) for _ in widths]
        self.pieces: list[tuple[list[int], list[Tensor], list[Tensor]]] = []

    @property
    def nbytes(self) -> int:
        """How much memory all of it takes."""
        return sum(x.nbytes for x in (*self.ends, *self.matrices, *self.products))

    def states(self, rows: list[int], out: Tensor, states: list[Tensor]) -> list[Tensor]:
        """Keep the output and the sources' states of some prompts; the latter come back."""
        if self.promised:
            self.pieces.append((rows, [out, *states], []))
            return states
        for whole, x in zip(self.ends, (out, *states), strict=True):
            whole[rows] = x.detach().cpu()
        return [whole[rows] for whole in self.ends[1:]]

    def into(self, rows: list[int]) -> dict[str, Any]:
        """Where `Adapter.vjps` writes the matrices of some prompts."""
        return {} if self.promised else {"into": self.matrices, "rows": self.n if self.mean else rows}

    def products_of(self, rows: list[int], found: list[Tensor]) -> None:
        """Keep what `Adapter.vjps` gave of some prompts."""
        if self.promised:
            self.pieces[-1][2].extend(found)
            return
        for whole, x in zip(self.products, found[len(self.products) :], strict=True):
            whole[rows] = x

    def whole(self) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The output, the states, the matrices and the products of all prompts."""
        if self.promised:
            numbers, ends, found = zip(*self.pieces, strict=True)
            order, m = torch.argsort(torch.tensor([i for rows in numbers for i in rows])), len(self.products)
            columns = list(zip(*found, strict=True))
            self.ends, self.products = ([torch.cat(x)[order] for x in some] for some in (zip(*ends, strict=True), columns[m:]))
            self.matrices = [self._mean(x, numbers) if self.mean else torch.cat(x)[order] for x in columns[:m]]
        return self.ends[0], tuple(self.ends[1:]), tuple(self.matrices), tuple(self.products)

    def _mean(self, means: Sequence[Tensor], rows: Sequence[list[int]]) -> Tensor:
        return torch.stack([x * (len(some) / self.n) for x, some in zip(means, rows, strict=True)]).sum(0)


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
