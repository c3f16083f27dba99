"""Execution of the notebooks, and the pairs of script and notebook.

    python notebooks/execute.py              execute all scripts, and store the outputs in their notebooks
    python notebooks/execute.py 03 04        only those whose names start so
    python notebooks/execute.py --text       after changes of the text alone: keep the stored outputs

Each runs in an empty directory of its own; with `--workdir=DIR`, all run in DIR, where they share stages. The notebook
records a hash of the code that its outputs are from.
"""

import argparse
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import jupytext
import nbclient
import nbformat

NOTEBOOKS = Path(__file__).parent
SCRIPTS = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py"))


def read(path: Path) -> Any:
    """Read a script or a notebook."""
    return jupytext.read(path)


def code_hash(notebook: Any) -> str:
    """SHA-256 of the code cells."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()


def execute(script: Path, directory: Path, **environment: str) -> Any:
    """Execute a script's cells in order in a directory, and return the notebook with outputs. The first error raises."""
    notebook = read(script)
    paths = os.pathsep.join(filter(None, [str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH")]))
    client = nbclient.NotebookClient(
        notebook,
        timeout=3600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(directory)}},
    )
    client.execute(env={**os.environ, "PYTHONPATH": paths, **environment})
    return notebook


def store(script: Path, notebook: Any) -> None:
    """Write an executed notebook beside its script, with stable metadata and cell numbers as ids."""
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    notebook.metadata = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "executed_sha256": code_hash(notebook),
    }
    nbformat.write(notebook, script.with_suffix(".ipynb"))


def with_stored_outputs(script: Path) -> Any:
    """Combine a script with the outputs of its notebook. Raises SystemExit if these are from other code."""
    notebook, stored = read(script), read(script.with_suffix(".ipynb"))
    if code_hash(notebook) != stored.metadata["executed_sha256"]:
        raise SystemExit(f"the code of {script.name} has changed: execute it without --text")
    before = (cell for cell in stored.cells if cell.cell_type == "code")
    for cell in notebook.cells:
        if cell.cell_type == "code":
            old = next(before)
            cell.outputs, cell.execution_count = old.outputs, old.execution_count
    return notebook


def main() -> None:
    """Execute the named notebooks, and store them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="first characters of names; default: all")
    parser.add_argument("--text", action="store_true", help="keep the stored outputs, if the code has not changed")
    parser.add_argument("--workdir", type=Path, help="directory to run in; default: a new one for each notebook")
    arguments = parser.parse_args()
    for script in SCRIPTS:
        if arguments.names and not script.name.startswith(tuple(arguments.names)):
            continue
        if arguments.text:
            store(script, with_stored_outputs(script))
            continue
        start = os.times()
        with tempfile.TemporaryDirectory() as empty:
            store(script, execute(script, arguments.workdir or Path(empty)))
        end = os.times()
        processor = end.children_user + end.children_system - start.children_user - start.children_system
        print(f"{script.stem}: {end.elapsed - start.elapsed:.0f} s, of processor time {processor:.0f} s")


if __name__ == "__main__":
    main()
