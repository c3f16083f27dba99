"""Wording of docstrings, comments and messages: how docstrings start, and phrases that are always better replaced."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(file for folder in ("rlhf_jax", "experiments", "examples") for file in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
RELATIVE = re.compile(r"(What|Who|Whom|Whose|Of|By|How|That|Those|Where|Whether|Whatever|Whoever|Which)\b")

PHRASES = {
    r"\bthat which\b": "name the thing",
    r"\bwhat (is|was) (judged|trained|said|told|given|asked|wanted|learnt|learned)\b": "use a noun: the model, ...",
    r"\btold apart\b": "say 'distinguish'",
    r"\bunless told otherwise\b": "say 'by default'",
    r"\bwhole or not at all\b": "say 'atomically'",
    r"\b(cut|put|stands?|lies) apart\b": "say 'separate' or 'separately'",
    r"\bthere (is|are) none such\b": "say what is missing",
    r"\b(nats|tokens|bytes|rows|seconds|minutes) an? (pair|row|token|step|run|seed|prompt|response|method|update)\b": (
        "say 'per'"
    ),
    r"\ba (share|score|name|number) that is none\b": "state the condition: 'unless 0 <= x < 1'",
    r"\bchosen by nobody\b": "say what was chosen, and how",
    r"\bmend (it|them|url|template|model)\b": "say 'correct' or 'fix'",
}


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield node.body[0].lineno, text


def prose(source: str, patterns: dict[str, str]) -> list[tuple[int, str]]:
    """Line and advice for every phrase of a source text that matches a pattern."""
    flat = re.sub(r"\s*\n\s*(#|f?\")?\s*", lambda match: " " * len(match[0]), source)  # phrases may span lines
    found = ((match.start(), advice) for pattern, advice in patterns.items() for match in re.finditer(pattern, flat))
    return sorted((source.count("\n", 0, start) + 1, advice) for start, advice in found)


@pytest.mark.parametrize("file", [*FILES, *TESTS], ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_start_with_a_verb_or_a_noun_phrase(file: Path):
    faults = [(line, text.splitlines()[0]) for line, text in docstrings(ast.parse(file.read_text("utf-8")))]
    faults = [fault for fault in faults if RELATIVE.match(fault[1])]
    assert not faults, "start with a verb ('Compute ...') or with the thing ('Clipped surrogate loss ...')"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_phrases_that_are_always_better_replaced(file: Path):
    assert prose(file.read_text("utf-8"), PHRASES) == []


def test_the_checks_find_faults():
    assert RELATIVE.match("What is trained.") and not RELATIVE.match("Whatsit.") and not RELATIVE.match("Offset.")
    text = 'x = 1  # a score that\n# is none\ny = """Loss in nats a pair."""\n'
    assert [line for line, _ in prose(text, {r"\bthat\s+is none\b": "", **PHRASES})] == [1, 3]
