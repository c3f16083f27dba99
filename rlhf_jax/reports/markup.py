"""Pieces of HTML that several sections of the report are made of."""

import html
import json
import re
from typing import Any

import pandas as pd

# Not allowed in HTML: controls, lone surrogates, and what is no character at all.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def text(value: Any) -> str:
    """A value as text of a document."""
    return html.escape(_FORBIDDEN.sub("\ufffd", str(value)))


def fold(title: str, detail: str, body: str) -> str:
    """A section that opens on a click."""
    return f"<details><summary>{text(title)} <small>{text(detail)}</small></summary>{body}</details>"


def as_json(value: Any) -> str:
    """A value as indented JSON."""
    return f"<pre>{text(json.dumps(value, indent=2, ensure_ascii=False))}</pre>"


def plain(value: Any) -> str:
    """A figure with three digits, a dash for what was not measured, or a text."""
    if isinstance(value, float):
        return "–" if pd.isna(value) else f"{value:.3g}".replace("-", "−")
    return "–" if value is None else text(value)
