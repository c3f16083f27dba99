"""HTML helpers shared by the sections of the report."""

import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

# Not allowed in HTML: control characters, lone surrogates and noncharacters.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def allowed(value: str) -> str:
    """Replace the characters that HTML does not allow."""
    return _FORBIDDEN.sub("\ufffd", value)


def text(value: Any) -> str:
    """Escape a value for HTML text."""
    return html.escape(allowed(str(value)))


def table_of(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Render a table of plain texts; the first cell of each row is its heading."""
    head = "".join(f'<th scope="col">{text(heading)}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{text(name)}</th>{"".join(f"<td>{text(value)}</td>" for value in values)}</tr>'
        for name, *values in rows
    )
    return scrolling(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def chart(name: str, title: str, caption: str, *, headed: bool) -> str:
    """Render the place of a chart, which `assets/charts.js` draws; `headed` shows its title."""
    heading = " data-headed" if headed else ""
    return (
        f'<figure class="chart" data-chart="{name}" data-title="{text(title)}"{heading}>'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def scrolling(table: str) -> str:
    """Wrap a table that may be wider than the screen; it can be scrolled with the keyboard."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="table">{table}</div>'


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
