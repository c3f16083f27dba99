"""Links from pages to the repository: source files become pages with numbered lines, other files are copied.

Pages link to files of the repository as Markdown does anywhere: `[k3](../../rlhf_jax/core/kl.py#k3)`. The fragment
names a function, class, method or constant; `#k3:text` is the first line of it that contains `text`, and `#:text` the
first such line of the file. The site shows the source from which it was built, so that no link goes stale.
"""

import ast
import functools
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s#:]+)(?:#([^)\s]+))?\)")
FENCE = re.compile(r"^( *)(```+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
ROOT_PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files at the root of the repository that are pages of the site, with their names there."""


def rewritten(markdown: str, place: str, page: str, pages: set[str]) -> str:
    """Rewrite links to files outside of the site as links to their copies in it.

    Args: place is the path of the text in the repository, page that of the page in the site; pages are the paths of all
        pages and pictures. Raises ValueError for a link to a missing file, or to a missing name in one.
    """

    def replace(match: re.Match[str]) -> str:
        text, path, fragment = match.groups()
        if posixpath.normpath(posixpath.join(posixpath.dirname(page), path)) in pages:
            return match[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
        inside = ROOT_PAGES.get(target, target.removeprefix("docs/"))
        if (target.startswith("docs/") or target in ROOT_PAGES) and inside in pages:
            anchor = f"#{fragment}" if fragment else ""
            return f"{text}({_relative(inside, page)}{anchor})"
        if target == "README.md":
            return f"{text}({_relative('README.md', page)})"
        file = ROOT / target
        if file.is_dir():
            return text[1:-1]
        copy, anchor = copy_of(target), ""
        if fragment:
            anchor = f"#__codelineno-0-{line_of(source_of(target), fragment, target)}"
        elif not file.exists():
            raise ValueError(f"{place} links to {path}, which does not exist")
        return f"{text}({_relative(copy, page)}{anchor})"

    return _outside_of_fences(markdown, lambda part: LINK.sub(replace, part))


def moved(markdown: str, old: str, new: str) -> str:
    """Rewrite the relative links of a text that moves from one path in the repository to another."""

    def replace(match: re.Match[str]) -> str:
        text, path, fragment = match.groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(old), path))
        return f"{text}({_relative(target, new)}{f'#{fragment}' if fragment else ''})"

    return _outside_of_fences(markdown, lambda part: LINK.sub(replace, part))


def targets(markdown: str, place: str) -> set[str]:
    """Paths in the repository of the files, outside of docs/, that a text links to."""
    found = set()
    for _, path, _ in LINK.findall(FENCE.sub("", markdown)):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), path))
        inside = target.startswith(("docs/", "..")) or target in ROOT_PAGES or target == "README.md"
        if not inside and (ROOT / target).is_file():
            found.add(target)
    return found


def copy_of(target: str) -> str:
    """Path in the site of a file of the repository."""
    return f"source/{target}.md" if target.endswith(".py") else f"files/{target}"


def source_page(target: str) -> str:
    """Page with the numbered lines of a Python file, which the search leaves out."""
    return (
        "---\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n"
        f'# {target}\n\n`````python linenums="1"\n{source_of(target)}`````\n'
    )


@functools.cache
def source_of(target: str) -> str:
    """Text of a file of the repository."""
    return (ROOT / target).read_text(encoding="utf-8")


def line_of(source: str, fragment: str, name: str = "the file") -> int:
    """Find the line of a symbol in Python source, or with `symbol:text` of a text in it.

    Raises ValueError if there is no such symbol or text.
    """
    symbol, _, text = fragment.partition(":")
    node: ast.AST = ast.parse(source)
    for part in filter(None, symbol.split(".")):
        found = [child for child in getattr(node, "body", []) if part in _names(child)]
        if not found:
            raise ValueError(f"{name} has no {symbol}")
        node = found[-1]  # of overloads, the implementation
    lines = source.splitlines()
    first, last = getattr(node, "lineno", 1), getattr(node, "end_lineno", len(lines))
    matching = [number for number in range(first, last + 1) if text in lines[number - 1]]
    if not matching:
        raise ValueError(f"{name} has no {text!r} in {symbol or 'it'}")
    return matching[0]


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _outside_of_fences(markdown: str, change) -> str:
    parts, start = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[start : fence.start()]), fence[0]]
        start = fence.end()
    return "".join([*parts, change(markdown[start:])])


def _relative(target: str, page: str) -> str:
    return posixpath.relpath(target, posixpath.dirname(page) or ".")
