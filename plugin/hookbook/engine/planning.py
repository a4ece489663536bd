"""What a request will do: checked, cut into climbs that fit a byte budget, and laid out, before anything runs.

What is computed once: each distinct prompt (the trunk), up to the boundary where a row's first edit is; the tokens
before the first edited one (the prefix), of which only keys and values are kept. What is not computed: blocks above the
last thing that is read, logits nobody asked for, and a clean run that nobody reads: then the last row to leave a trunk
goes on in its place.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hookbook.engine.checks import PlannedRow, check
from hookbook.engine.seam import Backend
from hookbook.engine.state import state
from hookbook.request import Request
from hookbook.travel.layout import Layout

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


@dataclass
class Part:
    """One climb: its rows, and where they are in the batch."""

    request: Request
    card: ModelCard
    rows: list[PlannedRow]
    apart: bool = False
    """Whether nothing is shared, not even between a prompt's tokens: hooks of the user's are on the model."""

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
        self.split = 0 if self.apart else self._split()
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
        return len(self.rows) * ((self.request.readout is not None and self.request.readout.of_all) + self.request.generate)

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
    if (request.readout is not None and request.readout.of_all) or request.generate:
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
    if not backend.remote and state(backend).hooks:
        return [Part(request, backend.card, [row], apart=True) for row in rows]
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
