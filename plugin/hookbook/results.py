"""What every result has in common: frozen, saved as safetensors and JSON, shown offline."""

from __future__ import annotations

import json
import os
import tempfile
from abc import abstractmethod
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hookbook.adapter import ModelCard
from hookbook.errors import Refused, ResultError
from hookbook.sites import Site
from hookbook.tokens import Tokens

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FORMAT = 1
_PARTS: dict[str, type] = {cls.__name__: cls for cls in (ModelCard, Tokens, Site)}


@dataclass(frozen=True, eq=False)
class Result:
    """Base of results. Subclasses are frozen dataclasses of tensors (on the CPU), plain data, cards, tokens and sites."""

    @abstractmethod
    def to_frame(self) -> pd.DataFrame:
        """The numbers, long and tidy."""

    @abstractmethod
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw, and return the axes."""

    @abstractmethod
    def view(self) -> View:
        """An interactive picture that needs no network."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file with everything in it; the file appears whole or not at all."""
        path = Path(path)
        tensors: dict[str, Tensor] = {}
        packed = {"format": FORMAT, "kind": type(self).__name__, "data": {f.name: _pack(getattr(self, f.name), f.name, tensors) for f in fields(self)}}
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        os.close(handle)
        try:
            save_file(tensors, scratch, metadata={"hookbook": json.dumps(packed)})
            os.chmod(scratch, 0o644)
            os.replace(scratch, path)
        except BaseException:
            os.unlink(scratch)
            raise
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote. Nothing is unpickled.

        Raises:
            ResultError: The file is not a result, or of another kind or a newer format.
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
        if packed["kind"] != cls.__name__:
            raise ResultError(f"{path} is a {packed['kind']}", f"not a {cls.__name__}", f"load it with {packed['kind']}.load")
        try:
            return cls(**{name: _unpack(value, tensors) for name, value in packed["data"].items()})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ResultError(f"{path} is damaged", f"{type(error).__name__}: {error}", "save the result again") from error


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.clone(memory_format=torch.contiguous_format)  # fields may share memory, which safetensors refuses
        return {"tensor": name}
    if is_dataclass(value) and type(value).__name__ in _PARTS:
        return {"type": type(value).__name__, "data": {f.name: _pack(getattr(value, f.name), f"{name}.{f.name}", tensors) for f in fields(value)}}
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
    if "tuple" in value:
        return tuple(_unpack(item, tensors) for item in value["tuple"])
    return {key: _unpack(item, tensors) for key, item in value["dict"]}


@dataclass(frozen=True)
class View:
    """HTML that draws itself without a network, in a notebook or saved to a file."""

    html: str

    @classmethod
    def of(cls, picture: Any) -> View:
        """A circuitsvis picture; its own display asks the network first, and lets a token end the script it stands in."""
        head, call, rest = picture.local_src.rpartition("CircuitsVis.render(")
        data, end, tail = rest.rpartition("</script>")
        return cls(head + call + data.replace("</", "<\\/").replace("<!--", "<\\!--") + end + tail)

    def _repr_html_(self) -> str:
        return self.html

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a page that opens in any browser."""
        path = Path(path)
        path.write_text(f'<!doctype html><html lang="en"><meta charset="utf-8"><title>hookbook</title><body>{self.html}</body></html>', encoding="utf-8")
        return path


def need(module: str, what: str, extra: str = "viz") -> Any:
    """An optional library, or `Refused` with how to install it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Refused(what, f"{module.split('.')[0]} is not installed", f'pip install "hookbook[{extra}]"') from error


def show(token: str) -> str:
    """A token for display: white space and line breaks are made visible, control characters and half letters are marked."""
    text = token.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "⏎")
    return "".join(c if c.isprintable() else "·" for c in text) if text.strip() else "␣" * max(1, len(text))
