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
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
CORE = ROOT / "rlhf_jax" / "core"
EVERYWHERE = ("test_goldens.py", "test_axes.py")
"""Tests that look at several modules; they run after the module's own."""

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


def is_noticed(mutant: Mutant) -> bool:
    """Whether a test fails: the module's own first, then those that look at several."""
    own = [ROOT / "tests/core" / name for name in (f"test_{mutant.module}.py", *EVERYWHERE)]
    paths = [path.relative_to(ROOT) for path in own if path.exists()]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(ROOT / "rlhf_jax", place / "rlhf_jax", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "tests", place / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", place)
        (place / "rlhf_jax/core" / f"{mutant.module}.py").write_text(mutant.source)
        cache = ROOT / ".pytest_cache" / "mutation"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", "-o", f"cache_dir={cache}"]
        environment = {**os.environ, "PYTHONPATH": folder}
        done = subprocess.run(
            [*command, *map(str, paths)], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, 1, 2):  # 2: the module cannot even be imported
            raise RuntimeError(f"pytest stopped with {done.returncode} on {mutant}\n{done.stdout}{done.stderr}")
        return done.returncode != 0


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
