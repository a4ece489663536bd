"""What a request will do: checked, cut into climbs that fit a byte budget, and laid out, before anything runs.

What is computed once: each distinct prompt (the trunk), up to the boundary where a row's first edit is; the tokens
before the first edited one (the prefix), of which only keys and values are kept. What is not computed: blocks above the
last thing that is read, logits nobody asked for, and a clean run that nobody reads: then the last row to leave a trunk
goes on in its place.
"""

from __future__ import annotations

import gc
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hookbook.engine.checks import PlannedRow, check
from hookbook.engine.seam import Backend
from hookbook.engine.state import answers, state
from hookbook.request import Request
from hookbook.travel.layout import NEVER, Layout

if TYPE_CHECKING:
    from hookbook.card import ModelCard

BUDGET_BYTES = int(os.environ.get("HOOKBOOK_BUDGET_BYTES", str(2 << 30)))
"""How much memory a climb may take beside the model; a longer sweep is cut into several climbs."""

LOGITS_BYTES = 256 << 20
"""How many bytes of logits are held at once when rows are reduced to their likeliest tokens."""

FAST_BYTES = 32 << 20
"""On a CPU a climb is made no larger than this for its largest tensor: glibc gives larger blocks back to the system each time, and to
touch fresh memory costs as much as to compute it."""

FUSED_FROM = 128
"""From how many keys on a pass runs attention that computes no patterns (sdpa); below, that takes about as long."""

PASS_TOKENS = 64
"""A pass costs about as much time as this many more tokens in a pass that is there anyway, whatever the model's size."""

PACK_DECODING = 10
"""The most rows that share a row of the batch while decoding, where each slot has more and more tokens that the others do not see."""


class Tally:
    """What a climb of some rows takes, counted while rows are added.

    Args:
        request: What is asked for.
        card: The model.
        packs: Whether rows of one token may share a row of the batch.
        apart: Whether nothing is shared, not even between a prompt's tokens.
    """

    def __init__(self, request: Request, card: ModelCard, packs: bool = True, apart: bool = False) -> None:
        self.request, self.card, self.apart = request, card, apart
        self.last = last_boundary(request, card.n_layers)
        self.packs = packs
        self.lengths: dict[int, int] = {}
        """Of each prompt, its tokens."""
        self.rows = self.numbers = self.total = self.trunk = self.forks = self.fork_layers = self.n = self.width = 0
        """Rows; the most numbers read of one; the prompts' tokens; trunk rows; forks and the blocks they go through; tokens of the longest
        prompt, and from the first edited one to the end."""
        self._clean: dict[int, bool] = {}
        """Of each prompt that is shared: whether its trunk ends as it is, or as the last row to leave it."""
        self._latest: dict[int, int] = {}

    def add(self, row: PlannedRow) -> None:
        """Count one more."""
        n = len(self.request.prompts[row.prompt])
        if row.prompt not in self.lengths:
            self.lengths[row.prompt] = n
            self.total += n
        self.rows += 1
        self.numbers = max(self.numbers, row.numbers)
        self.n = max(self.n, n)
        self.width = max(self.width, 0 if row.first is None else n - row.first)
        join = row.join[0]
        if join < 0:  # what is edited at the embedding shares nothing but the prompt's text
            self.trunk += 1
        elif row.join == NEVER:
            if row.prompt not in self._clean:
                self.trunk += 1
            elif not self._clean[row.prompt]:
                self._fork(self._latest[row.prompt])
            self._clean[row.prompt] = True
        elif row.prompt not in self._clean:  # it is the trunk as long as nobody wants that clean, or leaves it later
            self.trunk, self._clean[row.prompt], self._latest[row.prompt] = self.trunk + 1, False, join
        elif self._clean[row.prompt]:
            self._fork(join)
        else:
            self._fork(min(join, self._latest[row.prompt]))
            self._latest[row.prompt] = max(join, self._latest[row.prompt])

    def _fork(self, join: int) -> None:
        self.forks += 1
        self.fork_layers += max(0, self.last - join)

    @property
    def row_layers(self) -> int:
        """Rows of the batch times blocks."""
        return self.trunk * self.last + self.fork_layers

    @property
    def split(self) -> int:
        """Tokens before this column run once for each prompt, if that is worth a pass of its own."""
        split = self.n - self.width if self.width and self.last and not self.apart else 0
        return split if self.fork_layers * split > PASS_TOKENS * self.last or self.request.grad else 0  # no graph is kept of a prefix

    @property
    def pack(self) -> tuple[int, int]:
        """How many rows of one token share a row of the batch, in the prompt and in decoding: many save copies of the prefix, few leave
        fewer slots empty."""
        if not self.packs or not self.split:
            return 1, 1
        most = max(1, min(64, round((0.06 * self.row_layers / self.last / self.trunk * self.split) ** 0.5)))
        return most if self.n - self.split == 1 else 1, min(most, PACK_DECODING)

    @property
    def tokens(self) -> int:
        """Tokens that the last block sees, less the prefix."""
        return (self.trunk + self.forks) * (self.n - self.split)

    @property
    def peak_bytes(self) -> int:
        """About the most memory the climb takes beside the model: keys and values, what one block holds, and what is asked for."""
        request, card, split, (pack, decoding) = self.request, self.card, self.split, self.pack
        kv, heads, size = card.n_kv_heads * card.d_head, card.n_heads * card.d_head, card.itemsize

        def block(tokens: int, batch_rows: float, width: int, keys: int) -> float:
            attention = tokens * (3 * card.d_model + 3 * (heads + 2 * kv)) + batch_rows * (
                keys * (4 * kv + 2 * heads) + 3 * card.n_heads * width * keys
            )
            return max(attention, tokens * (4 * card.d_model + 4 * card.d_mlp) + batch_rows * keys * 2 * kv)

        width, per_key, batch = self.n - split, 2 * kv, self.trunk + self.forks
        prefix = self.trunk * split * per_key * card.n_layers
        asked = self.rows * (self.numbers + 2 * card.d_model)
        kept = 0
        peak = max(
            prefix + block(self.trunk * split, self.trunk, split, split),
            prefix + asked + block(batch * width, math.ceil(batch / pack), width * pack, split + width * pack),
        )
        if request.grad:
            peak += batch * width * (8 * card.d_model + 6 * heads + 4 * kv + 6 * card.d_mlp) * card.n_layers
        if request.generate:
            own = width + request.generate
            kept = prefix + batch * own * per_key * card.n_layers
            decoded = block(self.rows, math.ceil(self.rows / decoding), decoding, split + decoding * own)
            peak = max(peak + kept - prefix, asked + kept + decoded)
        total = peak * size
        if (request.readout is not None and request.readout.of_all) or request.generate:
            every = self.rows * card.d_vocab * 4
            kept_logits = 2 * every if request.readout is not None and request.readout.logits else 0
            total = max(total, (asked + kept) * size + kept_logits + 2 * min(every, logits_bytes()))
        return int(total)


