"""The forward pass that forks: what happens at each site, whatever the backend.

A `Climb` is plain data. A backend's forward pass shows it the stream at every boundary between blocks and the tensor at
every site it wants; the climb reads, edits and lets forks join the batch, and hands the tensor back.

Boundary `b` is the input of block `b`; boundary `n_layers` is the input of the final norm. Two sites live there: first
`resid_post[b - 1]`, then `resid_pre[b]`.
"""

import torch

from hookbook.travel.edits import apply_edit, take


class Stop(Exception):
    """Ends a forward pass above which nothing is needed. Raised and caught around one pass."""


class Climb:
    """One pass up the stack, with a batch that grows.

    Args:
        n_trunk: Rows the pass starts with: the prompts.
        forks: `{boundary: (after, before)}`: the trunk rows of the forks that join there; `after` join before
            `resid_post` of the block below is edited and read, `before` join before `resid_pre` is.
        edits: `{(site name, layer): [group]}`; a group is a dict, see `apply_edit`, whose rows and columns index the
            rows and the tokens of this pass.
        reads: `{(site name, layer): [(slot, rows, cols)]}`.
        last: The boundary after which nothing is needed.
        pads: `[n_trunk, pos]`, True where a token is padding; None if none is.
        pack: How many rows of one token share a row of the batch, each seeing only what came before it and itself, so
            that the prefix's keys and values are copied once for all of them.
        base: `[n_trunk]` the prompt under each trunk row; None: each is a prompt's own. Rows of one prompt share rows of the batch.
        tick: Called at each boundary with the tokens times blocks that are done since.
    """

    def __init__(self, n_trunk, forks, edits, reads, last, pads=None, pack=1, base=None, tick=None):
        self.n_trunk = n_trunk
        self.forks = forks
        self.edits = edits
        self.reads = reads
        self.last = last
        self.pads = pads if pack == 1 else None  # a packed token is a prompt's last, never padding
        self.pack = pack
        self.base = torch.arange(n_trunk) if base is None else base
        self.tick = tick
        self.before = (0, 0)
        """How many tokens were kept before this pass: of the prompt, and of each row."""
        self.index = torch.arange(n_trunk)
        """The trunk row under each row."""
        self.place = torch.arange(0)
        """Where each row is in a packed batch: its row times `pack` plus the slot."""
        self.owner = self.index if pack == 1 else torch.arange(0)
        """The trunk row under each row of the batch."""
        self.free = {}
        """Of each prompt the next free slot."""
        self.n_pos = None
        self.rows_at = []
        self.found = {}
        self.looked = {}
        """What encoders saw at one site that change another, by cell."""
        self.fired = 0
        self.token_layers = self.ticked = 0
        if pack > 1:
            self.seat(self.index)

    def shift(self, n, mask):
        """Take the pass to start `n` tokens earlier; `mask` is that of all its tokens."""
        self.pads = None if mask is None else mask == 0
        self.reads = {site: [(slot, rows, cols + n) for slot, rows, cols in reads] for site, reads in self.reads.items()}
        self.edits = {site: [{**group, "cols": group["cols"] + n} for group in groups] for site, groups in self.edits.items()}

    def wants(self, name, layer=None):
        """Whether anything is read or edited at a site other than the stream at boundaries."""
        return (layer is None or layer < self.last) and ((name, layer) in self.edits or (name, layer) in self.reads)

    def passes(self, b):
        """Whether a boundary can be passed unseen, and nothing inside the block above it is wanted."""
        wanted = {*self.edits, *self.reads}
        here = any(layer == b or (name == "resid_post" and layer == b - 1) for name, layer in wanted)
        return not here and b not in self.forks and len(self.owner) == self.n_trunk and self.pads is None

    def inside(self):
        """The sites that something is read or edited at, other than the stream at boundaries."""
        wanted = {*self.edits, *self.reads}
        return [site for site in wanted if site[0] not in ("resid_pre", "resid_post") and (site[1] is None or site[1] < self.last)]

    def boundary(self, b, x):
        """Called with the stream at each boundary up to `last`, in order."""
        after, before = self.forks.get(b, (None, None))
        if self.tick is not None and self.rows_at:
            self.tick(self.token_layers - self.ticked)
            self.ticked = self.token_layers
        if self.pack > x.shape[1]:
            apart, x = x, x.new_zeros(len(self.owner), self.pack, x.shape[2])
            x.view(-1, x.shape[-1])[self.place.to(x.device)] = apart[:, 0]
        if self.pads is not None:
            # padding that may attend to nothing can be NaN, and NaN times an attention of 0 would reach real tokens
            x = x.masked_fill(take(self.pads, self.owner).to(x.device)[:, :, None], 0)
        given = x
        x = self.join(x, after)
        self.n_pos = x.shape[1]
        if b > 0:
            x = self.visit("resid_post", b - 1, x, fresh=x is not given)
        x = self.join(x, before)
        x = self.visit("resid_pre", b, x, fresh=x is not given)
        if b < self.last:
            self.rows_at.append(len(self.index))
            self.token_layers += len(self.index) * (x.shape[1] if self.pack == 1 else 1)
        return x

    def visit(self, name, layer, x, fresh=False):
        """Edit and read the tensor of one site; `fresh` if nobody else holds it."""
        shape = x.shape
        if name != "attn_pattern" and self.n_pos is not None:  # some families' MLPs see tokens without their rows, and some split heads
            x = x.reshape(len(self.owner), self.n_pos, -1)
        groups = self.edits.get((name, layer), ())
        if groups and not fresh:
            x = x.clone()
        for group in groups:
            placed = {**group, **self.at(group["rows"], group["cols"])}
            if group["op"] == "look":
                self.looked[group["cell"]] = x[placed["rows"].to(x.device), placed["cols"].to(x.device)].clone()
            else:
                if "cell" in group:
                    placed["looked"] = self.looked.pop(group["cell"])
                apply_edit(x, placed)
            self.fired += 1
        for slot, rows, cols in self.reads.get((name, layer), ()):
            at = self.at(rows, cols)
            rows, cols = at["rows"].to(x.device), at["cols"].to(x.device)
            self.found[slot] = (x[rows, :, cols] if name == "attn_pattern" else x[rows, cols]).clone()
        return x.reshape(shape)

    def at(self, rows, cols):
        """Where rows and columns are in the batch."""
        if self.pack == 1 or self.n_pos is None:
            return {"rows": rows, "cols": cols}
        place = self.place[rows]
        return {"rows": place // self.pack, "cols": place % self.pack}

    def join(self, x, trunk_rows):
        """Let forks join: each starts as a copy of its trunk row."""
        if trunk_rows is None or len(trunk_rows) == 0:
            return x
        self.index = torch.cat([self.index, trunk_rows])
        if self.pack == 1:
            self.owner = self.index
            return torch.cat([x, take(x, trunk_rows)])
        new, more = self.seat(trunk_rows)
        x = torch.cat([x, x.new_zeros(more, *x.shape[1:])])
        flat = x.view(-1, x.shape[-1])
        flat[new.to(x.device)] = take(flat, self.place[trunk_rows])
        return x

    def seat(self, trunk_rows):
        """Give rows their places in a packed batch; returns these and how many rows the batch grew by."""
        new, owners = [], []
        for trunk_row, prompt in zip(trunk_rows.tolist(), self.base[trunk_rows].tolist(), strict=True):
            slot = self.free.get(prompt, 0)
            if slot % self.pack == 0:  # there is none yet, or it is full
                slot = (len(self.owner) + len(owners)) * self.pack
                owners.append(trunk_row)
            new.append(slot)
            self.free[prompt] = slot + 1
        self.owner = torch.cat([self.owner, torch.tensor(owners, dtype=torch.long)])
        self.place = torch.cat([self.place, torch.tensor(new)])
        return torch.tensor(new), len(owners)

    def unpacked(self, x):
        """What a block computed, `[row, head, 1, width]`: of a packed batch `[batch, head, slot, width]`."""
        if self.pack == 1:
            return x
        return take(x.transpose(1, 2).flatten(0, 1), self.place)[:, :, None]

    def widen(self, value):
        """Whatever a block takes beside the stream (masks, rotations), for the batch as it is now."""
        if torch.equal(self.owner, torch.arange(self.n_trunk)):
            return value
        if isinstance(value, torch.Tensor):
            if value.dim() < 2 or value.shape[0] != self.n_trunk:
                return value
            if self.n_trunk > 1:
                return take(value, self.owner)
            return value.expand(len(self.owner), *value.shape[1:])
        if isinstance(value, tuple):
            return tuple(self.widen(item) for item in value)
        return value  # a list or an object is a cache, which the backend widens itself

    def widen_mask(self, mask, x):
        """The attention mask. Packed rows see what a trunk row alone would see of the prefix, and what their own slot kept."""
        if self.pack == 1:
            return self.widen(mask)
        n_shared, n_own = self.before
        if mask is None:
            mask = torch.zeros(1, 1, 1, n_shared + n_own + 1, dtype=x.dtype, device=x.device)
        hide = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = mask[:, :, :1, : n_shared + n_own + 1]
        mask = take(mask.expand(self.n_trunk, -1, -1, -1), self.owner)
        own = mask[..., None, n_shared:].expand(-1, -1, self.pack, self.pack, -1)
        apart = ~torch.eye(self.pack, dtype=torch.bool, device=x.device)[..., None]
        own = own.masked_fill(apart, hide).flatten(3)
        return torch.cat([mask[..., :n_shared].expand(-1, -1, self.pack, -1), own], -1)


def enter(climb, layer, args, kwargs):
    """A block's arguments, with the stream shown to the climb and everything else widened to the batch."""
    x = climb.boundary(layer, args[0] if args else kwargs["hidden_states"])
    beside = {key: climb.widen(value) for key, value in kwargs.items() if key not in ("hidden_states", "attention_mask")}
    if "attention_mask" in kwargs:
        beside["attention_mask"] = climb.widen_mask(kwargs["attention_mask"], x)
    if args:
        return (x, *climb.widen(args[1:])), beside
    return args, {**beside, "hidden_states": x}
