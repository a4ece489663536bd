"""What a request will do: checked, cut into climbs that fit a byte budget, and laid out, before anything runs.

What is computed once: each distinct prompt (the trunk), up to the boundary where a row's first edit is; the tokens
before the first edited one (the prefix), of which only keys and values are kept. What is not computed: blocks above the
last thing that is read, logits nobody asked for, and a clean run that nobody reads: then the last row to leave a trunk
goes on in its place.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hookbook.deferred import hold
from hookbook.engine.cost import total
from hookbook.engine.seam import Backend
from hookbook.errors import EditError, TokenError, check_counts
from hookbook.request import Each, Edit, FeatureChange, Request, Sampling, position_of
from hookbook.sites import Site
from hookbook.tokens import Position, Tokens, resolve
from hookbook.travel.layout import NEVER, Layout

if TYPE_CHECKING:
    from hookbook.card import ModelCard

BUDGET_BYTES = int(os.environ.get("HOOKBOOK_BUDGET_BYTES", str(2 << 30)))
"""How much memory a climb may take beside the model; a longer sweep is cut into several climbs."""

LOGITS_BYTES = 256 << 20
"""How many bytes of logits are held at once when rows are reduced to their likeliest tokens."""

PASS_TOKENS = 64
"""A pass costs about as much time as this many more tokens in a pass that is there anyway, whatever the model's size."""

PACK_DECODING = 10
"""The most rows that share a row of the batch while decoding, where each slot has more and more tokens that the others do not see."""

Place = tuple[int, int]


def join_place(site: Site) -> Place:
    """Where a site is in the pass, and so where a row that is first edited there leaves: boundary, and 0 or 1 for before or after it is
    crossed."""
    if site.layer is None:
        return (-1, 0)
    return (site.layer + 1, 0) if site.name == "resid_post" else (site.layer, 1)


@dataclass(frozen=True)
class Plan:
    """What a call costs, counted before it runs; generated rows that end early or say the same as others cost less."""

    climbs: int
    """Forked forward passes, with what follows from them."""
    passes: int
    """Forward passes: of each climb its prefix, its body, and one for each token that is decoded."""
    token_layers: int
    """Tokens times blocks."""
    unembedded: int
    """Rows through the unembedding."""
    vjps: int
    """Vector-Jacobian products."""
    peak_bytes: int
    """About the most memory that is held at once beside the model."""
    jobs: int
    """Jobs on a remote service; 0 where the model is on this machine."""
    bytes_up: int = 0
    """What is sent to it."""
    bytes_down: int = 0
    """The numbers that come back, before they are packed and compressed."""

    def __str__(self) -> str:
        parts = [
            f"{self.climbs} climb{'s' * (self.climbs != 1)}",
            f"{self.passes} passes",
            f"{self.token_layers:,} token-layers",
            f"{self.unembedded:,} rows unembedded",
        ]
        parts += (
            [f"{self.vjps:,} vector-Jacobian products"] * (self.vjps > 0)
            + [f"{self.peak_bytes / 2**20:,.0f} MiB"]
            + [f"{self.jobs} job{'s' * (self.jobs != 1)}, {self.bytes_up / 1000:,.1f} kB up, {self.bytes_down / 1000:,.1f} kB down"]
            * (self.jobs > 0)
        )
        return ", ".join(parts)


class Account:
    """Adds up what would run."""

    def __init__(self) -> None:
        self.plan = Plan(0, 0, 0, 0, 0, 0, 0)

    def add(self, parts: Sequence[Part], *, unembedded: int = 0, vjps: int = 0, peak_bytes: int = 0) -> None:
        """Count climbs, and what comes beside them."""
        old, beside = self.plan, {"unembedded": unembedded, "vjps": vjps}
        each = [{"climbs": 1} | {name: getattr(part, name) for name in ("passes", "token_layers", "unembedded")} for part in parts]
        peak = max([old.peak_bytes, peak_bytes, *(part.peak_bytes for part in parts)])
        self.plan = replace(old, **total(vars(old), beside, *each), peak_bytes=peak)

    def send(self, bytes_up: int, bytes_down: int) -> None:
        """Count a job."""
        old = self.plan
        self.plan = replace(old, jobs=old.jobs + 1, bytes_up=old.bytes_up + bytes_up, bytes_down=old.bytes_down + bytes_down)


_account: ContextVar[Account | None] = ContextVar("account", default=None)


@contextmanager
def accounting() -> Iterator[Account]:
    """Inside, requests are checked and counted but not run, and answered with zeros."""
    account = Account()
    token = _account.set(account)
    try:
        yield account
    finally:
        _account.reset(token)