@dataclass
class Part:
    """One climb: its rows, and where they are in the batch."""

    request: Request
    card: ModelCard
    rows: list[PlannedRow]
    packs: bool = True
    """Whether rows of one token may share a row of the batch."""
    apart: bool = False
    """Whether nothing is shared, not even between a prompt's tokens: hooks of the user's are on the model."""
    follows: bool = False
    """Whether the climb before has the same prefix, and keeps it for this one."""
    lasts: bool = False
    """Whether its prefix is kept for the climb after it."""

    def __post_init__(self) -> None:
        groups: dict[tuple, list[int]] = defaultdict(list)
        tally = Tally(self.request, self.card, self.packs, self.apart)
        for i, row in enumerate(self.rows):
            tally.add(row)
            groups[row.prompt, i if row.join[0] < 0 else None].append(i)
        self.last, self.n, self.split, self.peak_bytes = tally.last, tally.n, tally.split, tally.peak_bytes
        self.pack, self.pack_decoding = tally.pack
        self.groups = list(groups.values())
        self.layout = Layout(self.groups, {i: row.join for i, row in enumerate(self.rows)}, self.last)
        self.trunk_of = [self.layout.trunk_of[i] for i in range(len(self.rows))]
        """The trunk row of each row."""
        self.prompts = [self.request.prompts[prompt] for prompt, _ in groups]
        """Of each trunk row."""
        self.pads = [self.n - len(tokens) for tokens in self.prompts]

    @property
    def mask(self) -> Tensor | None:
        """`[trunk row, pos]` of 0 and 1; None if nothing is padded."""
        return torch.tensor([[0] * pad + [1] * (self.n - pad) for pad in self.pads]) if any(self.pads) else None

    def ids(self, pad: int) -> Tensor:
        """The tokens of the trunk, `[trunk row, pos]`, padded on the left with any token."""
        return torch.tensor([[pad] * n + list(tokens.ids) for n, tokens in zip(self.pads, self.prompts, strict=True)])

    def same_prefix(self, other: Part) -> bool:
        """Whether another climb has the same prefix, of which it reads nothing."""
        if not self.split or (self.split, self.pads, self.prompts) != (other.split, other.pads, other.prompts):
            return False
        read = (self.pads[trunk] + p for row, trunk in zip(self.rows, self.trunk_of, strict=True) for some in row.reads for p in some)
        said = (self.pads[trunk] + row.says for row, trunk in zip(self.rows, self.trunk_of, strict=True) if row.says is not None)
        return min(chain(read, said), default=self.split) >= self.split

    @property
    def answer_bytes(self) -> int:
        """What it gives."""
        return answer_bytes(self.request, self.card, self.rows)

    @property
    def passes(self) -> int:
        """Forward passes, of which each token decoded is one."""
        return 1 + self.runs_prefix + max(0, self.request.generate - 1)

    @property
    def runs_prefix(self) -> bool:
        """Whether its prefix is a pass of its own."""
        return self.split > 0 and not self.follows

    @property
    def token_layers(self) -> int:
        """Tokens times blocks, at most: rows that end early or say the same cost less."""
        return self.prompt_token_layers + len(self.rows) * max(0, self.request.generate - 1) * self.last

    @property
    def prompt_token_layers(self) -> int:
        """Tokens times blocks before anything is decoded."""
        prefix = len(self.prompts) * self.split * self.last if self.runs_prefix else 0
        return prefix + sum(self.layout.rows_at) * (self.n - self.split)

    @property
    def unembedded(self) -> int:
        """Rows through the unembedding, at most."""
        return len(self.rows) * ((self.request.readout is not None and self.request.readout.of_all) + self.request.generate)


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python's collector of circles rests: what plans are made of has none, and it would look through all of it again and again."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


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


