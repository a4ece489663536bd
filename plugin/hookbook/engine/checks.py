"""What can be known to be wrong with a request before it runs, and its rows with their positions looked up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookbook.deferred import hold
from hookbook.engine.seam import Backend
from hookbook.errors import EditError, TokenError, check_counts
from hookbook.request import Each, Edit, FeatureChange, Request, Sampling, position_of
from hookbook.sites import Site
from hookbook.tokens import Position, Tokens, resolve
from hookbook.travel.layout import NEVER

if TYPE_CHECKING:
    from hookbook.card import ModelCard

Place = tuple[int, int]


def join_place(site: Site) -> Place:
    """Where a site is in the pass, and so where a row that is first edited there leaves: boundary, and 0 or 1 for before or after it is
    crossed."""
    if site.layer is None:
        return (-1, 0)
    return (site.layer + 1, 0) if site.name == "resid_post" else (site.layer, 1)


@dataclass
class PlannedRow:
    """A row with its positions resolved to the row's own tokens."""

    number: int
    """Its place in the request."""
    prompt: int
    edits: list[tuple[Edit, list[int]]]
    """What acts on the prompt's tokens below the final norm."""
    finals: list[tuple[Edit, list[int]]]
    """What acts on them after the final norm."""
    late: list[Edit]
    """What acts on generated tokens."""
    reads: list[list[int]]
    """Positions of each of the request's reads."""
    says: int | None
    """The token after which the readout is."""

    join: Place = NEVER
    """Where it leaves the trunk."""
    first: int | None = None
    """The first token that is edited."""
    numbers: int = 0
    """How many numbers are read of it."""

    def settle(self, widths: Sequence[int]) -> None:
        """Fill in what follows from its edits and reads; `widths` are those of the request's reads."""
        self.join = min([join_place(site) for edit, _ in self.edits for site in edit.touches], default=NEVER)
        self.first = min([p for _, positions in self.edits for p in positions], default=None)
        self.numbers = sum(len(positions) * width for positions, width in zip(self.reads, widths, strict=True))


def check(backend: Backend, request: Request) -> list[PlannedRow]:
    """Raise for what can be known to be wrong; return the rows with their positions resolved."""
    card, ask = backend.card, request.readout
    if not request.rows:
        raise EditError("a request without rows", "there is nothing to run", "give at least one row")
    check_counts(0, generate=request.generate)
    if ask is not None:
        check_counts(0, k=ask.k)
    if request.sampling is not None and not isinstance(request.sampling, Sampling):
        raise TokenError(f"sampling={request.sampling!r}", "", "give hb.Sampling(seed=0)")
    if request.sampling is not None and not request.generate:
        raise TokenError("sampling without generate", "nothing is drawn", "say how many tokens to generate")
    if request.grad and request.generate:
        raise EditError("gradients through generated tokens", "a chosen token has no derivative", "give the tokens as part of the prompt")
    _check_wanted(request, card)
    for tokens in request.prompts:
        if max(tokens.ids) >= card.d_vocab:
            raise TokenError(f"token id {max(tokens.ids)}", f"this model has ids 0 to {card.d_vocab - 1}", "use a tokenizer of this model")
        if card.n_ctx and len(tokens) + request.generate > card.n_ctx:
            raise TokenError(
                f"{len(tokens)} tokens and {request.generate} to decode",
                f"this model reads at most {card.n_ctx}",
                "shorten the prompt or decode less",
            )
    for read in [*request.reads, *([ask] if ask is not None else [])]:
        if isinstance(read.position, Each) and len(read.position.positions) != len(request.rows):
            raise TokenError(
                f"{len(read.position.positions)} positions for {len(request.rows)} rows",
                "Each has one for every row",
                "make the numbers agree",
            )
    sites = {read.site for read in request.reads}
    top = (float("inf"), 0) if ask is not None or request.generate else max((site.order for site in sites), default=(-2, 0))
    resolved, widths = _resolver(request.prompts), [read.site.width(card) for read in request.reads]
    rows = []
    for i, row in enumerate(request.rows):
        if not 0 <= row.prompt < len(request.prompts):
            raise EditError(f"a row of prompt {row.prompt}", f"the request has prompts 0 to {len(request.prompts) - 1}")
        n = len(request.prompts[row.prompt])
        planned = PlannedRow(
            i, row.prompt, [], [], [], [resolved(row.prompt, position_of(read.position, i)) for read in request.reads], None
        )
        if ask is not None:
            said = resolved(row.prompt, position_of(ask.position, i))
            if len(said) != 1:
                raise TokenError("a readout after several tokens", "it is about the next token after one", "give one position")
            planned.says = said[0]
        for edit in row.edits:
            sites.update(edit.touches)
            _plan_edit(edit, planned, request, card, n, resolved, top)
        _check_acts(planned, request, n)
        planned.settle(widths)
        rows.append(planned)
    for site in {(site.name, site.layer): site.check(card) for site in sites}.values():
        backend.require(site)
    return rows


