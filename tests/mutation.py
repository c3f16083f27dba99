"""Does the suite notice a wrong sign or a lost mask in core? Changes one at a time, and runs the tests of that module.

    python -m tests.mutation [MODULE ...] [--jobs=2] [--every=1] [--list]

A mutant is the package with one change in one module of core: a plus for a minus (and the reverse), a product for a
quotient, a minus left out, a mask inverted or left out (`jnp.where` with its arms exchanged, or its first arm alone),
a maximum for a minimum, a comparison turned round. One that no test notices is printed with its line. EQUIVALENT names
those that change nothing a caller can see, and why. Exits with 1 where another one lives.
"""

import argparse
import ast
import concurrent.futures
import copy
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "rlhf_jax" / "core"
EVERYWHERE = ("test_goldens.py", "test_axes.py")
"""Tests that look at all of core; they run after the module's own."""

TIMEOUT = 600.0
"""Seconds for the tests of one mutant."""

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["beartype", "hypothesis", "jax", "jaxtyping", "optax", "pytest"])

EQUIVALENT: dict[str, str] = {}
"""`module: line of source -> what it became`, and why nobody can see it."""

OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARISONS: dict[type, type] = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
CALLS = {"maximum": "minimum", "minimum": "maximum", "max": "min", "min": "max", "pmax": "pmin", "pmin": "pmax"}


class Mutant(NamedTuple):
    """One change: the module's whole source with it, and its line before and after."""

    module: str
    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.module}.py:{self.line}: {self.before}  ->  {self.after}"

    @property
    def key(self) -> str:
        """What EQUIVALENT knows it by."""
        return f"{self.module}: {self.before} -> {self.after}"


def mutants(module: str) -> Iterator[Mutant]:
    """Every change of one module of core. Annotations, raised errors and comparisons of names are left alone."""
    source = (CORE / f"{module}.py").read_text()
    tree = ast.parse(source)
    for index, node in enumerate(ast.walk(tree)):
        for change in _changes(node):
            changed = copy.deepcopy(tree)
            target = list(ast.walk(changed))[index]
            new = change(target)
            if new is not target:
                _replace(changed, target, new)
            if _inside_annotation(tree, node):
                continue
            assert isinstance(node, ast.expr)
            after = ast.unparse(new)
            yield Mutant(module, node.lineno, ast.unparse(node), after, ast.unparse(ast.fix_missing_locations(changed)))


def _changes(node: ast.AST) -> Iterator:
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        yield lambda target: _with(target, op=OPERATORS[type(node.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Invert)):
        yield lambda target: target.operand
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
        yield lambda target: _with(target, ops=[COMPARISONS[type(node.ops[0])]()])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in CALLS:
            yield lambda target: _with(target, func=_with(target.func, attr=CALLS[target.func.attr]))
        if node.func.attr == "where" and len(node.args) == 3:
            yield lambda target: _with(target, args=[target.args[0], target.args[2], target.args[1]])
            yield lambda target: target.args[1]


def _with(node: ast.AST, **fields: object) -> ast.AST:
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def _replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
            elif isinstance(value, list):
                value[:] = [new if item is old else item for item in value]


def _inside_annotation(tree: ast.AST, node: ast.AST) -> bool:
    """Types are no arithmetic, and what is said of bad input is no result."""
    for parent in ast.walk(tree):
        spared: list[ast.AST] = []
        if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)) and parent.returns:
            spared.append(parent.returns)
        if isinstance(parent, (ast.arg, ast.AnnAssign)) and parent.annotation:
            spared.append(parent.annotation)
        if isinstance(parent, ast.Raise):
            spared.append(parent)
        if isinstance(parent, ast.Assign) and "Literal" in ast.dump(parent.value):
            spared.append(parent)
        if any(node is inner for branch in spared for inner in ast.walk(branch)):
            return True
    return False


def tests_of(module: str) -> list[str]:
    """The module's own tests, those that read it beside others, and those that look at all of core."""
    own = f"test_{module}.py"
    reading = [
        path.name
        for path in sorted((ROOT / "tests/core").glob("test_*.py"))
        if re.search(rf"\b(core\.{module}|core import .*\b{module})\b", path.read_text())
    ]
    names = dict.fromkeys([own, *reading, *EVERYWHERE])
    return [
        f"tests/core/{name}"
        for name in sorted(names, key=EVERYWHERE.__contains__)
        if (ROOT / "tests/core" / name).exists()
    ]


def is_noticed(mutant: Mutant) -> bool:
    """Whether a test of it fails."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for tree in ("rlhf_jax", "tests"):
            shutil.copytree(ROOT / tree, place / tree, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", place)
        (place / "rlhf_jax/core" / f"{mutant.module}.py").write_text(mutant.source)
        process = SERVER.Process(target=run_tests, args=(place, tests_of(mutant.module)))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():  # a search that does not end
            process.kill()
            return True
        if process.exitcode not in (0, 1, 2):  # 2: the module cannot even be imported
            output = (place / "output").read_text()
            raise RuntimeError(f"pytest stopped with {process.exitcode} on {mutant}\n{output}")
        return process.exitcode != 0


def run_tests(place: Path, paths: list[str]) -> None:
    """What a process does, forked from one that has imported all but the package."""
    with (place / "output").open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(place)
    sys.path.insert(0, str(place))
    cache = ROOT / ".pytest_cache" / "mutation"
    for path in paths:  # one after another: most mutants fall in the first, and need not wait for the others' imports
        code = pytest.main(["-x", "-q", "--assert=plain", "-p", "no:xdist", "-o", f"cache_dir={cache}", path])
        if code:
            sys.exit(code)


def main() -> int:
    """Prints each mutant that lives, and the score."""
    modules = sorted(path.stem for path in CORE.glob("*.py") if path.stem != "__init__")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(modules)}; all by default")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--every", type=int, default=1, help="only every so manieth mutant")
    parser.add_argument("--list", action="store_true", help="name the mutants and run nothing")
    options = parser.parse_args()
    unknown = set(options.modules) - set(modules)
    if unknown:
        parser.error(f"core has no {', '.join(sorted(unknown))}")
    found = [mutant for module in options.modules or modules for mutant in mutants(module)][:: options.every]
    if options.list:
        print(*found, sep="\n")
        return 0
    wanted = [mutant for mutant in found if mutant.key not in EQUIVALENT]
    for module in dict.fromkeys(mutant.module for mutant in wanted):
        if is_noticed(Mutant(module, 0, "nothing", "nothing", (CORE / f"{module}.py").read_text())):
            raise RuntimeError(f"the tests of {module} fail as it is: {' '.join(tests_of(module))}")
    alive = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for mutant, noticed in zip(wanted, pool.map(is_noticed, wanted), strict=True):
            if not noticed:
                alive.append(mutant)
                print(f"lives: {mutant}", flush=True)
    print(f"{len(wanted) - len(alive)} of {len(wanted)} noticed; {len(found) - len(wanted)} known to change nothing")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
