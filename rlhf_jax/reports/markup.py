"""HTML helpers shared by the sections of the report."""

import html
import json
import re
from typing import Any

import pandas as pd

# Not allowed in HTML: control characters, lone surrogates and noncharacters.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def text(value: Any) -> str:
    """Escape a value for HTML text."""
    return html.escape(_FORBIDDEN.sub("\ufffd", str(value)))


def fold(title: str, detail: str, body: str) -> str:
    """Wrap a body in a collapsed section."""
    return f"<details><summary>{text(title)} <small>{text(detail)}</small></summary>{body}</details>"


def as_json(value: Any) -> str:
    """Format a value as indented JSON."""
    return f"<pre>{text(json.dumps(value, indent=2, ensure_ascii=False))}</pre>"


def plain(value: Any) -> str:
    """Format a float with three significant digits, a missing value as a dash, and anything else as text."""
    if isinstance(value, float):
        return "–" if pd.isna(value) else f"{value:.3g}".replace("-", "−")
    return "–" if value is None else text(value)
