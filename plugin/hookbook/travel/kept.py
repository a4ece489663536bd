"""Keys and values of the tokens before: what the rows of a prompt share is held once, and beside it each row's own."""

import torch

from hookbook.travel.edits import take


class Kept:
    """Keys and values of one block.

    Args:
        tokens: Which dimension counts tokens; the first counts rows.
    """

    def __init__(self, tokens=2):
        self.tokens = tokens
        self.shared = ()
        """Keys and values of the tokens before every fork, a row for each prompt."""
        self.own = ()
        """Those of the tokens since, a row for each row of the climb, and room for more."""
        self.n_shared = self.n_own = 0
        """How many tokens there are."""

    def n(self):
        """How many tokens a row has."""
        return self.n_shared + self.n_own

    def take(self, rows):
        """Keep the own tokens of some rows, in this order."""
        if self.own and rows != list(range(len(self.own[0]))):
            self.own = tuple(
                self._room(x.narrow(self.tokens, 0, self.n_own), x.shape[self.tokens] - self.n_own, torch.tensor(rows)) for x in self.own
            )

    def update(self, climb, new, keep):
        """Add the keys and values of new tokens, as a block computed them; returns what its attention is to see, for the batch as it is.

        `keep` is for how many tokens there is to be room from these on; 0: nothing is kept.
        """
        first = not self.shared and not self.own
        if first and keep and not climb.forks and climb.pack == 1:
            self.shared, self.n_shared = tuple(new), new[0].shape[self.tokens]
            return new
        wide = 1 if climb.pack > 1 else new[0].shape[self.tokens]
        if keep or self.own:
            rows = [climb.unpacked(x) for x in new]
            if self.own:
                for own, x in zip(self.own, rows, strict=True):
                    own.narrow(self.tokens, self.n_own, wide).copy_(x)
            else:
                self.own = tuple(self._room(x, keep - 1) for x in rows)
        self.n_own += wide
        seen = [self._seen(climb, i, x) for i, x in enumerate(new)]
        if not keep:
            self.shared = self.own = ()
        return seen

    def _room(self, x, more, rows=None):
        shape = list(x.shape)
        shape[0] = shape[0] if rows is None else len(rows)
        shape[self.tokens] += more
        found = x.new_empty(shape)
        found.narrow(self.tokens, 0, x.shape[self.tokens]).copy_(x if rows is None else take(x, rows))
        return found

    def _seen(self, climb, i, new):
        """Shared tokens and then those of the rows, slot after slot."""
        if self.own and climb.pack == 1:
            new = self.own[i].narrow(self.tokens, 0, self.n_own)
        shared = self._of_prompts(climb, self.shared[i]) if self.shared else None
        if climb.pack == 1 or not self.own or self.n_own == 1:
            return new if shared is None else torch.cat([shared, new], self.tokens)
        own, n = self.own[i][:, :, : self.n_own], self.n_shared
        full = len(own) == len(new) * climb.pack
        seen = (new.new_empty if full else new.new_zeros)(len(new), own.shape[1], n + climb.pack * self.n_own, own.shape[3])
        if shared is not None:
            seen[:, :, :n] = shared
        slots = seen[:, :, n:].unflatten(2, (climb.pack, self.n_own)).transpose(1, 2)
        place = climb.place.to(own.device)
        slots[place // climb.pack, place % climb.pack] = own
        return seen

    def _of_prompts(self, climb, shared):
        rows = climb.base[climb.owner]
        return shared.expand(len(rows), *shared.shape[1:]) if len(shared) == 1 else take(shared, rows)


def begin(climb, kept, n_layers, tokens=2):
    """What each of some blocks keeps: what it kept, or nothing yet. Tells the climb how many tokens come before."""
    kept = [Kept(tokens) for _ in range(n_layers)] if kept is None else kept
    climb.before = (kept[0].n_shared, kept[0].n_own) if kept else (0, 0)
    return kept
