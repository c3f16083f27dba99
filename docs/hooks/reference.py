"""Reference pages that are generated from the code: the fields of every kind of stage, and the commands."""

import contextlib
import dataclasses
import io
import os
import typing
from collections.abc import Iterator
from itertools import zip_longest

from rlhf_jax.cli.fields import default_text, descriptions, sections_of, type_text
from rlhf_jax.loading.context import Common
from rlhf_jax.main import USAGE, VERBS, main
from rlhf_jax.stages.kinds import KINDS

EXPLAINED = {
    "sft": "sft.md",
    "reward_model": "reward-models.md",
    "dpo": "dpo.md",
    "kto": "kto.md",
    "online_dpo": "online-dpo.md",
    "ppo": "ppo.md",
    "group_rl": "group-methods.md",
    "best_of_n": "best-of-n.md",
    "rejection_sampling": "best-of-n.md",
    "pool": "best-of-n.md",
}
"""Pages of explanation by kind of stage."""


def pages() -> dict[str, str]:
    """All generated pages: path in the site -> Markdown."""
    return {
        "reference/stages/README.md": overview(),
        **{f"reference/stages/{name}.md": stage_page(name) for name in KINDS},
        "reference/commands.md": commands_page(),
    }


def overview() -> str:
    """Page with the kinds of stages, and the fields outside of them."""
    lines = [
        "# Stages",
        "",
        "An experiment is a list of stages. `kind` selects what a stage does; the other fields of its section say how.",
        "The pages are generated from the dataclasses of the configs, like the output of `rlhf-jax fields`.",
        "",
        "| kind | purpose |",
        "|---|---|",
        *(f"| [`{name}`]({name}.md) | {kind.summary} |" for name, kind in KINDS.items()),
        "",
        "## Fields outside the stages",
        "",
        *_section(Common, "config", {}),
    ]
    return "\n".join(lines) + "\n"


def stage_page(name: str) -> str:
    """Page with all fields of a kind of stage."""
    kind = KINDS[name]
    lines = [f"# `{name}`", "", f"{kind.summary}."]
    if name in EXPLAINED:
        lines += ["", f"[How it works](../../explanation/{EXPLAINED[name]})"]
    lines += ["", "## Fields", "", *_section(kind.config, f"config.{name}", {})]
    return "\n".join(lines) + "\n"


def _section(section: type, path: str, shown: dict[type, str]) -> Iterator[str]:
    """Table of a section's fields, followed by its sections. Args: shown are the sections listed before, by place."""
    texts, hints = descriptions(section), typing.get_type_hints(section, include_extras=True)
    nested: list[tuple[str, type]] = []
    yield "| field | type | default | description |"
    yield "|---|---|---|---|"
    for field in dataclasses.fields(section):
        if field.name == "kind":
            continue
        place = f"{path}.{field.name}"
        links = []
        for inner in sections_of(hints[field.name]):
            if inner not in shown:
                shown[inner] = place
                nested.append((place, inner))
            links.append(f"[`{shown[inner]}`](#{anchor(shown[inner])})")
        text = texts.get(field.name, "")
        text = f"{text[:1].upper()}{text[1:].removesuffix('.')}." if text else ""
        cells = [
            f"`{field.name}`",
            f"`{type_text(hints[field.name])}`",
            default(field),
            " ".join(filter(None, [_escaped(text), f"Fields: {', '.join(dict.fromkeys(links))}." if links else ""])),
        ]
        yield f"| {' | '.join(map(_without_bars, cells))} |"
    for place, inner in nested:
        yield ""
        yield f"### `{place}` {{ #{anchor(place)} }}"
        yield ""
        if inner.__doc__ and not inner.__doc__.startswith(f"{inner.__name__}("):
            yield _escaped(" ".join(inner.__doc__.split("\n\n")[0].split()))
            yield ""
        yield from _section(inner, place, shown)


def default(field: dataclasses.Field) -> str:
    """Cell with a field's default."""
    text = default_text(field)
    return "required" if text is None else f"`{text}`" if text else ""


def anchor(place: str) -> str:
    """Anchor of a section's heading."""
    return place.replace(".", "-")


def _without_bars(cell: str) -> str:
    """Keep bars from ending a cell of a table; within code they do not."""
    return _outside_of_code(cell, {"|": "&#124;"})


def _escaped(text: str) -> str:
    """Keep `*`, `<` and `_` of descriptions from being read as Markdown."""
    return _outside_of_code(text, {character: f"\\{character}" for character in "*<_["})


def _outside_of_code(text: str, replacements: dict[str, str]) -> str:
    parts = text.split("`")
    changed = [part.translate(str.maketrans(replacements)) for part in parts[::2]]
    return "`".join(part for pair in zip_longest(changed, parts[1::2]) for part in pair if part is not None)


def commands_page() -> str:
    """Page with the output of `--help` of every command."""
    lines = ["# Commands", "", "```text", USAGE.rstrip(), "```"]
    for verb in VERBS:
        lines += ["", f"## `{verb}`", "", "```text", help_of(verb), "```"]
    return "\n".join(lines) + "\n"


def help_of(verb: str) -> str:
    """Output of a command's `--help`, at 100 columns."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100"
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
            main([verb, "--help"])
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)
    return printed.getvalue().rstrip()