def account() -> Account | None:
    """Who counts, if nothing is to run."""
    return _account.get()


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

    @cached_property
    def join(self) -> Place:
        """Where it leaves the trunk."""
        return min([join_place(site) for edit, _ in self.edits for site in edit.touches], default=NEVER)

    def numbers(self, request: Request, card: ModelCard) -> int:
        """How many numbers are read of it."""
        return sum(len(positions) * read.site.width(card) for read, positions in zip(request.reads, self.reads, strict=True))

    @cached_property
    def first(self) -> int | None:
        """The first token that is edited."""
        return min((p for _, positions in self.edits for p in positions), default=None)


@dataclass
class Part:
    """One climb: its rows, and where they are in the batch."""

    request: Request
    card: ModelCard
    rows: list[PlannedRow]

    def __post_init__(self) -> None:
        groups: dict[tuple, list[int]] = defaultdict(list)
        for i, row in enumerate(self.rows):
            # what is edited at the embedding shares nothing but the prompt's text
            groups[row.prompt, i if row.join[0] < 0 else None].append(i)
        self.last = last_boundary(self.request, self.card.n_layers)
        self.groups = list(groups.values())
        self.layout = Layout(self.groups, {i: row.join for i, row in enumerate(self.rows)}, self.last)
        self.trunk_of = [self.layout.trunk_of[i] for i in range(len(self.rows))]
        """The trunk row of each row."""
        self.prompts = [self.request.prompts[prompt] for prompt, _ in groups]
        """Of each trunk row."""
        self.n = max(map(len, self.prompts))
        self.pads = [self.n - len(tokens) for tokens in self.prompts]
        self.split = self._split()
        self.pack, self.pack_decoding = self._packs()

    def _split(self) -> int:
        """Tokens before this column run once for each prompt, if that is worth a pass of its own."""
        firsts = [self.pads[self.trunk_of[i]] + row.first for i, row in enumerate(self.rows) if row.first is not None]
        split = min(firsts, default=0) if self.last else 0
        saved = sum(rows - len(self.prompts) for rows in self.layout.rows_at) * split
        return split if saved > PASS_TOKENS * self.last or self.request.grad else 0  # no graph is kept of a prefix

    def _packs(self) -> tuple[int, int]:
        """How many rows of one token share a row of the batch, in the prompt and in decoding: many save copies of the prefix, few leave
        fewer slots empty."""
        sites = [read.site for read in self.request.reads] + [edit.site for row in self.rows for edit, _ in row.edits]
        if not self.split or self.request.grad or any(site.name == "attn_pattern" for site in sites):
            return 1, 1
        width, rows = self.n - self.split, sum(self.layout.rows_at) / self.last / len(self.prompts)
        most = max(1, min(64, round((0.06 * rows * self.split) ** 0.5)))
        return most if width == 1 else 1, min(most, PACK_DECODING)

    @property
    def mask(self) -> Tensor | None:
        """`[trunk row, pos]` of 0 and 1; None if nothing is padded."""
        return torch.tensor([[0] * pad + [1] * (self.n - pad) for pad in self.pads]) if any(self.pads) else None

    @property
    def passes(self) -> int:
        """Forward passes, of which each token decoded is one."""
        return 1 + (self.split > 0) + max(0, self.request.generate - 1)

    @property
    def token_layers(self) -> int:
        """Tokens times blocks, at most: rows that end early or say the same cost less."""
        return self.prompt_token_layers + len(self.rows) * max(0, self.request.generate - 1) * self.last

    @property
    def prompt_token_layers(self) -> int:
        """Tokens times blocks before anything is decoded."""
        return len(self.prompts) * self.split * self.last + sum(self.layout.rows_at) * (self.n - self.split)

    @property
    def unembedded(self) -> int:
        """Rows through the unembedding, at most."""
        return len(self.rows) * ((self.request.readout is not None) + self.request.generate)

    @property
    def peak_bytes(self) -> int:
        """About the most memory this climb takes beside the model."""
        numbers = max(row.numbers(self.request, self.card) for row in self.rows)
        return peak_bytes(
            self.request,
            self.card,
            len(self.rows),
            len(self.prompts),
            len(self.layout.trunk),
            self.n,
            self.split,
            numbers,
            self.pack,
            self.pack_decoding,
        )


