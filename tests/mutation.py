"""Mutation testing: change the code in one place at a time, and see that a test fails.

    make mutation ARGS="core/kl core/ratios"        # modules of rlhf_jax; by default all of core/
    python -m tests.mutation core/kl --list         # the mutants, without running a test

A mutant has one change: plus and minus exchanged, or times and divided by, or `and` and `or` of masks; a minus or a
negated mask left out; a comparison turned round; a maximum for a minimum; the arms of `jnp.where` exchanged, or its
first arm alone. Annotations and error messages are left alone. The mutants of a module and their order depend on its
source alone.

Each mutant runs in a scratch copy of the package and its tests, never in the working tree: first the tests that name
the changed function or a caller of it, then the module's own test file, the others of its room that import it, and
SWEEPS. It has PATIENCE times the seconds that the same tests take without a change. Survivors, and mutants that took
longer, are printed as `file:line: old -> new`, and a count for each module; the exit code is 1 if there are survivors.
EQUIVALENT lists changes that no caller can see, with the reason. A run of all of core/ takes hours; --every=10 samples
it.
"""

import argparse
import ast
import collections
import concurrent.futures
import multiprocessing
import os
import pickle
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf_jax"
SWEEPS = {"core": ("test_goldens.py", "test_axes.py")}
"""Tests that look at a whole room; they run last."""

PATIENCE = 5.0
"""The tests of a mutant may take so many times as long as without a change."""

Outcome = Literal["noticed", "survived", "timed out"]

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["beartype", "hypothesis", "jax", "jaxtyping", "optax", "pytest"])

EQUIVALENT: dict[str, str] = {}
"""`room/module: old -> new`, and the reason why no caller can see the change."""

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
    """A module with one change: its line before and after, the function around it, and the whole changed source."""

    module: str
    line: int
    function: str
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"rlhf_jax/{self.module}.py:{self.line}: {self.before} -> {self.after}"

    @property
    def key(self) -> str:
        """The name of this change in EQUIVALENT, which does not depend on line numbers."""
        return f"{self.module}: {self.before} -> {self.after}"


def mutants(module: str) -> Iterator[Mutant]:
    """Every mutant of one module, in a fixed order."""
    return mutants_of(module, (PACKAGE / f"{module}.py").read_text())


def mutants_of(module: str, source: str) -> Iterator[Mutant]:
    """Every mutant of a module with this source."""
    tree = ast.parse(source)
    spared, pickled = _spared(tree), pickle.dumps(tree)
    for index, node in enumerate(ast.walk(tree)):
        if id(node) in spared:
            continue
        for change in _changes(node):
            changed = pickle.loads(pickled)  # faster than copy.deepcopy
            target = list(ast.walk(changed))[index]
            new = change(target)
            if new is not target:
                _replace(changed, target, new)
            assert isinstance(node, ast.expr)
            text, line = ast.unparse(ast.fix_missing_locations(changed)), node.lineno
            yield Mutant(module, line, _name_at(tree, line), ast.unparse(node), ast.unparse(new), text)


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


def _spared(tree: ast.AST) -> set[int]:
    """Identities of the nodes that are part of a type annotation, or of a raised error."""
    branches: list[ast.AST] = []
    for parent in ast.walk(tree):
        if isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)) and parent.returns:
            branches.append(parent.returns)
        if isinstance(parent, (ast.arg, ast.AnnAssign)) and parent.annotation:
            branches.append(parent.annotation)
        if isinstance(parent, ast.Raise):
            branches.append(parent)
        if isinstance(parent, ast.Assign) and "Literal" in ast.dump(parent.value):
            branches.append(parent)
        if isinstance(parent, ast.Module):  # unions of types, such as Beta = float | Float[Array, ""]
            branches += [each.value for each in parent.body if isinstance(each, ast.Assign) and _is_union(each.value)]
    return {id(inner) for branch in branches for inner in ast.walk(branch)}


def _is_union(node: ast.AST) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr)


def _definitions(tree: ast.Module) -> Iterator[tuple[set[str], ast.stmt]]:
    """Names that each statement of a module defines."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield {node.name}, node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}, node


def _name_at(tree: ast.Module, line: int) -> str:
    """Return a name that the statement at a line defines."""
    around = (names for names, node in _definitions(tree) if node.lineno <= line <= (node.end_lineno or line))
    return min(next(around, set()), default="")


def _users(tree: ast.Module, names: set[str]) -> set[str]:
    """Return the given names, and those that a module defines with their help."""
    found, before = set(names), 0
    while len(found) > before:
        before = len(found)
        for defined, node in _definitions(tree):
            used = {getattr(inner, "id", getattr(inner, "attr", None)) for inner in ast.walk(node)}
            found |= defined if used & found else set()
    return found


def tests_naming(mutant: Mutant, paths: list[str]) -> list[str]:
    """List the tests of these files, as `file::test`, that name the changed function or something that uses it.

    SWEEPS are left out: they would read the whole room.
    """
    names = _users(ast.parse((PACKAGE / f"{mutant.module}.py").read_text()), {mutant.function})
    return [
        f"{path}::{name}"
        for path in paths
        if Path(path).name not in SWEEPS.get(Path(mutant.module).parent.name, ())
        for name in sorted(_users(ast.parse((ROOT / path).read_text()), names))
        if name.startswith("test_")
    ]


def tests_of(module: str) -> list[str]:
    """The module's own test file, those of its room that import it, and those that look at the whole room."""
    room, _, name = module.rpartition("/")
    place, dotted = ROOT / "tests" / room, room.replace("/", ".")
    reading = [
        path.name
        for path in sorted(place.glob("test_*.py"))
        if re.search(rf"\b({dotted}\.{name}|{dotted} import .*\b{name})\b", path.read_text())
    ]
    sweeps = SWEEPS.get(room, ())
    names = dict.fromkeys([f"test_{name}.py", *reading, *sweeps])
    ordered = sorted(names, key=sweeps.__contains__)
    return [f"tests/{room}/{each}" for each in ordered if (place / each).exists()]


