"""Recipe calls that are jobs: several as one, sent without waiting, kept in a file and picked up again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from types import FunctionType, NoneType
from typing import Any

import torch
from torch import Tensor

from hookbook import deferred, errors, storage
from hookbook.deferred import Deferred, Later, Tape
from hookbook.engine.seam import Backend, RemoteBackend
from hookbook.errors import Refused, RemoteError, ResultError


@contextmanager
def job(model: Any, *, progress: bool | None = None) -> Iterator[None]:
    """Everything recipes ask a remote model inside is one job, sent at the end of the block.

    Args:
        model: A remote model: `hb.wrap(model, remote=True)`. The recipes are called on it.
        progress: Show the job's states.

    Raises:
        RemoteError: The job failed; the results in the block then have no numbers.

    Results are filled in when the block ends; until then their numbers are promises.
    """
    if not isinstance(model, RemoteBackend):
        raise Refused(
            "a job of a model on this machine", "there is nothing to send", "wrap an nnsight model with remote=True, or leave the block out"
        )
    with deferred.recording() as record:
        yield
        for tape in record.tapes.values():
            tape.progress = progress
        deferred.settle(record.results, record)


class Handle:
    """A recipe call that was submitted.

    Attributes:
        job: Its number.
        host: Where it runs.
    """

    def __init__(self, model: RemoteBackend, tape: Tape, value: Any, job: str) -> None:
        self.model, self.tape, self.value, self.job = model, tape, value, job
        self.host = model.host
        self._done = False

    def status(self) -> str:
        """Such as `QUEUED`, `RUNNING`, `COMPLETED`, `ERROR`; empty before the server knows."""
        return self.model.status(self.job)

    def result(self, progress: bool | None = None) -> Any:
        """What the recipe returns; waits for it.

        Raises:
            RemoteError: The job failed, or the server is silent.
        """
        if not self._done:
            numbers = self.model.wait(self.job, progress)
            self.tape.arrive(numbers, list(deferred.waiting(self.value)))
            self.value = deferred.known(self.value)
            self._done = True
        return self.value

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write what `load` needs in another process. The key is not in it.

        Raises:
            ResultError: The result needs what a file cannot keep: a function of yours that scores texts, or an SAE that encodes states.
        """
        value = self.value
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        conditions = [[x.slot, type(error).__name__, error.what, error.why, error.instead] for x, error in self.tape.conditions]
        data = {"job": self.job, "host": self.host, "model": self.model.key, "of": kind, "conditions": conditions}
        pack = _Pack(self.model)
        return storage.write(
            path,
            "Handle",
            data | {f.name: pack.out(getattr(value, f.name)) for f in fields(value)} | {"fields": [f.name for f in fields(value)]},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: Any) -> Handle:
        """A handle that was saved; `model` is the remote model it was submitted with.

        Raises:
            ResultError: The file is no handle, or of another model.
        """
        data = storage.read(path, "Handle")
        if not isinstance(model, RemoteBackend) or model.key != data["model"]:
            other = f"not of {model.card.model_id}" if isinstance(model, Backend) else f"and a {type(model).__name__} is no remote model"
            raise ResultError(f"{path} is a job of {data['model']}", other, "give the remote model it was submitted with")
        tape, pack = Tape(model), _Pack(model)
        pack.tape = tape
        value = _found(data["of"])(**{key: pack.back(data[key]) for key in data["fields"]})
        for slot, kind, *words in data["conditions"]:
            tape.conditions.append((pack.slot(slot, [], "bool"), getattr(errors, kind)(*words)))
        model.at(data["host"])
        return cls(model, tape, value, data["job"])


class _Pack:
    """A result whose numbers are not here, as plain data."""

    def __init__(self, model: RemoteBackend) -> None:
        self.model = model
        self.tape: Tape | None = None
        self.known: dict[int, Deferred] = {}

    def out(self, value: Any) -> Any:
        if isinstance(value, Deferred):
            return {"slot": value.slot, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if isinstance(value, Later):
            return {"later": _name(value.fn), "args": [self.out(item) for item in value.args]}
        if isinstance(value, FunctionType):
            return {"function": _name(value)}
        if value is self.model:
            return {"adapter": True}
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(self.out(item) for item in value)
        if isinstance(value, dict):
            return {key: self.out(item) for key, item in value.items()}
        if isinstance(value, (Tensor, str, int, float, NoneType, *storage.PARTS)):
            return value
        why = "its numbers are worked out here once they come, which a file cannot keep"
        raise ResultError(f"a handle that waits with a {type(value).__name__}", why, "wait for it in this process: handle.result()")

    def back(self, value: Any) -> Any:
        if isinstance(value, dict):
            if value.keys() == {"slot", "shape", "dtype"}:
                return self.slot(value["slot"], value["shape"], value["dtype"])
            if value.keys() == {"later", "args"}:
                return Later(_found(value["later"]), tuple(self.back(item) for item in value["args"]))
            if value.keys() == {"function"}:
                return _found(value["function"])
            if value == {"adapter": True}:
                return self.model
            return {key: self.back(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(self.back(item) for item in value)
        return value

    def slot(self, slot: int, shape: list[int], dtype: str) -> Deferred:
        assert self.tape is not None
        if slot not in self.known:
            x = Deferred.of(self.tape, shape, getattr(torch, dtype))
            x.slot = slot
            self.known[slot] = x
        return self.known[slot]


def _name(fn: Callable[..., Any]) -> str:
    if not fn.__module__.startswith("hookbook.") or "<" in fn.__qualname__:
        raise ResultError(
            f"a handle that waits for {fn.__qualname__}",
            "a file names functions of hookbook alone",
            "wait for it in this process: handle.result()",
        )
    return f"{fn.__module__}:{fn.__qualname__}"


def _found(named: str) -> Callable[..., Any]:
    module, name = named.split(":")
    if not module.startswith("hookbook."):
        raise ResultError("a damaged handle", f"it names {module}", "submit again")
    return getattr(import_module(module), name)


def submit(value: Any, tapes: dict[int, Tape]) -> Handle:
    """Send what was recorded for a result, without waiting."""
    if len(tapes) != 1 or not is_dataclass(value):
        raise RemoteError(
            "a submitted call that is not one job",
            f"it asks {len(tapes)} remote models",
            "submit a recipe on one remote model: hb.wrap(model, remote=True)",
        )
    (tape,) = tapes.values()
    assert isinstance(tape.model, RemoteBackend)
    return Handle(tape.model, tape, value, tape.model.post(tape, list(deferred.waiting(value))))
