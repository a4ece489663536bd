"""The code of the pages, and how each language of a fence is tried."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hookbook import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted(str(path.relative_to(ROOT)) for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("**/*.md")])
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S)
THEIRS = re.compile(r'title="[^"]*not run: [^"]+"')
"""A `py` fence is of another library that cannot be here; its title says why. Everything in `python` fences is run."""

SERVER_PAGES = ("docs/how-to/run-on-ndif.md",)
"""Their Python needs a server: `make test-remote` runs it."""
OTHER_PROGRAMS = ("llama-cli", "lm_eval")
OWN = ("demo", "doctor")
"""Commands of ours that are run in processes of their own, as lines with a redirection are; others in this one, where models are loaded."""
LONG = ("reproduce", "doctor")
"""Commands of minutes: only their arguments are parsed. `tests/real/test_reproduce.py` runs one effect of one suite, and
`tests/agreement` what the doctor looks at."""


@dataclass(frozen=True)
class Fence:
    page: str
    line: int
    info: str
    body: str

    @property
    def language(self) -> str:
        return (self.info.split() or [""])[0]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def fences(page: str, *languages: str) -> list[Fence]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [Fence(page, text.count("\n", 0, m.start()) + 1, m["info"].strip(), m["body"]) for m in FENCE.finditer(text)]
    return [fence for fence in found if not languages or fence.language in languages]


def run_page(page: str, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
    """Every `python` fence of a page, in order, in one namespace and the current folder."""
    names: dict[str, Any] = {"__name__": "__main__"} if namespace is None else namespace
    for fence in fences(page, "python"):
        # as far down as it stands in the page, so that a traceback names the page's own line
        exec(compile("\n" * fence.line + fence.body, str(ROOT / fence.page), "exec"), names)
    return names


def call(line: str) -> tuple[int, str]:
    """The exit code of a line with our command, and the end of what it said."""
    program, *words = shlex.split(line)
    words += ["--help"] if words[0] in LONG and words[1:] else []
    if words[0] in OWN and "--help" not in words or set(line) & set("|<>&;"):
        line = " ".join([str(Path(sys.executable).with_name(program)), line.partition(" ")[2]])
        done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=570, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        return done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *words])
        try:
            cli.main()
        except SystemExit as stopped:
            return int(stopped.code or 0), out.getvalue()[-4000:]
    return 0, out.getvalue()[-4000:]


def check_json(fence: Fence) -> None:
    json.loads(fence.body)


def check_toml(fence: Fence) -> None:
    tomllib.loads(fence.body)


def check_shell(fence: Fence) -> None:
    """What the shell is told: our own commands are run, targets of make and extras of pip must exist."""
    for line in filter(None, (part.split(" #")[0].strip() for part in fence.body.splitlines())):
        program, *words = line.removeprefix("$ ").split()
        if program == "make":
            targets = re.findall(r"^([a-z0-9-]+):.*##", (ROOT / "Makefile").read_text(), re.M)
            assert words and all(word in targets for word in words if "=" not in word), f"{fence}: no target of make: {line}"
        elif program == "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            named = [name for group in re.findall(r"hookbook\[([a-z0-9,]+)\]", line) for name in group.split(",")]
            assert words[0] == "install" and all(name in extras for name in named), f"{fence}: no such extra: {line}"
        elif program == "hookbook":
            code, said = call(line.removeprefix("$ "))
            assert code == 0, f"{fence}: {line}\n{said}"
        else:
            assert program in OTHER_PROGRAMS, f"{fence}: nobody checks {line!r}"


def check_shown(fence: Fence) -> None:
    """Nothing is run: a picture, or a tree."""


def check_theirs(fence: Fence) -> None:
    assert THEIRS.search(fence.info), f"{fence}: say in the title why it is not run, or make it a `python` fence"
    try:
        compile(fence.body, str(fence), "exec")
    except SyntaxError:
        compile(f"{{\n{fence.body}}}", str(fence), "eval")  # or an entry of a dict


CHECKS = {"json": check_json, "toml": check_toml, "console": check_shell, "sh": check_shell, "text": check_shown, "py": check_theirs}
