"""Types say what travels: no `Any`, no assertion that stands for a type, no positional slice of a batch."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlhf_jax"
ROOMS = ("core", "methods", "sampling", "runtime")

ALLOWED: dict[str, tuple[int, str]] = {
    "types.py": (1, "Json: a file's reader knows its form"),
}
"""Places that may stay, with the reason: ten at most."""

TO_GO: dict[str, int] = {}
"""Places that are on their way out: a number here only falls."""


def untyped(source: str) -> list[str]:
    """Uses of `Any`, assertions, and positional slices of batches such as `Rollout(*batch[:4])`: line and code."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if (isinstance(node, ast.Name) and node.id == "Any") or isinstance(node, ast.Assert):
            found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.Call):
            slices = [arg.value for arg in node.args if isinstance(arg, ast.Starred)]
            found += [
                (part.lineno, ast.unparse(part))
                for part in slices
                if is_slice(part) and "_fields" not in ast.unparse(part)
            ]
        elif isinstance(node, ast.Subscript) and is_slice(node) and "_fields" in ast.unparse(node.slice):
            found.append((node.lineno, ast.unparse(node)))
    return [f"line {line}: {code}" for line, code in sorted(found)]


def is_slice(node: ast.expr) -> bool:
    """Return whether an expression is a slice of something other than a shape."""
    if not isinstance(node, ast.Subscript) or not isinstance(node.slice, ast.Slice):
        return False
    return not (isinstance(node.value, ast.Attribute) and node.value.attr == "shape")


def files() -> dict[str, Path]:
    """The files that the rule holds for, by their path within the package."""
    paths = [PACKAGE / "types.py", *(path for room in ROOMS for path in sorted((PACKAGE / room).glob("*.py")))]
    return {str(path.relative_to(PACKAGE)): path for path in paths}


@pytest.mark.parametrize("name", files())
def test_types_say_what_travels(name):
    found = untyped(files()[name].read_text())
    assert len(found) <= ALLOWED.get(name, (0, ""))[0] + TO_GO.get(name, 0), "\n".join(found)


def test_at_most_ten_places_are_exceptions():
    assert sum(count for count, _ in ALLOWED.values()) <= 10
    for name, (count, _) in ALLOWED.items():
        assert len(untyped(files()[name].read_text())) >= count, f"{name}: lower its number"


def test_the_rule_finds_what_it_names():
    bad = [
        "def f(x: Any) -> int: ...",
        "assert x is not None",
        "Rollout(*batch[:4])",
        "PreferenceBatch(*rows[:len(PreferenceBatch._fields)])",
        "other = rows[: len(PreferenceBatch._fields)]",
    ]
    assert all(untyped(line) for line in bad)
    assert not untyped("leaf.reshape(-1, *leaf.shape[1:]), rows[:6]")
