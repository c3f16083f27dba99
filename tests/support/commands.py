"""The command line as a test calls it."""

import io
import sys

import pytest

from rlhf_jax.main import main


def succeeds(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What a command prints."""
    status, captured = main(list(arguments)), capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


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
