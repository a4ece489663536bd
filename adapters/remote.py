"""nnsight models on a server: NDIF's, or one of your own.

Nothing runs here. What a recipe asks is noted on a tape (`hookbook.deferred`), which is sent as one job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from nnsight import TransformersModel
from torch import Tensor

from hookbook import deferred
from hookbook.adapters.tracing import TracingAdapter
from hookbook.deferred import Deferred, Tape
from hookbook.engine.seam import RemoteBackend, vjp_shapes
from hookbook.remote.handles import Handle
from hookbook.remote.service import Service
from hookbook.reply import LensReadout, TokenReadout
from hookbook.sites import Site
from hookbook.travel.climb import Climb


class RemoteAdapter(RemoteBackend, TracingAdapter):
    """An nnsight model whose weights are on a server.

    Args:
        model: The model; its weights are not loaded, and not used if they are.
        tokenizer: Used instead of the model's own.
        remote: True for the host that nnsight is configured for, or a URL.
    """

    def __init__(self, model: TransformersModel, tokenizer: Any = None, remote: bool | str = True) -> None:
        self.service = Service(model, None if remote is True else str(remote))
        self.verified: set[str] = set()
        self.places = 0
        super().__init__(model, tokenizer)

    def forward(self, tokens: Tensor, mask: Tensor | None, climb: Climb, *, kept: Any = None, keep: int = 0) -> Any:
        self._tell(climb.inside())
        n_kept = 0 if kept is None else kept[1]
        keys = n_kept + tokens.shape[1]
        found, like = [], []
        for (name, layer), reads in climb.reads.items():
            for slot, rows, _ in reads:
                shape = (self.card.n_heads, keys) if name == "attn_pattern" else (Site(name, layer).width(self.card),)
                found.append(slot)
                like.append(torch.empty(len(rows), *shape, dtype=getattr(torch, self.card.dtype), device="meta"))
        self.places += bool(keep)
        data = {
            "climb": {
                "n_trunk": climb.n_trunk,
                "forks": climb.forks,
                "edits": climb.edits,
                "reads": climb.reads,
                "last": climb.last,
                "pads": climb.pads,
            },
            "tokens": tokens,
            "mask": mask,
            "kept": None if kept is None else kept[0],
            "keep": f"kept {self.places}" if keep else None,
            "room": keep,
            "fires": sum(map(len, climb.edits.values())),
            "found": found,
        }
        climb.found = dict(zip(found, deferred.tape(self).note("forward", data, tuple(like)), strict=True))
        climb.fired = data["fires"]
        return (data["keep"], keys) if keep else None

    def _tell(self, sites: Iterable[tuple[str, int | None]]) -> None:
        """Say where sites are, which the server does not know."""
        for name, layer in sites:
            self.passes.paths[name, layer] = str(self.where.path(name, layer))

    def final_norm(self, resid: Tensor) -> Tensor:
        return deferred.tape(self).note("final_norm", {"resid": resid}, torch.empty_like(resid, device="meta"))

    def unembed(self, normed: Tensor, words: slice | Tensor | None = None) -> Tensor:
        return deferred.tape(self).note("unembed", {"normed": normed}, normed.new_empty(len(normed), self.card.d_vocab, device="meta"))

    def plain_logits(self, tokens: Tensor) -> Tensor:
        like = torch.empty(*tokens.shape, self.card.d_vocab, dtype=getattr(torch, self.card.dtype), device="meta")
        return deferred.tape(self).note("plain", {"tokens": tokens}, like)

    def writer(self, name: str, layer: int) -> Any:
        def call(path: str) -> Any:
            width = self.card.d_model
            return lambda x: deferred.tape(self).note(
                "module", {"path": path, "x": x}, torch.empty(*x.shape[:-1], width, dtype=x.dtype, device="meta")
            )

        path, norm = self.where.writer_paths(name, layer)
        return call(path), None if norm is None else call(norm)

    def token_readout(
        self, resid: Tensor, rows: int, k: int, tokens: Tensor | None, logits: bool, normed: bool, words: Tensor | None
    ) -> TokenReadout:
        n, m, some = len(resid), *(0 if x is None else x.shape[1] for x in (tokens, words))
        wide = torch.promote_types(getattr(torch, self.card.dtype), torch.float32)
        like = [
            torch.empty(n, width, dtype=dtype, device="meta")
            for width, dtype in (
                (min(k, self.card.d_vocab), torch.long),
                (min(k, self.card.d_vocab), wide),
                (m, wide),
                (self.card.d_vocab, wide),
                (some, wide),
            )
        ]
        data = {"resid": resid, "rows": rows, "k": k, "tokens": tokens, "logits": logits, "normed": normed, "words": words}
        shapes = (*like[:3], like[3] if logits else None, None if words is None else like[4])
        return TokenReadout(*deferred.tape(self).note("readout", data, shapes))

    def lens_readout(self, states: Tensor, rows: int, k: int, tokens: Tensor | None, ranked: int) -> LensReadout:
        shapes = LensReadout.shapes(states, self.card.d_vocab, k, 0 if tokens is None else tokens.shape[1], ranked)
        data = {"states": states, "rows": rows, "k": k, "tokens": tokens, "ranked": ranked}
        return LensReadout(*deferred.tape(self).note("lens", data, shapes))

    def decode(
        self, kept: Any, normed: Tensor, todo: dict[str, Any], tick: Callable[[int], Any] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        late = [edit for row in todo["late"] for edit in row]
        sites = [edit["site"] for edit in late] + [edit["value"]["seen"] for edit in late if edit["op"] == "features"]
        self._tell(site for site in sites if site is not None and site[0] not in ("resid_pre", "resid_post", "final_norm"))
        shape = (len(normed), todo["steps"])
        like = tuple(torch.empty(s, dtype=d, device="meta") for s, d in ((shape, torch.long), (shape, torch.float64), (3, torch.long)))
        return deferred.tape(self).note("decode", {"kept": kept[0], "normed": normed, "todo": todo}, like)

    def leaf(self, *shape: int) -> Tensor:
        dtype = getattr(torch, self.card.dtype)
        return deferred.tape(self).note("leaf", {"shape": shape, "dtype": dtype}, torch.empty(shape, dtype=dtype, device="meta"))

    def pull_back(self, out: Tensor, leaves: Any, states: Any, chunk: int, mean: bool, tick: Any, into: Any, rows: Any) -> list[Tensor]:
        tape = deferred.tape(self)
        tape.grad = True
        data = {"out": out, "leaves": list(leaves), "states": list(states), "chunk": chunk, "mean": mean}
        return list(tape.note("vjps", data, vjp_shapes(out, leaves, mean)))

    def slope(self, value: Tensor, leaf: Tensor) -> Tensor:
        return self.pull_back(value.reshape(1, 1), [leaf], [leaf], 1, False, None, None, None)[0][0]

    @property
    def host(self) -> str:
        return self.service.host

    def at(self, host: str) -> None:
        self.service.host = host

    @property
    def key(self) -> str:
        return self.model.to_model_key()

    def size(self, tape: Tape, wanted: Sequence[Deferred]) -> int:
        return len(self._payload(tape, wanted))

    def post(self, tape: Tape, wanted: Sequence[Deferred]) -> str:
        return self.service.send(self._payload(tape, wanted))

    def _payload(self, tape: Tape, wanted: Sequence[Deferred]) -> bytes:
        return self.service.payload(self.passes, tape.errand(wanted))

    def status(self, job: str) -> str:
        found = self.service.status(job)
        return "" if found is None else found.status.value

    def wait(self, job: str, progress: bool | None = None) -> dict[int, Tensor]:
        return self.service.wait(job, progress)

    def handle(self, tape: Tape, value: Any, job: str) -> Handle:
        return Handle(self, tape, value, job)

    @property
    def packs(self) -> bool:
        return False
