"""docs/how-to/add-a-recipe.md is carried out in a copy of the project, and the tests that a new recipe must pass are run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.fences import ROOT, Fence, fences

PAGE = "docs/how-to/add-a-recipe.md"
PLACES = {"plugin/hookbook/__init__.pyi": "from .recipes.", "tests/makers.py": "MAKERS: dict[str, Any] = {\n"}
"""Where a line is added, and what it goes before or after."""


def files() -> dict[str, str]:
    """What the guide says to write, by path."""
    titled = [(re.search(r'title="([\w/.]+)', fence.info), fence) for fence in fences(PAGE)]
    return {found[1]: fence.body for found, fence in titled if found is not None and isinstance(fence, Fence)}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The project with the guide carried out."""
    folder = tmp_path_factory.mktemp("guide") / "hookbook"
    leave = shutil.ignore_patterns(".*", "__pycache__", "site", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, folder, symlinks=True, ignore=leave)
    for name, body in files().items():
        path = folder / name
        if name not in PLACES:
            assert not path.exists() and path.parent.is_dir(), name
            path.write_text(body, encoding="utf-8")
            continue
        text, mark = path.read_text(encoding="utf-8"), PLACES[name]
        at = text.index(mark) + (len(mark) if mark.endswith("\n") else 0)
        path.write_text(text[:at] + body + text[at:], encoding="utf-8")
    run(folder, "docs/generate.py")
    return folder


def run(folder: Path, *words: str) -> str:
    env = os.environ | {"PYTHONPATH": str(folder / "plugin"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_guide_is_short():
    """Registration, test and page included; a page of its own is written from the docstring."""
    assert set(PLACES) < set(files()) and sum(body.count("\n") for body in files().values()) <= 75


@pytest.mark.hooked
def test_the_guides_recipe_passes_what_a_new_recipe_must(copy):
    files = ("unit/test_occlusion", "test_packaging", "test_layers", "unit/test_report", "unit/test_frames")
    chosen = "Occlusion or occlusion or packaging or layers or maker"
    said = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"tests/{name}.py" for name in files), "-k", chosen)
    assert re.search(r"\d+ passed", said) and "failed" not in said
    assert "hb.occlusion" in (copy / "docs/reference/recipes.md").read_text(encoding="utf-8")
    assert "::: hookbook.Occlusion" in (copy / "docs/reference/api/reading.md").read_text(encoding="utf-8")


def test_it_plans_and_is_saved_like_any_other(copy):
    code = """
import torch
import hookbook as hb
from hookbook.testing import toy
plan, found = hb.occlusion.plan(toy(), "abc", "d"), hb.occlusion(toy(), "abc", "d")
again = hb.Occlusion.load(found.save("occlusion.safetensors"))
print(plan.climbs, again.settings["cost"]["climbs"], again.settings["neutral"], torch.equal(again.effects, found.effects))
"""
    assert run(copy, "-c", code).split() == ["2", "2", "_", "True"]
