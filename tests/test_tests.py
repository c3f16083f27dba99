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


def test_private_names_are_found():
    source = """
from jax._src import core
from rlhf_jax.stages import dpo, _hidden
value = dpo._loss + self._own + pair._replace(a=1).b
monkeypatch.setattr(dpo, "_extend", None)
monkeypatch.setattr("rlhf_jax.interop.gguf._CHUNK", 3)
"""
    assert set(private_names(ast.parse(source))) == {"_src", "_hidden", "_loss", "_extend", "_CHUNK"}
