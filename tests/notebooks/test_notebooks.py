"""The notebooks: pairs in sync, stored outputs of the present code, the parts of a lecture, and execution."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from notebooks.execute import SCRIPTS, code_hash, execute, read
from tests.support import xla_flags

ROOT = Path(__file__).parents[2]
QUICKEST = ("03_exact_optimum", "04_dpo_family", "06_overoptimisation")
"""Notebooks that neither download nor train a network."""

ALGORITHMIC = {
    "grad", "value_and_grad", "vjp", "jvp", "jacfwd", "jacrev", "scan", "while_loop", "fori_loop", "vmap",
    "optax", "apply_updates", "log_sigmoid", "log_softmax_cross_entropy", "minimize", "root_scalar",
}  # fmt: skip
"""Names with which a notebook would differentiate, optimise or define a loss of its own."""

MACHINE = re.compile(r"/(?:root|home|tmp|usr|var|opt|work|Users|content)/|site-packages|\.venv|\d+\.\d+\.\d+\.\d+")

all_notebooks = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def stored(script: Path) -> Any:
    return read(script.with_suffix(".ipynb"))


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook: Any) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def images(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for cell in code(notebook) for output in cell.get("outputs", []))


def algorithmic(source: str) -> set[str]:
    """Functions and classes that a cell defines, and the names of `ALGORITHMIC` that it uses."""
    if source.startswith("%%writefile"):  # code of the reader's own, in a file
        return set()
    found = set()
    for node in ast.walk(ast.parse(re.sub(r"^%.*$", "", source, flags=re.MULTILINE))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Lambda):
            found.add("lambda")
        elif isinstance(node, ast.Attribute | ast.Name | ast.alias):
            name = (
                node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else node.name
            )
            found |= ALGORITHMIC & set(name.split("."))
    return found


def test_the_index_names_each_of_the_ten():
    assert [path.stem[:2] for path in SCRIPTS] == [f"{number:02}" for number in range(1, 11)]
    index = (ROOT / "notebooks" / "README.md").read_text()
    assert re.findall(r"\]\((\d\d_\w+)\.ipynb\)", index) == [path.stem for path in SCRIPTS]
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == {path.stem for path in SCRIPTS}


@all_notebooks
def test_a_notebook_is_its_script(script):
    assert [(cell.cell_type, cell.source) for cell in stored(script).cells] == [
        (cell.cell_type, cell.source) for cell in read(script).cells
    ]


@all_notebooks
def test_outputs_are_those_of_the_present_code_run_in_order(script):
    notebook = stored(script)
    assert notebook.metadata["executed_sha256"] == code_hash(notebook), f"run notebooks/execute.py {script.name[:2]}"
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert images(notebook) >= 2
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


@all_notebooks
def test_outputs_are_free_of_the_machine(script):
    outputs = [
        {**output, "data": {kind: data for kind, data in output.get("data", {}).items() if kind != "image/png"}}
        for cell in code(stored(script))
        for output in cell.outputs
    ]
    assert MACHINE.findall(json.dumps(outputs)) == []
    assert "\\u001b" not in json.dumps(outputs), "control sequences of a terminal"


@all_notebooks
def test_a_notebook_is_a_lecture(script):
    text, cells = prose(stored(script)), stored(script).cells
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    place = repository.removeprefix("https://github.com/")
    assert text.startswith(f"# {script.name[:2]} · ")
    assert f"colab.research.google.com/github/{place}/blob/main/notebooks/{script.stem}.ipynb" in text
    parts = ["**Question.**", "## What to notice", "## Exercise", "<details><summary>Answer</summary>", "</details>"]
    places = [text.find(part) for part in parts]
    assert places == sorted(places) and min(places) > 0 and text.count("<details>") == text.count("</details>")
    assert "$$" in text or "$" in text, "an equation"
    first = next(cell for cell in cells if cell.cell_type == "code").source
    assert f'"git+{repository}"' in first and first == code(stored(SCRIPTS[0]))[0].source


@all_notebooks
def test_a_notebook_defines_no_algorithm(script):
    assert set().union(*(algorithmic(cell.source) for cell in code(read(script))[1:])) == set()


def test_algorithms_are_found():
    assert algorithmic("def loss(x):\n    return x") == {"loss"}
    assert algorithmic("g = jax.value_and_grad(f)") == {"value_and_grad"}
    assert algorithmic("import optax\nf = lambda x: x") == {"optax", "lambda"}
    assert algorithmic("%matplotlib inline\nx = tabular.train_on_pairs(pairs)") == set()


@pytest.mark.parametrize(
    "script",
    [pytest.param(path, marks=() if path.stem in QUICKEST else pytest.mark.nightly) for path in SCRIPTS],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs(script, tmp_path):
    """Top to bottom in an empty directory; the quickest ones without any data."""
    environment = {"XLA_FLAGS": xla_flags.XLA_FLAGS if script.stem in QUICKEST else ""}
    if script.stem in QUICKEST:
        environment["RLHF_JAX_DATA"] = str(tmp_path / "nothing fetched")
    notebook = execute(script, tmp_path, **environment)
    assert images(notebook) == images(stored(script))
    assert not [output for cell in code(notebook) for output in cell.outputs if output.get("name") == "stderr"]


@pytest.mark.nightly
def test_the_first_cell_installs_the_package_where_it_is_missing(tmp_path):
    """From a wheel, into an environment without the package; then the quickest notebooks run there as scripts."""
    wheels, place = tmp_path / "wheels", tmp_path / "empty"
    place.mkdir()
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", wheels, ROOT], check=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python, (wheel,) = tmp_path / "venv" / "bin" / "python", wheels.glob("*.whl")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"RLHF_JAX_SOURCE": str(wheel), "PIP_NO_DEPS": "1"}

    def run(*arguments: str | Path) -> str:
        done = subprocess.run([python, *arguments], cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    install = code(read(SCRIPTS[0]))[0].source
    run("-c", install)
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (others,) = Path(sys.prefix).glob("lib/python*/site-packages")
    (packages / "behind.pth").write_text(f"{others}\n")  # what the package depends on, instead of a download
    assert run("-c", "import rlhf_jax; print(rlhf_jax.__file__)").strip() == str(packages / "rlhf_jax" / "__init__.py")
    for name in QUICKEST:
        run(ROOT / "notebooks" / f"{name}.py")
