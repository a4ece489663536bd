"""Runs the notebooks of docs/tutorials and writes them as they ran: `python docs/run_notebooks.py [NAMES]`.

Without names: all but those that need a server. What differs from run to run is left out, so that a notebook which says the same is the
same file.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

TUTORIALS = Path(__file__).parent / "tutorials"
SERVER = frozenset(["remote.ipynb"])
"""Notebooks that need a server: the remote tests run them."""
NOTEBOOKS = sorted(path.name for path in TUTORIALS.glob("*.ipynb") if path.name not in SERVER)
LIMIT = 1_000_000
"""Bytes of a notebook with its outputs."""


def run(name: str, timeout: int = 600) -> NotebookNode:
    """A notebook of the tutorials as it runs now; raises what a cell raises. The file stays as it is."""
    return executed(nbformat.read(TUTORIALS / name, as_version=4), timeout)


def executed(notebook: NotebookNode, timeout: int = 600) -> NotebookNode:
    """A notebook run from top to bottom in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        return NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()


def clean(notebook: NotebookNode) -> NotebookNode:
    """Without what differs from run to run: streams, progress bars, times, the Python version, and random names of cells."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.output_type != "stream" and not _is_widget(output)]
    return notebook


def _is_widget(output: NotebookNode) -> bool:
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def main(names: list[str]) -> int:
    """Run and write; a notebook that fails or is too large is not written, and the others are."""
    failed = 0
    for name in [Path(name).with_suffix(".ipynb").name for name in names] or NOTEBOOKS:
        began = time.monotonic()
        try:
            text = nbformat.writes(clean(run(name))) + "\n"
            if len(text.encode()) >= LIMIT:
                raise ValueError(f"{len(text.encode()):,} bytes, {LIMIT:,} are allowed: show less, or leave out an interactive view")
        except (CellExecutionError, ValueError, OSError) as error:
            failed += 1
            print(f"{name}: not written\n{error}", file=sys.stderr)
            continue
        (TUTORIALS / name).write_text(text, encoding="utf-8")
        print(f"{name}: {time.monotonic() - began:.0f} s, {len(text.encode()):,} bytes", flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
