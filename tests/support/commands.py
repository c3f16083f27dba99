"""The command line as a test calls it."""

import io
import json
import sys
from typing import Any
from unittest import mock

import pytest

from rlhf_jax.main import main
from rlhf_jax.reports import report


def succeeds(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Return the output of a command."""
    status, captured = main(list(arguments)), capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def run_without_figures(*arguments: str) -> None:
    """Run an experiment; figures of its report would take longer than its tiny stages."""
    with mock.patch.object(report, "draw", return_value={}):
        assert main(list(arguments)) == 0


def fails(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The one message of a command that must fail without a traceback."""
    status, captured = main(list(arguments)), capsys.readouterr()
    assert status == 1
    assert "Traceback" not in captured.err + captured.out
    assert captured.err.startswith("Error: ")
    assert "bug" not in captured.err
    return captured.err


def reads(monkeypatch: pytest.MonkeyPatch, content: str | bytes) -> None:
    """Gives the next command an input."""
    encoded = content.encode() if isinstance(content, str) else content
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(encoded), encoding="utf-8"))


def jsonl(rows: list[dict[str, Any]]) -> str:
    """The text of a JSON lines file."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def said(completion: Any) -> str:
    """The text of an answer, whether it is a string or a chat."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def best_of_n(capsys, monkeypatch, rows: list[dict[str, Any]], *arguments: str) -> list[dict[str, Any]]:
    """The rows that `best-of-n` writes for rows on its standard input."""
    reads(monkeypatch, jsonl(rows))
    return [json.loads(line) for line in succeeds(capsys, "best-of-n", *arguments).splitlines()]
