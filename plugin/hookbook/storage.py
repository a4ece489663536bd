"""Files: safetensors for tensors, JSON in its metadata for everything else, nothing is pickled; and the tables that users bring."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from importlib.resources import files
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hookbook.card import ModelCard
from hookbook.errors import DataError, ResultError
from hookbook.reply import Reading, Reply, TokenReadout
from hookbook.request import Each, Read
from hookbook.sites import Site
from hookbook.tokens import At, Tokens

logger = logging.getLogger(__name__)

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
    packed["sum"] = _sum(tensors)
    with whole(path) as scratch:
        save_file(tensors, scratch, metadata={"hookbook": json.dumps(packed)})
    return Path(path)


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[str]:
    """A scratch file to write, which becomes `path` if nothing is raised; missing folders are made. `ResultError` if there is no place."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with _writable(path):
            scratch.touch()
            rights = scratch.stat().st_mode
            yield str(scratch)
            scratch.chmod(rights)  # which safetensors takes from others
            scratch.replace(path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink()
        raise


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch folder to fill, which becomes `path`, new or empty, if nothing is raised; missing folders above it are made."""
    path = Path(path)
    with _writable(path), tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        made = Path(scratch) / "new"
        made.mkdir()
        yield made
        if path.exists():
            path.rmdir()
        made.rename(path)


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Make missing folders above a path; a disk that is full or closed is a `ResultError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise ResultError(f"{path} cannot be written", str(error), "make room there, or give another place") from error


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
    if packed.get("sum", "") not in ("", _sum(tensors)):  # shapes do not tell that a square was transposed
        raise ResultError(f"{path} is damaged", "its tensors are not those that were saved", "save the result again")
    try:
        return {name: _unpack(value, tensors) for name, value in packed["data"].items()}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise damaged(path, error) from error


def damaged(path: str | os.PathLike[str], error: Exception) -> ResultError:
    """What is raised for a file whose parts do not fit together."""
    return ResultError(f"{path} is damaged", f"{type(error).__name__}: {error}", "save the result again")


def _sum(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        found.update(f"{name} {x.dtype} {list(x.shape)} ".encode())
        found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


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


TABLES = (".json", ".csv", ".tsv")
"""The files that `pairs` reads, in any case."""


def holds_pairs(source: Any) -> bool:
    """Whether `pairs` reads a source: the path of a table, or anything but a name."""
    return not isinstance(source, (str, os.PathLike)) or Path(source).suffix.lower() in TABLES


def pairs(source: Any, header: bool | None = None, columns: Sequence[str | int] | None = None) -> list[tuple[str, str]]:
    """Two columns of texts.

    Args:
        source: The path of a CSV, TSV or JSON file; a frame; a list of pairs or of records; or a dict, from one text to the other or of
            columns.
        header: Whether the first row of a file or list names the columns; None: a file's does if it looks so, which is logged.
        columns: The two that are meant, by name or by number from 0; None: there are two.

    Raises:
        DataError: It cannot be read, or a row is no pair of texts. The line is named.
    """
    a_file, lines = isinstance(source, (str, os.PathLike)), False
    if a_file and Path(source).suffix.lower() != ".json":
        names, rows, lines = None, _lines(Path(source)), True
    elif a_file:
        try:
            names, rows = _table(load_json(source), columns)
        except DataError as error:
            raise DataError(f"{source}, {error.what}", error.why, error.instead) from error
        rows = [(f"{where} of {source}", cells) for where, cells in rows]
    else:
        names, rows = _table(source, columns)
    if not rows:
        return []
    if names is None and header is not False:
        (where, first), by_name = rows[0], any(isinstance(name, str) for name in columns or ())
        if header or by_name or (a_file and _names_columns(*(cells for _, cells in rows))):
            names, rows = [name.strip() if isinstance(name, str) else name for name in first], rows[1:]
            if not (header or by_name):
                logger.warning("%s, %s, is taken as the names of columns: say header=False if it is a pair", where, first)
        elif lines:
            logger.warning("%s, %s, is taken as a pair: say header=True if it names the columns, else header=False", where, first)
    width, found = len(names or rows[0][1]), []
    at: list[Any] = [names.index(name) if names and name in names else name for name in columns or range(width)]
    if len(at) != 2 or not all(isinstance(i, int) and 0 <= i < width for i in at):
        instead = "say which two are meant, by name or by number from 0, such as columns=(0, 1)"
        raise DataError(f"columns={columns!r}, where there are {names or width}", "a pair is two texts", instead)
    for where, cells in rows:
        if len(cells) != width:
            raise DataError(where, f"it has {len(cells)} cells, and others {width}", "quote a text that holds what separates the cells")
        found.append((_cell(cells[at[0]], where), _cell(cells[at[1]], where)))
    return found


def load_json(path: str | os.PathLike[str]) -> Any:
    """What is in a JSON file; `DataError` if nothing can be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read", f"{type(error).__name__}: {error}", "give a JSON file in UTF-8") from error


def _table(source: Any, columns: Any) -> tuple[list[Any] | None, list[tuple[str, Sequence[Any]]]]:
    """The names of the columns, or None; and every row with where it is."""
    if hasattr(source, "itertuples") or hasattr(source, "iter_rows"):  # pandas, polars
        rows = source.itertuples(index=False, name=None) if hasattr(source, "itertuples") else source.iter_rows()
        return list(source.columns), [(f"row {i} of the frame", cells) for i, cells in enumerate(rows)]
    if isinstance(source, Mapping):
        if "pairs" in source and not isinstance(source["pairs"], str):
            return _table(source["pairs"], columns)
        named = {name: column.tolist() if hasattr(column, "tolist") else column for name, column in source.items()}
        if columns or any(isinstance(column, (list, tuple)) for column in named.values()):
            if columns is None and not _names_columns(list(named)):
                raise DataError("a dict of lists", "they may be columns, or several answers", "name two of them: columns=('a', 'b')")
            names = list(columns or named)
            if not all(isinstance(named.get(name), (list, tuple)) for name in names):
                raise DataError(f"the columns {names}", "one is no list", "give lists of texts by these names")
            sizes = [len(named[name]) for name in names]
            if len({*sizes}) != 1:
                raise DataError(f"the columns {names} have {sizes} cells", "those at the same place are a pair", "give as many")
            return names, [(f"entry {i}", cells) for i, cells in enumerate(zip(*(named[name] for name in names), strict=True), 1)]
        source = source.items()
    if isinstance(source, (str, bytes)) or not isinstance(source, Iterable):
        raise DataError(f"{type(source).__name__} is no pairs", "", "give a list of pairs, a frame, a dict, or a file")
    rows = [(f"entry {i}", cells) for i, cells in enumerate(source, 1)]
    if rows and all(isinstance(cells, Mapping) for _, cells in rows):
        names = list(dict.fromkeys(name for _, cells in rows for name in cells))
        return names, [(where, [cells.get(name) for name in names]) for where, cells in rows]
    for where, cells in rows:
        if isinstance(cells, (str, bytes)) or not hasattr(cells, "__len__"):
            raise DataError(f"{where}, {cells!r}", "it is not a pair", "give two texts")
    return None, [(where, list(cells)) for where, cells in rows]


def _lines(path: Path) -> list[tuple[str, list[str]]]:
    """The rows of a CSV or TSV file, cut where every row has as many cells; lines without a text are none."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read", f"{type(error).__name__}: {error}", "give a table in UTF-8") from error
    if not text.strip():
        return []
    fit, why = {}, {}
    for mark in "\t" if path.suffix.lower() == ".tsv" else ",;\t":
        reader, line, rows = csv.reader(io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=True, strict=True), 1, []
        try:
            for row in reader:
                if any(cell.strip() for cell in row):
                    rows.append((f"line {line} of {path}", row))
                line = reader.line_num + 1
        except csv.Error as error:
            why[mark] = f"line {line} of {path}", str(error)
            continue
        width = len(rows[0][1])
        odd = next((found for found in rows if len(found[1]) != width), None)
        if width > 1 and odd is None:
            fit[mark] = rows
        else:
            where, row = odd or rows[0]
            why[mark] = where, f"it has {len(row)} cells" + (f", and those before {width}" if odd else "")
    if len(fit) == 1:
        return next(iter(fit.values()))
    if fit:
        raise DataError(f"{path} can be cut at {' and at '.join(map(repr, fit))}", "every line holds both", "quote its texts")
    mark = max(why, key=text.strip().splitlines()[0].count)
    where, said = why[mark]
    raise DataError(where, said, f"separate two cells by {mark!r}, and quote a text that holds it or a quotation mark")


def _names_columns(first: Sequence[Any], *others: Sequence[Any]) -> bool:
    """Whether a row names columns: by its words, or because it alone begins in lower case."""
    if not all(isinstance(cell, str) and cell.strip() for cell in first):
        return False
    words = [re.findall(r"[^\W\d_]+", cell.casefold()) for cell in first]
    known = {part for file in (files("hookbook") / "data" / "pairs").iterdir() for part in file.name.removesuffix(".json").split("_")}
    if all(some and {*some} <= known | _WORDS for some in words):
        return True
    return (
        len(others) > 1
        and all(cell.strip()[0].islower() for cell in first)
        and all(isinstance(cell, str) and cell.strip() and not cell.strip()[0].islower() for row in others for cell in row)
    )


_WORDS = {
    *"input output subject object question answer prompt completion response target source text label key value query word entity".split(),
    *"name term lemma translation category class title year date".split(),
}


def _cell(cell: Any, where: str) -> str:
    """A cell as a text."""
    if isinstance(cell, Integral) and not isinstance(cell, bool):
        return str(int(cell))
    if isinstance(cell, str) and cell.strip():
        return cell
    from pandas import isna

    if isinstance(cell, (list, tuple, dict)):
        why, instead = f"{cell!r} is not one text", "give one"
    elif isinstance(cell, str) or isna(cell) is True:
        why, instead = "a cell is empty", "fill it, or leave the line out (pandas reads the text NA so: keep_default_na=False)"
    else:
        why, instead = f"{cell!r} may be written in several ways", "give it as a text"
    raise DataError(where, why, instead)
