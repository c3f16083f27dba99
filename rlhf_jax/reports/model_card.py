"""Model card of a stage: README.md of an exported model, with the record of the run that trained it."""

import json

from rlhf_jax.reports import frames, table
from rlhf_jax.reports.cautions import cautions
from rlhf_jax.reports.origins import provenances, source_name
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.provenance import machine_name

CARD = "README.md"


def model_card(run: Run, stage: str, name: str) -> str:
    """Write a card in Markdown: results with intervals and cautions, the stages up to this one, sources and the config.

    Args: name is the heading.
    """
    kind = run.kind(stage)
    parts = [
        f"---\nlibrary_name: transformers\ntags:\n- rlhf_jax\n- {json.dumps(kind)}\n---\n",
        f"# {name}\n",
        f"Trained by rlhf_jax: stage `{stage}`, of kind `{kind}`.\n",
        *_results(run, stage),
        "## Training\n",
        *_training(run, stage),
        "The config of the stage:\n",
        f"```json\n{json.dumps(run.config(stage), indent=2, ensure_ascii=False)}\n```\n",
    ]
    return "\n".join(parts)


def _results(run: Run, stage: str) -> list[str]:
    """Rows of the results table for the stage's method and the reference; empty if no evaluation compared it."""
    if not run.of_kind("evaluate", complete=True):
        return []
    results = frames.comparison(run)
    methods = {stage, frames.reference(run)}
    rows = [row for row in table.cells(run) if row[0].removesuffix(table.CHOSEN).strip() in methods]
    if stage not in set(results["method"]):
        return []
    shown = table.columns(run)
    lines = [_line(["method", *(column.heading for column in shown)]), _line(["---"] * (len(shown) + 1))]
    lines += [_line(row) for row in rows]
    meanings = [f"- {column.heading}: {column.meaning}" for column in shown]
    warnings = [f"> **Caution:** {sentence}\n" for sentence in cautions(run)]
    return ["## Results\n", *warnings, "\n".join(lines), "", " ".join(table.notes(run)), "", "\n".join(meanings), ""]


def _training(run: Run, stage: str) -> list[str]:
    """Table of the stage and of those that it was trained from, with what is known of where each ran."""
    known = provenances(run)
    lines = [_line(["stage", "kind", "wall time", "source", "machine", "date"]), _line(["---"] * 6)]
    for name in [*_sources(run, stage), stage]:
        seconds = run.summary(name).get("time/seconds") if run.is_complete(name) else None
        record = known.get(name)
        where = ["–"] * 3
        if record is not None:
            where = [source_name(record["source"]), machine_name(record["machine"]), record["date"]]
        lines.append(_line([name, run.kind(name), "–" if seconds is None else f"{seconds:.0f} s", *where]))
    parts = ["\n".join(lines), ""]
    if stage in known:
        record = known[stage]
        packages = ", ".join(f"{package} {version}" for package, version in record["packages"].items())
        hashes = ", ".join(f"{split} `{digest}`" for split, digest in record["sha256"].items() if digest)
        seeds = ", ".join(map(str, record["seeds"]))
        parts.append(f"Seeds: {seeds}. Packages: {packages}.{f' SHA-256 of the data: {hashes}.' if hashes else ''}\n")
    return parts


def _sources(run: Run, stage: str) -> list[str]:
    """Stages that a stage reads, directly or through others, in the order of the run."""
    found: set[str] = set()
    waiting = [stage]
    while waiting:
        new = {name for name in run.config(waiting.pop())["inputs"] if name in run.stages} - found
        found |= new
        waiting += new
    return [name for name in run.stages if name in found]


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in cells)} |"
