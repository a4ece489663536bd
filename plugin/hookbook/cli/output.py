"""What commands share: loading with a note on stderr, and results to stdout and to files."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hookbook.errors import ResultError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hookbook.adapter import Adapter
    from hookbook.results import Result

SUFFIXES = {"plot": (".png", ".svg", ".pdf"), "save": (".safetensors",), "report": (".html",)}


@contextlib.contextmanager
def step(words: str) -> Iterator[None]:
    """Says on stderr what is done, and how long it took; what libraries print meanwhile goes there, too."""
    typer.echo(f"{words} ...", err=True)
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        yield
    typer.echo(f"  done in {time.perf_counter() - start:.1f} s", err=True)


def load(name: str, backend: str, dtype: str = "float32", device: str | None = None) -> Adapter:
    """`hookbook.load`, with a note."""
    import hookbook as hb
    from hookbook.models import packages

    package = packages.PACKAGES.get(name.lower())
    first = package is not None and package.installed and not packages.converted(name).exists()
    with step(f"loading {name} through {backend}" + (" (converting it once, about a minute)" if first else "")):
        return hb.load(name, backend, dtype=dtype, device=device)


@dataclass(frozen=True)
class Output:
    """Where a result goes. What cannot be is found before anything is computed."""

    as_json: bool
    as_csv: bool
    files: dict[str, Path]
    """By key of `SUFFIXES`."""

    @classmethod
    def checked(cls, as_json: bool, as_csv: bool, force: bool, **files: Path | None) -> Output:
        """An output that can be written.

        Raises:
            typer.BadParameter: Two formats, or as for `check_file`.
            ResultError: Likewise.
            Refused: What draws pictures or pages is not installed.
        """
        if as_json and as_csv:
            raise typer.BadParameter("--json and --csv are two formats: give one")
        chosen = {kind: path for kind, path in files.items() if path is not None}
        for kind, path in chosen.items():
            check_file(f"--{kind}", path, SUFFIXES[kind], force)
        from hookbook.show.text import need

        if chosen.keys() & {"plot", "report"}:
            need("matplotlib", "a picture").use("Agg")
        if "report" in chosen:
            need("circuitsvis", "a report")
        return cls(as_json, as_csv, chosen)

    def write(self, result: Result, tables: Callable[[Any, int], Sequence[RenderableType]]) -> None:
        """Print the result, and write its files: all of them or none."""
        scratch = {path: path.with_name(f".{os.getpid()}.{path.name}") for path in self.files.values()}
        writers = {"plot": plot, "save": type(result).save, "report": lambda result, path: result.report(path)}
        try:
            for kind, path in self.files.items():
                with contextlib.redirect_stdout(sys.stderr):
                    writers[kind](result, scratch[path])
            for path, written in scratch.items():
                written.replace(path)
        finally:
            for written in scratch.values():
                written.unlink(missing_ok=True)
        if self.as_json:
            emit(to_json(rows(result.to_frame())))
        elif self.as_csv:
            from hookbook.reproduce.suite import to_csv

            emit(to_csv(result.to_frame()))
        else:
            from rich.console import Console

            console = Console(markup=False, highlight=False)
            for part in tables(result, console.width):
                console.print(part)
        for kind, path in self.files.items():
            typer.echo(f"{kind}: {path.absolute()}", err=True)


def check_file(option: str, path: Path, suffixes: Sequence[str], force: bool) -> None:
    """Find what cannot be written before anything is computed.

    Raises:
        typer.BadParameter: The name ends otherwise, is that of a folder, or its folder is not there or takes no files.
        ResultError: The file exists, and not `force`.
    """
    if path.suffix.lower() not in suffixes:
        raise typer.BadParameter(f"{option} {path}: give a name that ends in {' or '.join(suffixes)}")
    if path.is_dir():
        raise typer.BadParameter(f"{option} {path}: that is a folder")
    if not path.absolute().parent.is_dir():
        raise typer.BadParameter(f"{option} {path}: there is no folder {path.parent}")
    try:
        tempfile.NamedTemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        raise typer.BadParameter(f"{option} {path}: nothing can be written there: {error.strerror}") from error
    if path.exists() and not force:
        raise ResultError(f"{path} exists", "a file is not overwritten", "give --force, or another name")


def emit(text: str) -> None:
    """Print data for other programs: UTF-8 and line ends as they are, whatever the terminal has."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    print(text, end="" if text.endswith("\n") else "\n")


def rows(frame: Any) -> list[dict[str, Any]]:
    """A frame as plain rows."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")


def to_json(objects: Iterable[Mapping[str, Any]]) -> str:
    """A list of objects; numbers in full, and null where there is none or it is not finite."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(one) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps([plain(one) for one in objects], indent=1, ensure_ascii=False, allow_nan=False)


def plot(result: Result, path: Path) -> None:
    """`result.plot()` as a picture."""
    figure: Any = result.plot().figure
    figure.savefig(path, dpi=150)
