"""Finished climbs of a long sweep, kept in a folder, so that a repeated call goes on where a killed one stopped."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hookbook import storage
from hookbook.engine.planning import Part
from hookbook.engine.seam import Backend
from hookbook.engine.state import look, using
from hookbook.errors import ResultError
from hookbook.reply import Reply
from hookbook.request import Edit, FeatureChange
from hookbook.travel.climb import Climb

KIND = "Checkpoint"


class Checkpoint:
    """One file for each finished climb, named by what was asked of which model.

    Weights are recognised by what the model makes of two fixed tokens: a folder filled by another model of the same name
    is refused.
    """

    def __init__(self, folder: str | os.PathLike[str], backend: Backend) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ResultError(f"checkpoint={str(folder)!r}", "it is a file", "give a folder")
        with using(backend) as mine:
            look(backend, mine, whole=True)  # every number, for what is kept
        self.card = backend.card
        last, one = backend.card.n_layers, torch.tensor([1])
        climb = Climb(1, {}, {}, {("resid_post", last - 1): [("x", one - 1, one)]}, last)
        with torch.no_grad():
            backend.forward(torch.tensor([[backend.pad_id + 1, backend.pad_id + 2]]), None, climb)
        self.probe = climb.found["x"][0].float().cpu()

    def load(self, part: Part) -> Reply | None:
        """The reply of a part that was finished, or None."""
        path = self._path(part)
        if not path.exists():
            return None
        try:
            data = storage.read(path, KIND)
        except ResultError as error:
            raise ResultError(f"a file of the checkpoint, {path}", error.why, "delete this file: its part is then run again") from error
        tolerance = (1e-3 if self.card.itemsize >= 4 else 5e-2) * (1 + float(self.probe.abs().max()))
        if (
            not data["card"].same_model(self.card)
            or data["probe"].shape != self.probe.shape
            or float((data["probe"] - self.probe).abs().max()) > tolerance
        ):
            raise ResultError(f"the checkpoint in {self.folder}", "it was filled by a model with other weights", "give another folder")
        return data["reply"]

    def save(self, part: Part, reply: Reply) -> None:
        """Keep a finished part; the file appears whole or not at all."""
        storage.write(self._path(part), KIND, {"probe": self.probe, "card": self.card, "reply": reply})

    def _path(self, part: Part) -> Path:
        return self.folder / f"{fingerprint(part)}.safetensors"


def fingerprint(part: Part) -> str:
    """A name for everything that a climb's reply depends on, except the weights."""
    found, request, card = hashlib.sha256(), part.request, part.card
    ask = request.readout

    def feed(*values: Any) -> None:
        for value in values:
            found.update(
                value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
            )
            found.update(b";")

    def feed_edit(edit: Edit, positions: Any) -> None:
        change = edit.value
        value = (
            (change.sae, change.features, change.scale, change.shift, change.drop, change.seen)
            if isinstance(change, FeatureChange)
            else (change,)
        )
        feed(edit.site, edit.op, positions, edit.scope, edit.keys, edit.to, *value)

    feed(card.backend, card.model_id, card.architecture, card.dtype, card.tokenizer, card.n_layers, card.d_model, storage.FORMAT)
    feed([read.site for read in request.reads], request.generate, request.sampling, None if ask is None else (ask.k, ask.logits))
    if ask is not None and ask.token_logits is not None:
        feed("logits of tokens", None if ask.tokens is None else ask.tokens.shape[1])
    for row in part.rows:
        feed(row.number, request.prompts[row.prompt].ids, row.reads, row.says)
        for edit, positions in [*row.edits, *row.finals, *((edit, "late") for edit in row.late)]:
            feed_edit(edit, positions)
        for wanted in () if ask is None else (ask.tokens, ask.token_logits):
            if wanted is not None:
                feed(wanted[row.number])
    return found.hexdigest()[:32]
