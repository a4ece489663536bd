"""Imports run down only, through every file of the package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def layers() -> Any:
    spec = importlib.util.spec_from_file_location("layers", DOCS / "layers.py")
    assert spec is not None and spec.loader is not None
    sys.modules["layers"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_import_runs_up_or_in_a_circle(layers):
    found = layers.modules()
    assert {"hookbook.adapters.bridge", "hookbook.recipes.reading.patchscopes", "hookbook.engine.runs"} <= set(found) and len(found) > 100
    assert layers.wrong(found) == []
    assert set(layers.arrows(found)) >= layers.DOORS, "a door is not used: take it out of the table"


def test_every_module_has_a_room_and_every_room_modules(layers):
    tops = {(name.split(".") + ["__init__"])[1] for name in layers.modules()}
    listed = [top for room in layers.ROOMS for top in room.modules]
    assert sorted(listed) == sorted(tops)
    for at, room in enumerate(layers.ROOMS):
        assert set(room.uses) <= {below.name for below in layers.ROOMS[:at]}, room.name


def test_arrows_are_found_wherever_they_stand(layers, tmp_path):
    """Inside functions, for types alone, relative, of a module or of a name in it; and what is not allowed is named."""
    for name, text in {
        "__init__.py": "",
        "__init__.pyi": "from .recipes.one import a as a\n",
        "errors.py": "def f():\n    from hookbook.recipes import one\n",
        "card.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hookbook.errors import f\n",
        "recipes/__init__.py": "",
        "recipes/one.py": "from ..card import b\nimport hookbook.recipes.two\n",
        "recipes/two.py": "from . import one\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = layers.modules((("hookbook", tmp_path),))
    assert set(layers.arrows(found)) == {
        ("hookbook", "hookbook.recipes.one"),
        ("hookbook.errors", "hookbook.recipes.one"),
        ("hookbook.card", "hookbook.errors"),
        ("hookbook.recipes.one", "hookbook.card"),
        ("hookbook.recipes.one", "hookbook.recipes.two"),
        ("hookbook.recipes.two", "hookbook.recipes.one"),
    }
    up, circle = layers.wrong(found)
    assert up == "hookbook.errors imports hookbook.recipes.one: ground does not use recipes"
    assert circle == "a circle among hookbook.card, hookbook.errors, hookbook.recipes.one, hookbook.recipes.two"
