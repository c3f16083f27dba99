"""Notebooks run top to bottom, errors fatal, and stand in the repository as their scripts say."""

import os
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import pytest

from tests.support import xla_flags

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path: Path) -> Any:
    return jupytext.read(path)


def test_there_are_notebooks_but_few():
    assert 1 <= len(NOTEBOOKS) <= 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_its_script(path):
    notebook, script = read(path), read(path.with_suffix(".py"))
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_its_figures(path):
    notebook = read(path)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.nightly
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    notebook = read(path.with_suffix(".py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("XLA_FLAGS", xla_flags.XLA_FLAGS)
        patch.setenv("RLHF_JAX_DATA", str(tmp_path / "nothing fetched"))
        client = nbclient.NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
        )
        client.execute(env=dict(os.environ))
    images = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(images) >= 4
    assert (tmp_path / "runs" / "smoke" / "report.html").exists()
