"""One name, one thing: names of modules and of public classes."""

import ast
import collections
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "rlhf_jax"

MODULES = {
    "best_of_n": "a command, the function behind it, and a stage kind",
    "chat": "a command, and the data's chats",
    "dpo": "a stage kind, and its method",
    "export": "a command, and the function behind it",
    "logprobs": "a command, the function behind it, and core's log-probabilities",
    "sample": "a command, and the function behind it",
    "score": "a command, and the function behind it",
}
"""Names that several modules may have, with the reason."""


def modules() -> list[Path]:
    """The package's modules, but for `__init__` and `__main__`."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if not path.stem.startswith("__")]


def test_modules_have_names_of_their_own():
    counts = collections.Counter(path.stem for path in modules())
    assert {name for name, count in counts.items() if count > 1} == MODULES.keys()


def test_public_classes_have_names_of_their_own():
    trees = [ast.parse(path.read_text()) for path in modules()]
    names = [node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    counts = collections.Counter(name for name in names if not name.startswith("_"))
    assert not {name for name, count in counts.items() if count > 1}
