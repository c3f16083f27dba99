"""`rlhf-jax fields [KIND]`: the fields of a kind of stage, with types, defaults and descriptions.

A field's description is the comment on its line, or on the lines right above it, in the source of its class. A section
without a comment is described by the first sentence of its class's docstring.
"""

import ast
import dataclasses
import functools
import inspect
import io
import shutil
import sys
import textwrap
import tokenize
import types
import typing
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from rlhf_jax.cli.output import until_closed
from rlhf_jax.cli.parser import Parser
from rlhf_jax.config import INT32_MAX, FunctionSource, ModelSource, Range, StageName
from rlhf_jax.loading.context import Common
from rlhf_jax.stages.kinds import KINDS, find_kind

MOST_COLUMNS = 100


def fields_verb(arguments: list[str]) -> None:
    """List the kinds of stages and the fields that all stages share, or the fields of one kind."""
    parser = Parser("rlhf-jax fields", "List the fields of a kind of stage; without KIND, the kinds and common fields.")
    parser.add_argument("kind", nargs="?", metavar="KIND", help=f"{', '.join(KINDS)}, or path/file.py:NAME")
    name = parser.parse_args(arguments).kind
    columns = min(shutil.get_terminal_size().columns, MOST_COLUMNS) if sys.stdout.isatty() else 80
    with until_closed():
        for line in _overview(columns) if name is None else _kind(name, columns):
            print(line)


def descriptions(section: type) -> dict[str, str]:
    """Return the descriptions of a dataclass's fields, by name; fields without one are left out.

    Raises OSError where there is no source.
    """
    found: dict[str, str] = {}
    for cls in reversed(section.__mro__):
        if dataclasses.is_dataclass(cls):
            found |= _comments(cls)
    for name, hint in typing.get_type_hints(section).items():
        sections = sections_of(hint)
        if name not in found and sections and set(_union_members(hint)) <= {*sections, types.NoneType}:
            first = [(inspect.getdoc(member) or "").split("\n\n")[0].replace("\n", " ") for member in sections]
            found[name] = " Or: ".join(first)
    return found


@functools.cache
def _comments(cls: type) -> Mapping[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = [
        token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT
    ]
    comments = {token.start[0]: token.string.removeprefix("#").strip() for token in tokens}
    alone = {token.start[0] for token in tokens if token.line.lstrip().startswith("#")}
    found = {}
    for node in [node for top in ast.parse(source).body if isinstance(top, ast.ClassDef) for node in top.body]:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = range(first, (node.end_lineno or node.lineno) + 1)
            text = " ".join(comments[line] for line in lines if line in comments)
            if text and not text.startswith("fmt:"):
                found[node.target.id] = text
    return found


def _overview(columns: int) -> Iterator[str]:
    yield "Kinds of stages (rlhf-jax fields KIND lists the fields of one):"
    yield ""
    for name, kind in KINDS.items():
        yield from _wrapped(f"{name:<20}{kind.summary}", 2, columns, hanging=20)
    yield ""
    yield "Fields outside the stages (* must be set in the config):"
    yield ""
    yield from _fields(Common, 0, columns, {})
    sections = Counter(
        field
        for kind in KINDS.values()
        for field, hint in typing.get_type_hints(kind.config).items()
        if sections_of(hint)
    )
    shared = sorted(field for field, count in sections.items() if count > 2)
    yield ""
    yield from _wrapped(f"Sections that several kinds share, listed under each kind: {', '.join(shared)}.", 0, columns)


def _kind(name: str, columns: int) -> Iterator[str]:
    kind = find_kind(name, "KIND")
    yield from _wrapped(f"{name}: {kind.summary}", 0, columns)
    yield ""
    yield "Fields (* must be set in the config):"
    yield ""
    yield from _fields(kind.config, 0, columns, {})


def _fields(section: type, indent: int, columns: int, shown: dict[type, str], path: str = "") -> Iterator[str]:
    """Lines of a section's fields. Args: shown has the sections that were listed before, with where they stand."""
    texts, hints = descriptions(section), typing.get_type_hints(section, include_extras=True)
    for field in dataclasses.fields(section):
        if field.name == "kind" and not path:
            continue
        default = default_text(field)
        shown_default = " *" if default is None else f" = {default}" if default else ""
        yield from _wrapped(f"{field.name}{shown_default}   {type_text(hints[field.name])}", indent, columns, hanging=6)
        text = texts.get(field.name, "")
        yield from _wrapped(text[:1].upper() + text[1:].removesuffix("."), indent + 6, columns)
        sections = sections_of(hints[field.name])
        for inner in sections:
            place = f"{path}{field.name}"
            if inner in shown:
                yield " " * (indent + 2) + f"{inner.__name__}: as under {shown[inner]}"
            elif len(sections) > 1:
                yield " " * (indent + 2) + f"{inner.__name__}:"
            if inner not in shown:
                shown[inner] = place
                yield from _fields(inner, indent + 2 * len(sections[:2]), columns, shown, f"{place}.")


def type_text(hint: Any) -> str:
    """Write a field's type, with its range, in few words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = [_range_text(extra) for extra in args[1:] if isinstance(extra, Range)]
        return " ".join([type_text(args[0]), *filter(None, bounds)])
    if origin is Literal:
        return " | ".join(map(repr, args))
    if origin in (types.UnionType, typing.Union):
        return " | ".join(dict.fromkeys(map(type_text, args)))
    if origin is tuple:
        inner = [type_text(arg) for arg in args if arg is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in args else f"({', '.join(inner)})"
    if dataclasses.is_dataclass(hint):
        return "section"
    names = {StageName: "stage", ModelSource: "stage or checkpoint", FunctionSource: "file.py:function"}
    return {types.NoneType: "None", int: "integer", float: "number", str: "text", bool: "bool", **names}[hint]


def _range_text(bounds: Range) -> str:
    low = (
        f"> {bounds.above:.10g}"
        if bounds.above is not None
        else f">= {bounds.at_least:.10g}"
        if bounds.at_least is not None
        else ""
    )
    most = None if bounds.at_most == INT32_MAX else bounds.at_most
    high = f"< {bounds.below:.10g}" if bounds.below is not None else f"<= {most:.10g}" if most is not None else ""
    return ", ".join(filter(None, (low, high)))


def default_text(field: dataclasses.Field) -> str | None:
    """Write a field's default; None if the field must be set, and nothing for a section that has defaults."""
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return None
    if dataclasses.is_dataclass(field.default):
        return ""
    text = repr(field.default)
    return text if len(text) <= 60 else f"{text[:50]}..."


def places(section: type, key: str) -> list[str]:
    """Dotted paths of the fields with a name in a section and in the sections within it, outer ones first."""
    hints = typing.get_type_hints(section)
    inner = [(name, each) for name, hint in hints.items() for each in sections_of(hint)]
    return ([key] if key in hints else []) + [f"{name}.{path}" for name, each in inner for path in places(each, key)]


def sections_of(hint: Any) -> list[Any]:
    """Return the dataclasses among the members of a type."""
    return [member for member in _union_members(hint) if dataclasses.is_dataclass(member)]


def _union_members(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return [inner for member in typing.get_args(hint) for inner in _union_members(member)]
    return [hint]


def _wrapped(text: str, indent: int, columns: int, hanging: int = 0) -> list[str]:
    return textwrap.wrap(
        text, columns, initial_indent=" " * indent, subsequent_indent=" " * (indent + hanging), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
