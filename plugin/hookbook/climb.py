"""The forward pass that forks: what happens at each site, whatever the backend.

A `Climb` is plain data. A backend's forward pass shows it the stream at every boundary between blocks and the tensor at
every site it wants; the climb reads, edits and lets forks join the batch, and hands the tensor back. This file imports
only torch and defines only plain functions and one plain class, so that it can travel to where the model is.

Boundary `b` is the input of block `b`; boundary `n_layers` is the input of the final norm. Two sites live there: first
`resid_post[b - 1]`, then `resid_pre[b]`.
"""

import torch


class Climb:
    """One pass up the stack, with a batch that grows.

    Args:
        n_trunk: Rows the pass starts with: one for each prompt, never edited.
        forks: `{boundary: (after, before)}`: the trunk rows of the forks that join there; `after` join before
            `resid_post` of the block below is edited and read, `before` join before `resid_pre` is.
        edits: `{(site name, layer): [group]}`; a group is a dict of `rows`, `cols`, `op`, `value` and `to`, where rows
            and columns index the batch and the tokens of this pass.
        reads: `{(site name, layer): [(slot, rows, cols)]}`.
        last: The boundary after which nothing is needed.
        pads: `[n_trunk, pos]`, True where a token is padding; None if none is.
        pack: How many rows of one token share a row of the batch, each seeing only the prefix and itself, so that the
            prefix's keys and values are copied once for all of them; only with one prompt.
    """

    def __init__(self, n_trunk, forks, edits, reads, last, pads=None, pack=1):
        self.n_trunk = n_trunk
        self.pads = pads
        self.pack = pack
        self.forks = forks
        self.edits = edits
        self.reads = reads
        self.last = last
        self.index = torch.arange(n_trunk)
        self.rows_at = []
        self.found = {}
        self.fired = 0
        self.token_layers = 0
        self.shape = None

    def wants(self, name, layer):
        """Whether anything is read or edited at a site inside a block."""
        return layer < self.last and ((name, layer) in self.edits or (name, layer) in self.reads)

    def boundary(self, b, x):
        """Called with the stream at each boundary up to `last`, in order."""
        after, before = self.forks.get(b, (None, None))
        if self.pack > 1:
            x = x.reshape(-1, 1, x.shape[-1])[: len(self.index)]
        if self.pads is not None:
            # padding that may attend to nothing can be NaN, and NaN times an attention of 0 would reach real tokens
            x = x.masked_fill(take(self.pads, self.index).to(x.device)[:, :, None], 0)
        x = self.join(x, after)
        self.shape = (-1, *x.shape[1:])
        if b > 0:
            x = self.visit("resid_post", b - 1, x)
        x = self.join(x, before)
        x = self.visit("resid_pre", b, x)
        if b < self.last:
            self.rows_at.append(x.shape[0])
            self.token_layers += x.shape[0] * x.shape[1]
        if self.pack > 1:
            x = torch.nn.functional.pad(x[:, 0], (0, 0, 0, -len(x) % self.pack)).reshape(-1, self.pack, x.shape[-1])
        return x

    def visit(self, name, layer, x):
        """Edit and read the tensor of one site."""
        shape = x.shape
        x = x.reshape(self.shape)  # some families' MLPs see tokens without their rows
        groups = self.edits.get((name, layer), ())
        if groups:
            x = x.clone()
        for group in groups:
            apply_edit(x, group)
            self.fired += 1
        for slot, rows, cols in self.reads.get((name, layer), ()):
            self.found[slot] = x[rows.to(x.device), cols.to(x.device)].clone()
        return x.reshape(shape)

    def join(self, x, trunk_rows):
        """Let forks join: each starts as a copy of its trunk row."""
        if trunk_rows is None or len(trunk_rows) == 0:
            return x
        self.index = torch.cat([self.index, trunk_rows])
        return torch.cat([x, take(x, trunk_rows)])

    def widen(self, value):
        """Whatever a block takes beside the stream (masks, rotations, kept keys and values), for the batch as it is now."""
        if self.n_trunk == len(self.index) and self.pack == 1:
            return value
        if isinstance(value, torch.Tensor):
            if value.dim() < 2 or value.shape[0] != self.n_trunk:
                return value
            if self.n_trunk > 1:
                return take(value, self.index)
            return value.expand(-(-len(self.index) // self.pack), *value.shape[1:])
        if isinstance(value, tuple):
            return tuple(self.widen(item) for item in value)
        return value  # a list or an object is a cache, which the backend widens itself

    def widen_mask(self, mask, x, n_kept):
        """The attention mask of packed rows: each token sees what the trunk's sees of the prefix, and itself."""
        if self.pack == 1:
            return self.widen(mask)
        see, hide = (True, False) if mask is not None and mask.dtype == torch.bool else (0.0, torch.finfo(x.dtype).min)
        kind = {"dtype": x.dtype if mask is None else mask.dtype, "device": x.device}
        own = torch.full((1, 1, self.pack, self.pack), hide, **kind)
        own.diagonal(dim1=2, dim2=3).fill_(see)
        prefix = torch.full((1, 1, 1, n_kept), see, **kind) if mask is None else mask[..., :n_kept]
        return torch.cat([prefix.expand(1, 1, self.pack, -1), own], -1).expand(len(x), -1, -1, -1)


def take(x, rows):
    """Rows of a batch."""
    return x.index_select(0, rows.to(x.device))


def apply_edit(x, group):
    """Apply one group of edits to `x` in place; `hookbook.request.Edit` says what each operation is."""
    rows, cols, op = group["rows"].to(x.device), group["cols"].to(x.device), group["op"]
    # half precision leaves a residue of a projection behind, so the arithmetic is at least float32
    wide = x.dtype if op == "set" else torch.promote_types(x.dtype, torch.float32)
    value = group["value"].to(wide).to(x.device)
    if op == "set":
        x[rows, cols] = value
        return
    old = x[rows, cols].to(wide)
    if op == "add":
        new = old + value
    elif op == "scale":
        new = old * value[:, None]
    else:
        unit = value / value.abs().amax(-1, keepdim=True)  # so that no length overflows
        unit = unit / unit.norm(dim=-1, keepdim=True)
        along = (old * unit).sum(-1, keepdim=True)
        to = group["to"].to(wide).to(x.device)[:, None] if op == "clamp" else 0.0
        new = old + (to - along) * unit
    x[rows, cols] = new.to(x.dtype)
