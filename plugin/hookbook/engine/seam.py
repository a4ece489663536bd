"""What the engine needs of a backend: what its model is, what it cannot do, one forward pass, and the stream as logits.

A backend that is elsewhere notes what it is asked (`hookbook.deferred`), and can also send what was noted and wait for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hookbook.card import ModelCard
from hookbook.deferred import Deferred, Tape
from hookbook.engine.weights import Weight, tensors
from hookbook.errors import Refused
from hookbook.reply import LensReadout, TokenReadout
from hookbook.sites import Site
from hookbook.travel import decoding, readout, vjps
from hookbook.travel.climb import Climb


class Backend(ABC):
    """A model as the engine sees it."""

    remote = False
    """Whether the model is elsewhere, so that what it gives are promises (`hookbook.deferred`)."""
    card: ModelCard
    tokenizer: Any
    model: Any
    """The model that was wrapped."""

    @abstractmethod
    def forward(self, tokens: Tensor, mask: Tensor | None, climb: Climb, *, kept: Any = None, keep: int = 0) -> Any:
        """One forward pass that shows `climb` the stream and the sites it wants, and ends at `climb.last`.

        Args:
            tokens: `[prompt, pos]` the new tokens.
            mask: `[prompt, kept + pos]`, 0 where a token is left padding; None if nothing is padded.
            climb: What to do on the way.
            kept: Keys and values of the tokens before, as `keep` returned them: for each layer a `hookbook.travel.kept.Kept`, which is
                consumed.
            keep: Return keys and values of all tokens, for each layer below `climb.last`, with room for so many tokens more, less one; 0:
                do not.
        """

    @abstractmethod
    def final_norm(self, resid: Tensor) -> Tensor:
        """The final norm of the stream, `[n, d_model]`."""

    @abstractmethod
    def unembed(self, normed: Tensor, words: slice | Tensor | None = None) -> Tensor:
        """The unembedding and whatever the model does to logits afterwards: `[n, d_model]` after the final norm to `[n, d_vocab]`.

        `words` is a part of the vocabulary, or some ids, which only a backend that `splits` is asked for.
        """

    def fuse(self, keys: int | None) -> bool:
        """Run attention that computes no patterns in passes of at least so many keys, where nobody looks at patterns; None: never. False if
        it cannot."""
        return keys is None

    def splits(self) -> int:
        """How many words the vocabulary has, if `unembed` gives parts of it; 0: it gives all alone."""
        return 0

    @abstractmethod
    def writer(self, name: str, layer: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
        """How a site writes to the stream: its output projection, and the norm after it if there is one.

        Args:
            name: `head_z` or `mlp_act`.
            layer: The block.
        """

    @abstractmethod
    def plain_logits(self, tokens: Tensor) -> Tensor:
        """The model's own logits `[1, pos, d_vocab]` of `tokens` `[1, pos]`, without hookbook."""

    @property
    @abstractmethod
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a generation."""

    @property
    def module(self) -> nn.Module | None:
        """The module that runs, which is looked at before each run (`hookbook.engine.state`); None if it is elsewhere."""
        return self.model if isinstance(self.model, nn.Module) else None

    @property
    def roots(self) -> tuple[nn.Module, ...]:
        """Modules that have all of its hooks below them."""
        return () if self.module is None else (self.module,)

    @property
    def edits(self) -> tuple[str, ...]:
        """What the user put into the model in other ways than torch's, by name."""
        return ()

    def weights(self) -> Iterable[Weight]:
        """The weights, by names that all backends share."""
        return [] if self.module is None else [Weight(f"{path}.{name}", x) for path, _, name, x in tensors(self.module)]

    def runs_in(self) -> tuple[str, str]:
        """The dtype of the stream and the device, as they are now."""
        first = None if self.module is None else next((x for x in self.module.parameters() if x.is_floating_point()), None)
        return (self.card.dtype, self.card.device) if first is None else (str(first.dtype).removeprefix("torch."), str(first.device))

    def ready(self) -> None:  # noqa: B027  most backends have nothing to look for
        """Raise if something was done to the model since it was wrapped that hookbook would not see. Runs nothing."""

    def check_free(self) -> None:  # noqa: B027
        """Raise if the user is in the middle of a run. Asked while no other thread of ours runs the model."""

    def refuses(self, site: Site) -> Refused | None:
        """Why this backend cannot read and edit a site, or None if it can. Runs nothing."""
        return None

    def hook_name(self, site: Site) -> str | None:
        """What this very model calls a whole site where it takes TransformerLens hooks; None: nothing, or it takes none."""
        return None

    def require(self, site: Site) -> None:
        """Raise `SiteError` or `Refused` unless a site can be read and edited."""
        self.ready()
        refusal = self.refuses(site.check(self.card))
        if refusal is not None:
            raise refusal

    @property
    def packs(self) -> bool:
        """Whether rows of one token may share a row of the batch (`Climb.pack`), if the model turns out to allow it."""
        return False

    @property
    def pad_id(self) -> int:
        """Any token; padding is masked."""
        return 0

    def token_readout(
        self, resid: Tensor, rows: int, k: int, tokens: Tensor | None, logits: bool, normed: bool, words: Tensor | None
    ) -> TokenReadout:
        """See `hookbook.travel.readout.readout`."""
        return TokenReadout(*readout.readout(self, resid, rows, k, tokens, logits, normed, words))

    def lens_readout(self, states: Tensor, rows: int, k: int, tokens: Tensor | None, ranked: int) -> LensReadout:
        """See `hookbook.travel.readout.lens`."""
        return LensReadout(*readout.lens(self, states, rows, k, tokens, ranked))

    def leaf(self, *shape: int) -> Tensor:
        """Zeros beside the model, for gradients."""
        return torch.zeros(shape, dtype=getattr(torch, self.card.dtype), requires_grad=True)

    def slope(self, value: Tensor, leaf: Tensor) -> Tensor:
        """The gradient `[1, m]` of one number with respect to a leaf `[1, m]`."""
        return torch.autograd.grad(value, leaf)[0]

    def pull_back(self, out: Tensor, leaves: Any, states: Any, chunk: int, mean: bool, tick: Any, into: Any, rows: Any) -> list[Tensor]:
        """See `hookbook.travel.vjps.vjps`."""
        return vjps.vjps(out, leaves, states, chunk, mean, tick, into, rows)

    def decode(
        self, kept: Any, normed: Tensor, todo: dict[str, Any], tick: Callable[[int], Any] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Let the rows of a climb go on; see `hookbook.travel.decoding.decode`."""
        return decoding.decode(self, kept, normed, todo, tick)


class RemoteBackend(Backend):
    """A model that is elsewhere. What it is asked is noted on a tape, which is sent as one job."""

    remote = True
    verified: set[str]
    """What the model is known to do, since a job that checked it came back."""

    @property
    @abstractmethod
    def host(self) -> str:
        """The address of the server."""

    @abstractmethod
    def at(self, host: str) -> None:
        """Ask another server from now on."""

    @property
    @abstractmethod
    def key(self) -> str:
        """What the server calls the model."""

    @abstractmethod
    def size(self, tape: Tape, wanted: Sequence[Deferred]) -> int:
        """How many bytes a tape is when it is sent."""

    @abstractmethod
    def post(self, tape: Tape, wanted: Sequence[Deferred]) -> str:
        """Send a tape without waiting; the number of the job."""

    @abstractmethod
    def status(self, job: str) -> str:
        """Such as `QUEUED`, `RUNNING`, `COMPLETED`, `ERROR`; empty before the server knows the job."""

    @abstractmethod
    def wait(self, job: str, progress: bool | None = None) -> dict[int, Tensor]:
        """What a job gives, by slot, when it is done."""

    def fetch(self, tape: Tape, wanted: Sequence[Deferred]) -> dict[int, Tensor]:
        """Send a tape and wait for what is wanted of it."""
        return self.wait(self.post(tape, wanted), tape.progress)

    @abstractmethod
    def handle(self, tape: Tape, value: Any, job: str) -> object:
        """A job that goes on, as a `hookbook.remote.handles.Handle`."""


def vjp_shapes(out: Tensor, leaves: Sequence[Tensor], mean: bool) -> tuple[Tensor, ...]:
    """What `Backend.pull_back` gives, without numbers."""
    lead: list[int] = [] if mean else [len(out)]
    matrices = (torch.empty(*lead, out.shape[1], leaf.shape[1], dtype=leaf.dtype, device="meta") for leaf in leaves)
    return (*matrices, *(torch.empty(out.shape, dtype=leaf.dtype, device="meta") for leaf in leaves))
