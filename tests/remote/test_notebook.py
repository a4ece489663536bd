"""The notebook on remote models runs from top to bottom on the server; it compares its numbers with a model on this machine itself."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "run_notebooks.py"))


@pytest.mark.skipif(
    os.environ.get("HOOKBOOK_TEST_SERVER") == "sandbox",
    reason="it is written for a trusted key; recipes in a sandbox are in test_recipes.py",
)
def test_the_notebook_runs():
    (name,) = TOOL["SERVER"]
    done = TOOL["run"](name)  # raises what a cell raises
    assert all(cell.execution_count for cell in done.cells if cell.cell_type == "code")
    assert any("torch.isclose" in cell.source for cell in done.cells) and sum("assert same(" in cell.source for cell in done.cells) >= 2
    assert not [output for cell in done.cells for output in cell.get("outputs", []) if "127.0.0.1" in str(output)]
