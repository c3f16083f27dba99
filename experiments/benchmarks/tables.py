"""Tables in pages of the documentation, between the marks <!-- NAME --> and <!-- end of NAME -->."""

from collections.abc import Sequence


def put(text: str, name: str, lines: Sequence[str]) -> str:
    """Replace the table of a name in the text of a page. Raises ValueError if a mark is missing."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    start = text.index(begin) + len(begin)
    return "\n".join([text[:start], "", *lines, text[text.index(end, start) :]])