def answer_bytes(request: Request, card: ModelCard, rows: Sequence[PlannedRow]) -> int:
    """What some rows give."""
    logits = 4 * card.d_vocab if request.readout is not None and request.readout.logits else 0
    return sum(row.numbers for row in rows) * card.itemsize + len(rows) * logits


@uncollected()
def plan(backend: Backend, request: Request, held: int = 0) -> list[Part]:
    """Check a request and cut it into climbs that fit the budget beside `held` bytes. Runs nothing.

    Raises:
        HookbookError: Something asked for is not in the model or a prompt, cannot be done, or would change nothing.
    """
    rows, card = check(backend, request), backend.card
    if not backend.remote and state(backend).hooks:
        return [Part(request, card, [row], apart=True) for row in rows]
    lengths = [len(request.prompts[row.prompt]) for row in rows]
    if max(lengths) != min(lengths):
        rows.sort(key=lambda row: (len(request.prompts[row.prompt]), row.prompt))  # neighbours need little padding
    budget = max(BUDGET_BYTES - answer_bytes(request, card, rows) - held, BUDGET_BYTES // 8)  # the answer grows from climb to climb
    packs = backend.packs and answers(backend).get("packs", True) and not request.grad and not _patterns(request)
    fast = FAST_BYTES // (card.d_mlp * card.itemsize) if card.device == "cpu" and not (backend.remote or request.generate) else 1 << 30
    parts: list[list[PlannedRow]] = []
    tally, room = Tally(request, card, packs), 0
    for row in rows:
        same = len(tally.lengths), tally.width
        tally.add(row)
        if tally.rows > room or same != (len(tally.lengths), tally.width):
            room = _room(tally, budget, fast)
            if not parts or not room:
                parts.append([])
                tally = Tally(request, card, packs)
                tally.add(row)
                room = _room(tally, budget, fast)
        parts[-1].append(row)
    laid_out = [Part(request, card, part, packs) for part in parts]
    for part, after in () if backend.remote else pairwise(laid_out):
        part.lasts = after.follows = part.same_prefix(after) and after.same_prefix(part)
    return laid_out


def _patterns(request: Request) -> bool:
    """Whether attention patterns are read or edited."""
    sites = chain((read.site for read in request.reads), (edit.site for row in request.rows for edit in row.edits))
    return any(site.name == "attn_pattern" for site in sites)


def _room(tally: Tally, budget: int, fast: int) -> int:
    """How many rows surely fit while neither prompts nor width change: memory grows no faster than their number. 0: not even these, or
    they are better cut."""
    padding, most = len(tally.lengths) * tally.n - tally.total, max(fast, 8 * tally.n)  # what a cut costs is at most one prompt more
    if tally.peak_bytes > budget or padding > PASS_TOKENS + tally.total / 4 or tally.tokens > most:
        return 0
    return min(tally.rows * budget // max(1, tally.peak_bytes), tally.rows + (most - tally.tokens) // max(1, tally.width))