def _resolver(prompts: Sequence[Tokens]) -> Any:
    """Positions as indices, each looked up once for each prompt."""
    known: dict[Any, list[int]] = {}

    def resolved(prompt: int, position: Position) -> list[int]:
        if type(position) is int and -len(prompts[prompt]) <= position < len(prompts[prompt]):
            return [position % len(prompts[prompt])]
        key = (prompt, repr(position))
        if key not in known:
            known[key] = list(resolve(position, prompts[prompt]))
        return known[key]

    return resolved


def _check_wanted(request: Request, card: ModelCard) -> None:
    for wanted in () if request.readout is None else (request.readout.tokens, request.readout.token_logits):
        if wanted is not None:
            _check_ids(wanted, request, card)


def _check_ids(wanted: Tensor, request: Request, card: ModelCard) -> None:
    if wanted.dim() != 2 or len(wanted) != len(request.rows) or wanted.is_floating_point():
        raise TokenError(
            f"wanted tokens of shape {list(wanted.shape)} for {len(request.rows)} rows",
            "each row has its own",
            "give [row, m] of token ids",
        )
    if wanted.numel() and not (0 <= int(wanted.min()) and int(wanted.max()) < card.d_vocab):
        raise TokenError("a wanted token id outside the vocabulary", f"this model has ids 0 to {card.d_vocab - 1}", "use one of them")


def _plan_edit(edit: Edit, row: PlannedRow, request: Request, card: ModelCard, n: int, resolved: Any, top: tuple[float, int]) -> None:
    positions = resolved(row.prompt, edit.position) if edit.scope == "prompt" else edit.positions(request.prompts[row.prompt])
    edit.check(card, len(positions))
    if card.itemsize < 4:
        value = edit.value.shift if isinstance(edit.value, FeatureChange) else edit.value
        numbers = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
        overflows = EditError(
            f"a value at {edit.site} that overflows {card.dtype}", "it would become infinite", "scale it down, or load the model in float32"
        )
        for x in (numbers, torch.tensor(edit.to, dtype=torch.float64)):
            hold(torch.isfinite(x.to(getattr(torch, card.dtype))).all(), overflows)
    if isinstance(edit.value, Tensor):
        if edit.value.requires_grad and not request.grad:
            raise EditError(
                f"a vector at {edit.site} that requires gradients", "this request keeps no graph", "detach it, or ask with grad=True"
            )
    if edit.keys is not None and min(resolved(row.prompt, edit.keys)) > max(positions, default=n):
        raise EditError(
            f"attention to later tokens at {edit.site}",
            "a token sees itself and those before it",
            "give keys that are not after the position",
        )
    if edit.site.order > top:
        raise EditError(
            f"the edit at {edit.site} would never fire",
            "it lies above everything that is read",
            "read a later site or the next token, or drop the edit",
        )
    late = edit.scope != "prompt" and any(edit.acts_at(p) for p in range(n, n + request.generate - 1))
    if not positions and not late:
        raise EditError(
            f"the edit at {edit.site} with the scope {edit.scope!r} would never fire",
            f"the prompt has {n} tokens, and {max(0, request.generate - 1)} generated ones are fed back",
            "generate more tokens, or choose another scope",
        )
    if positions:
        (row.finals if edit.site.name == "final_norm" else row.edits).append((edit, positions))
    if late:
        row.late.append(edit)


def _check_acts(row: PlannedRow, request: Request, n: int) -> None:
    """Raise if everything that a row edits is after what it reads."""
    if row.late or not (row.edits or row.finals):
        return
    if row.says == n - 1 and row.edits:  # nothing is after the last token
        return
    said = {*(() if row.says is None else (row.says,)), *((n - 1,) if request.generate else ())}
    seen = said.union(*row.reads)
    normed = said.union(*(positions for read, positions in zip(request.reads, row.reads, strict=True) if read.site.name == "final_norm"))
    acts = any(min(positions) <= max(seen) for _, positions in row.edits) or any(
        normed.intersection(positions) for _, positions in row.finals
    )
    if not acts:
        raise EditError(
            "an edit that changes nothing",
            f"it is not before or at token {max(seen)}, the last that is read",
            "read a later token, or edit an earlier one",
        )
