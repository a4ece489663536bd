"""Files: safetensors for tensors, JSON in its metadata for everything else. Nothing is pickled."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hookbook.card import ModelCard
from hookbook.errors import ResultError
from hookbook.reply import Reading, Reply, TokenReadout
from hookbook.request import Each, Read
from hookbook.sites import Site
from hookbook.tokens import At, Tokens

FORMAT = 1
PARTS = (ModelCard, Tokens, Site, Reading, TokenReadout, Reply, Read, Each, At)
"""The data classes that a file can hold."""

_PARTS: dict[str, type] = {cls.__name__: cls for cls in PARTS}


def write(path: str | os.PathLike[str], kind: str, data: dict[str, Any]) -> Path:
    """Write one safetensors file with everything in it; the file appears whole or not at all.

    Args:
        path: Where; missing folders are made.
        kind: What it is, which `read` must name.
        data: Tensors, plain data, tuples, dicts and hookbook's own data classes.
    """
    tensors: dict[str, Tensor] = {}
    packed = {"format": FORMAT, "kind": kind, "data": {name: _pack(value, name, tensors) for name, value in data.items()}}
    with whole(path) as scratch:
        save_file(tensors, scratch, metadata={"hookbook": json.dumps(packed)})
    return Path(path)


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[str]:
    """A scratch file to write, which becomes `path` if nothing is raised; missing folders are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    scratch.touch()
    rights = scratch.stat().st_mode
    try:
        yield str(scratch)
        scratch.chmod(rights)  # which safetensors takes from others
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch folder to fill, which becomes `path`, new or empty, if nothing is raised; missing folders above it are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        made = Path(scratch) / "new"
        made.mkdir()
        yield made
        if path.exists():
            path.rmdir()
        made.rename(path)


def read(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """What `write` wrote.

    Raises:
        ResultError: The file is not one of these, or of another kind or a newer format, or damaged.
    """
    try:
        with safe_open(os.fspath(path), "pt") as file:
            packed = json.loads((file.metadata() or {}).get("hookbook", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError, ValueError) as error:
        raise ResultError(f"{path} cannot be read", str(error), "give a file that a result's save() wrote") from error
    if not isinstance(packed, dict) or not {"format", "kind", "data"} <= packed.keys() or not isinstance(packed["format"], int):
        raise ResultError(f"{path} is not a saved result", "it has no hookbook metadata", "give a file that a result's save() wrote")
    if packed["format"] > FORMAT:
        raise ResultError(f"{path} has format {packed['format']}", f"this version reads up to {FORMAT}", "upgrade hookbook")
    if packed["kind"] != kind:
        raise ResultError(f"{path} is a {packed['kind']}", f"not a {kind}", f"load it with {packed['kind']}.load")
    try:
        return {name: _unpack(value, tensors) for name, value in packed["data"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise damaged(path, error) from error


def damaged(path: str | os.PathLike[str], error: Exception) -> ResultError:
    """What is raised for a file whose parts do not fit together."""
    return ResultError(f"{path} is damaged", f"{type(error).__name__}: {error}", "save the result again")


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.clone(memory_format=torch.contiguous_format)  # fields may share memory, which safetensors refuses
        return {"tensor": name}
    if is_dataclass(value) and type(value).__name__ in _PARTS:
        return {
            "type": type(value).__name__,
            "data": {f.name: _pack(getattr(value, f.name), f"{name}.{f.name}", tensors) for f in fields(value)},
        }
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if isinstance(value, range):
        return list(value)
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    return value


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "type" in value:
        return _PARTS[value["type"]](**{key: _unpack(item, tensors) for key, item in value["data"].items()})
    if "slice" in value:
        return slice(*value["slice"])
    if "tuple" in value:
        return tuple(_unpack(item, tensors) for item in value["tuple"])
    return {key: _unpack(item, tensors) for key, item in value["dict"]}
