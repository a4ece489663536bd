"""Where rows are in a batch that grows."""

import torch

NEVER = (1 << 30, 0)
"""Where a row leaves its trunk that is the trunk."""


class Layout:
    """First one row for each group, its trunk, then forks in the order in which they join.

    Args:
        groups: Rows that are the same until they join the batch apart; a row is named by any number.
        joins: Where each row leaves its trunk, boundary and 0 or 1 for before or after it is crossed; or `NEVER`.
        last: How many blocks the pass goes through.
    """

    def __init__(self, groups, joins, last):
        self.n_trunk = len(groups)
        self.trunk_of = {row: trunk for trunk, group in enumerate(groups) for row in group}
        self.first = []
        """A row that is in each row of the batch from the trunk on; it says what the batch's row holds."""
        for group in groups:
            clean = [row for row in group if joins[row] == NEVER]
            # if nobody wants the trunk clean, the last to leave stays in it
            self.first.append(clean[0] if clean else max((joins[row], row) for row in group)[1])
        stay = set(self.first)
        forks = [row for _, row in sorted((joins[row], row) for row in self.trunk_of if row not in stay and joins[row] != NEVER)]
        self.batch_row = {**self.trunk_of, **{row: self.n_trunk + place for place, row in enumerate(forks)}}
        self.first += forks
        self.trunk = [self.trunk_of[row] for row in self.first]
        """The trunk row under each row of the batch."""
        self.forks = {}
        """By boundary the trunk rows of the forks that join before and after it is crossed."""
        for row in forks:
            boundary, after = joins[row]
            self.forks.setdefault(boundary, ([], []))[after].append(self.trunk_of[row])
        self.rows_at = []
        """How many rows the batch has in each block."""
        rows = self.n_trunk
        for boundary in range(last):
            rows += sum(map(len, self.forks.get(boundary, ())))
            self.rows_at.append(rows)

    def at(self, layer, row):
        """Where a row is in the batch in a block: its own row, or its trunk's."""
        own = self.batch_row[row]
        return own if own < self.rows_at[layer] else self.trunk_of[row]

    def joining(self):
        """The forks, as a climb takes them."""
        return {boundary: tuple(torch.tensor(rows, dtype=torch.long) for rows in pair) for boundary, pair in self.forks.items()}