def logits_bytes() -> int:
    """How many bytes of logits are held at once."""
    return min(LOGITS_BYTES, BUDGET_BYTES // 4)


def rows_at_once(card: ModelCard) -> int:
    """How many rows of logits are held at once."""
    return max(1, logits_bytes() // (4 * card.d_vocab))


def last_boundary(request: Request, n_layers: int) -> int:
    """The boundary above which nothing is needed."""
    if request.readout is not None or request.generate:
        return n_layers
    places = [
        (n_layers if read.site.name == "final_norm" else 0)
        if read.site.layer is None
        else read.site.layer + (read.site.name != "resid_pre")
        for read in request.reads
    ]
    return max(places, default=0)


def peak_bytes(
    request: Request, card: ModelCard, rows: int, trunk: int, batch: int, n: int, split: int, numbers: int, pack: int = 1, decoding: int = 1
) -> int:
    """About the most memory a climb takes beside the model: keys and values, what one block holds, and what is asked for.

    Args:
        request: What is asked for.
        card: The model.
        rows: Rows of the climb.
        trunk: Its prompts.
        batch: Prompts and forks.
        n: Tokens of the longest prompt.
        split: Tokens of the prefix.
        numbers: How many are read of each row.
        pack: Rows in a row of the batch.
        decoding: The same while decoding.
    """
    kv, heads, size = card.n_kv_heads * card.d_head, card.n_heads * card.d_head, card.itemsize

    def block(tokens: int, batch_rows: float, width: int, keys: int) -> float:
        attention = tokens * (3 * card.d_model + 3 * (heads + 2 * kv)) + batch_rows * (
            keys * (4 * kv + 2 * heads) + 3 * card.n_heads * width * keys
        )
        return max(attention, tokens * (4 * card.d_model + 4 * card.d_mlp) + batch_rows * keys * 2 * kv)

    width, per_key = n - split, 2 * kv
    prefix = trunk * split * per_key * card.n_layers
    asked = rows * (numbers + 2 * card.d_model)
    kept = 0
    peak = max(
        prefix + block(trunk * split, trunk, split, split),
        prefix + asked + block(batch * width, batch / pack, width * pack, split + width * pack),
    )
    if request.grad:
        peak += batch * width * (8 * card.d_model + 6 * heads + 4 * kv + 6 * card.d_mlp) * card.n_layers
    if request.generate:
        own = width + request.generate
        kept = prefix + batch * own * per_key * card.n_layers
        peak = max(peak + kept - prefix, asked + kept + block(rows, rows / decoding, decoding, split + decoding * own))
    total = peak * size
    if request.readout is not None or request.generate:
        every = rows * card.d_vocab * 4
        kept_logits = 2 * every if request.readout is not None and request.readout.logits else 0
        total = max(total, (asked + kept) * size + kept_logits + 2 * min(every, logits_bytes()))
    return int(total)


def plan(backend: Backend, request: Request, held: int = 0) -> list[Part]:
    """Check a request and cut it into climbs that fit the budget beside `held` bytes. Runs nothing.

    Raises:
        HookbookError: Something asked for is not in the model or a prompt, cannot be done, or would change nothing.
    """
    rows = check(backend, request)
    lengths = [len(request.prompts[row.prompt]) for row in rows]
    if max(lengths) != min(lengths):
        rows.sort(key=lambda row: (len(request.prompts[row.prompt]), row.prompt))  # neighbours need little padding
    each = [row.numbers(request, backend.card) for row in rows]
    numbers, answer = max(each), sum(each) * backend.card.itemsize
    if request.readout is not None and request.readout.logits:
        answer += 4 * len(rows) * backend.card.d_vocab
    budget = max(BUDGET_BYTES - answer - held, BUDGET_BYTES // 8)  # the answer grows from climb to climb
    parts: list[list[PlannedRow]] = []
    used: dict[int, int] = {}  # prompts of the part, and their lengths
    width = 0  # tokens from the first edited one to the end
    room = 0  # how many rows surely fit, while neither prompts nor width change
    for row in rows:
        n = len(request.prompts[row.prompt])
        here = 0 if row.first is None else n - row.first
        if parts and row.prompt in used and here <= width and len(parts[-1]) < room:
            parts[-1].append(row)
            continue
        trunk, wide = {**used, row.prompt: n}, max(width, here)
        more = len(parts[-1]) + 1 if parts else 1
        need = peak_bytes(request, backend.card, more, len(trunk), len(trunk) + more, n, n - wide if wide else 0, numbers)
        if not parts or need > budget or sum(n - m for m in trunk.values()) > PASS_TOKENS + sum(trunk.values()) / 4:
            parts.append([])
            trunk, wide, more = {row.prompt: n}, here, 1
            need = peak_bytes(request, backend.card, 1, 1, 2, n, n - wide if wide else 0, numbers)
        parts[-1].append(row)
        used, width, room = trunk, wide, more * budget // max(1, need)  # it grows no faster than the number of rows
    laid_out = [Part(request, backend.card, part) for part in parts]
    if any(max(part.pack, part.pack_decoding) > 1 for part in laid_out) and not backend.packs:
        for part in laid_out:
            part.pack = part.pack_decoding = 1
    return laid_out


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
    resolved = _resolver(request.prompts)
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
        rows.append(planned)
    for site in sites:
        backend.require(site.check(card))
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
    if request.readout is None or request.readout.tokens is None:
        return
    wanted = request.readout.tokens
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
    value = edit.value.shift if isinstance(edit.value, FeatureChange) else edit.value
    numbers = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float64)
    if card.itemsize < 4:
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