def copy_tree(source: Path, target: Path) -> None:
    """Copy the package, its tests and their configuration."""
    for tree in ("rlhf_jax", "tests"):
        shutil.copytree(source / tree, target / tree, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(source / "pyproject.toml", target)


def outcome_of(mutant: Mutant, source: Path, seconds: float | None) -> Outcome:
    """Run the tests of the mutant's module in a copy of `source` with this change, for so many seconds at most."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        copy_tree(source, place)
        (place / "rlhf_jax" / f"{mutant.module}.py").write_text(mutant.source)
        paths = tests_of(mutant.module)
        process = SERVER.Process(target=run_tests, args=(place, [tests_naming(mutant, paths), *([p] for p in paths)]))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            return "timed out"
        if process.exitcode not in (0, 1, 2):  # 2: the module cannot even be imported
            output = (place / "output").read_text()
            raise RuntimeError(f"pytest stopped with {process.exitcode} on {mutant}\n{output}")
        return "survived" if process.exitcode == 0 else "noticed"


def time_limit(module: str, snapshot: Path) -> float:
    """Run a module's tests without a change, and allow its mutants PATIENCE times as long."""
    unchanged = Mutant(module, 0, "", "", "", (snapshot / "rlhf_jax" / f"{module}.py").read_text())
    begun = time.monotonic()
    if outcome_of(unchanged, snapshot, None) != "survived":
        raise RuntimeError(f"the tests of {module} fail without a change: {' '.join(tests_of(module))}")
    return PATIENCE * (time.monotonic() - begun)


def run_tests(place: Path, calls: list[list[str]]) -> None:
    """Call pytest until a test fails, in a process forked from one that has imported everything but the package."""
    with (place / "output").open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.chdir(place)
    sys.path.insert(0, str(place))
    cache = ROOT / ".pytest_cache" / "mutation"
    for tests in filter(None, calls):  # most mutants fall in the first call, and need not wait for the others' imports
        code = pytest.main(["-x", "-q", "--assert=plain", "-p", "no:xdist", "-o", f"cache_dir={cache}", *tests])
        if code == pytest.ExitCode.USAGE_ERROR and "::" in tests[0]:
            continue  # the file cannot be imported, so that it has no such test: the next call says why
        if code:
            sys.exit(code)


def main(arguments: list[str] | None = None) -> int:
    """Print each mutant that survives, and the score; return 1 if one survives."""
    everything = sorted(str(path.relative_to(PACKAGE).with_suffix("")) for path in PACKAGE.rglob("*.py"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="such as core/kl; all of core by default")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--every", type=int, default=1, help="take every n-th mutant only")
    parser.add_argument("--list", action="store_true", help="list the mutants and run nothing")
    options = parser.parse_args(arguments)
    modules = [module.removeprefix("rlhf_jax/").removesuffix(".py") for module in options.modules]
    modules = modules or [name for name in everything if name.startswith("core/") and "__init__" not in name]
    unknown = [module for module in modules if module not in everything or not tests_of(module)]
    if unknown:
        parser.error(f"no such module of rlhf_jax, or none with tests: {', '.join(unknown)}")
    found = [mutant for module in modules for mutant in mutants(module)][:: options.every]
    if options.list:
        print(*found, sep="\n")
        return 0
    wanted = [mutant for mutant in found if mutant.key not in EQUIVALENT]
    counts: collections.Counter[tuple[str, Outcome]] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        snapshot = Path(folder)  # the working tree may change meanwhile
        copy_tree(ROOT, snapshot)
        limits = {module: time_limit(module, snapshot) for module in dict.fromkeys(mutant.module for mutant in wanted)}
        outcomes = pool.map(lambda mutant: outcome_of(mutant, snapshot, limits[mutant.module]), wanted)
        for mutant, outcome in zip(wanted, outcomes, strict=False):
            counts[mutant.module, outcome] += 1
            if outcome != "noticed":
                print(f"{mutant}  ({outcome})", flush=True)
    for module in modules:
        noticed, survived, slow = (counts[module, outcome] for outcome in ("noticed", "survived", "timed out"))
        known = sum(mutant.module == module and mutant.key in EQUIVALENT for mutant in found)
        print(f"{module}: {noticed} noticed, {survived} survived, {slow} timed out; {known} known to change nothing")
    return 1 if any(outcome == "survived" for _, outcome in counts) else 0


if __name__ == "__main__":
    sys.exit(main())
