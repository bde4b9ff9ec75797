"""The tutorials run from top to bottom, and are stored with their output."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = sorted((Path(__file__).parents[2] / "docs/tutorials").glob("*.ipynb"))


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    notebook = nbformat.read(path, as_version=4)
    stored = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in stored) and sum(bool(cell.outputs) for cell in stored) > 3
    done = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": tmp_path}}).execute()
    shown = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", []))
    assert "error:" not in shown and "Traceback" not in shown
