"""The suite's own structure: tests share code through tests/support, and use public names."""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
PRIVATE_BY_CONVENTION = {"_replace", "_fields", "_asdict", "_make", "_field_defaults"}
"""Public names of NamedTuple that begin with an underscore."""

ALLOWED = {
    "parity/trl_1_12.py": "TRL's numbers are read from the local variables of its `train()`",
    "parity/trl_1_16.py": "TRL's trainers compute a loss in private methods only",
    "parity/trl_1_16_online.py": "TRL's trainers compute advantages and a loss in private methods only",
    "parity/trl_1_16_preferences.py": "TRL's trainers compute a loss in private methods only",
    "parity/trl_curves_online.py": "TRL's trainers sample in a private method, which gives them our samples here",
    "models/test_attention.py": "jax has no public way to claim a version of cuDNN on a machine without one",
}
"""Files that use private names of a library, and why. No file uses a private name of rlhf_jax."""

RAISES_BY_ITSELF = {
    "test_our_numbers_are_those_of_trl": "calls the checks of parity/comparison.py, by name",
}
"""Tests without an assertion of their own, and how they fail."""


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in PRIVATE_BY_CONVENTION


def private_names(tree: ast.AST) -> Iterator[str]:
    """Private names that a module imports, reads from another object, or patches."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from filter(private, names)
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split(".") if private(part))
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            yield from [node.attr] * (private(node.attr) and not own)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and "attr" in node.func.attr:
            texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            yield from (part for text in texts for part in text.split(".") if private(part))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_test_module_is_imported():
    """Helpers that two modules need belong in tests/support."""
    found = {
        str(path): name
        for path in FILES
        for name in imported(ast.parse(path.read_text()))
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split("."))
    }
    assert found == {}


def test_no_private_name_is_used_without_a_reason():
    """A test that needs one gets a public seam, or a line in ALLOWED."""
    users = {str(path.relative_to(TESTS)): [*private_names(ast.parse(path.read_text()))] for path in FILES}
    users = {path: names for path, names in users.items() if names}
    assert {path: names for path, names in users.items() if path not in ALLOWED} == {}
    assert users.keys() == ALLOWED.keys(), "an exception that no file needs"


def test_helpers_stand_in_support_or_beside_the_parity_tests():
    """Helpers in parity/ import torch; the mutation tool is a program; conftest.py belongs to pytest."""
    elsewhere = [path for path in FILES if path.parent.name not in ("support", "parity")]
    names = {path.name for path in elsewhere if not path.name.startswith("test_")}
    assert names == {"conftest.py", "mutation.py"}


def asserting(trees: list[ast.Module], helpers: frozenset[str] = frozenset()) -> dict[str, bool]:
    """Tell of each function of some modules whether it asserts something, itself or by a function that it uses."""
    functions: dict[str, list[ast.FunctionDef]] = {}
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                functions.setdefault(node.name, []).append(node)
    names = {name: {used for body in bodies for used in used_names(body)} for name, bodies in functions.items()}
    found = helpers
    while more := {
        name for name in functions.keys() - found if any(map(is_assertion, names[name])) or names[name] & found
    }:
        found |= more
    return {name: name in found for name in functions}


def used_names(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            yield "assert_"
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr


def is_assertion(name: str) -> bool:
    return name.startswith("assert_") or name in ("raises", "warns", "fail", "check_grads")


def test_every_test_asserts_something():
    shared = [path for path in FILES if not path.name.startswith("test_")]
    helpers = frozenset(
        name for name, yes in asserting([ast.parse(path.read_text()) for path in shared]).items() if yes
    )
    found = set()
    for path in FILES:
        each = asserting([ast.parse(path.read_text())], helpers)
        found |= {name for name, yes in each.items() if name.startswith("test_") and not yes}
    assert found == RAISES_BY_ITSELF.keys()


def test_constants_are_not_asserted_and_nothing_is_compared_with_itself():
    found = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert):
                test = node.test
                same = isinstance(test, ast.Compare) and ast.dump(test.left) == ast.dump(test.comparators[0])
                calls = any(isinstance(part, ast.Call) for part in ast.walk(test))  # again, with the same result
                if isinstance(test, ast.Constant) or (same and not calls):
                    found.append(f"{path.relative_to(TESTS)}:{node.lineno}")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                two = [ast.dump(argument) for argument in node.args[:2]]
                if node.func.attr.startswith("assert_") and len(two) == 2 and two[0] == two[1]:
                    found.append(f"{path.relative_to(TESTS)}:{node.lineno}")
    assert found == []


def test_tests_without_an_assertion_are_found():
    source = """
def helper(x):
    assert x
def test_by_itself():
    assert 1 + 1 == 2
def test_by_a_helper():
    helper(1)
def test_nothing():
    print(1)
"""
    found = asserting([ast.parse(source)])
    assert found == {"helper": True, "test_by_itself": True, "test_by_a_helper": True, "test_nothing": False}


def test_private_names_are_found():
    source = """
from jax._src import core
from rlhf_jax.stages import dpo, _hidden
value = dpo._loss + self._own + pair._replace(a=1).b
monkeypatch.setattr(dpo, "_extend", None)
monkeypatch.setattr("rlhf_jax.interop.gguf._CHUNK", 3)
"""
    assert set(private_names(ast.parse(source))) == {"_src", "_hidden", "_loss", "_extend", "_CHUNK"}
