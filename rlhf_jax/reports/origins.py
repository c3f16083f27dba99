"""Provenance section of the report: source, machine, packages, and each stage's seeds, data and batch size."""

import json
from typing import Any

from rlhf_jax.reports.markup import as_json, fold, table_of, text
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.provenance import machine_name

HASH = 12
"""Characters of a hash that are shown; summaries contain all of it."""


def source_name(source: dict[str, Any]) -> str:
    """Describe the source of a `provenance`: its commit, or its version if there is no commit."""
    if source["commit"] is None:
        return f"version {source['version']} ({source['origin']})"
    return f"commit {source['commit'][:HASH]} ({'clean' if source['clean'] else 'with uncommitted changes'})"


def provenances(run: Run) -> dict[str, dict[str, Any]]:
    """Provenance of each complete stage; stages of older releases without one are left out."""
    complete = [name for name in run.stages if run.is_complete(name)]
    summaries = {name: run.summary(name) for name in complete}
    return {name: summary["provenance"] for name, summary in summaries.items() if "provenance" in summary}


def headline(run: Run) -> str:
    """Source, JAX version, machine and date of the last stage with a provenance, in one line; empty if none has one."""
    stages = [*provenances(run).values()]
    if not stages:
        return ""
    last, several = stages[-1], len(_environments(run)) > 1
    return (
        f"{source_name(last['source'])}, JAX {last['packages']['jax']}, {machine_name(last['machine'])}, "
        f"{last['date']}{'; some stages ran in another environment: see below' if several else ''}"
    )


def origins(run: Run) -> str:
    """Render the section: each environment with the stages that ran in it, then one row per stage."""
    by_stage = provenances(run)
    if not by_stage:
        return ""
    parts = []
    for stages, provenance in _environments(run):
        terms = {
            "stages": ", ".join(stages),
            "source": source_name(provenance["source"]),
            "machine": machine_name(provenance["machine"]),
            "packages": ", ".join(f"{name} {version}" for name, version in provenance["packages"].items()),
        }
        if provenance["source"].get("changed"):
            terms["changed files"] = ", ".join(provenance["source"]["changed"])
        if provenance.get("earlier"):
            terms["started by"] = "; ".join(
                f"{source_name(other['source'])}, {machine_name(other['machine'])}" for other in provenance["earlier"]
            )
        items = "".join(f"<dt>{text(term)}</dt><dd>{text(value)}</dd>" for term, value in terms.items())
        machine = fold("Machine", "devices, CPU features, flags", as_json(provenance["machine"]))
        parts.append(f"<dl>{items}</dl>{machine}")
    rows = [_row(name, provenance) for name, provenance in by_stage.items()]
    unknown = [name for name in run.stages if run.is_complete(name) and name not in by_stage]
    note = f'<p class="note">Not recorded: {text(", ".join(unknown))}.</p>' if unknown else ""
    headings = ["stage", "seeds", "rows per update", "tokens per update", "data, SHA-256", "config and inputs"]
    return "".join(parts) + table_of(headings, rows) + note


def _environments(run: Run) -> list[tuple[list[str], dict[str, Any]]]:
    """Group stages by environment; each group has its stages and their provenance."""
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for name, provenance in provenances(run).items():
        environment = [provenance[part] for part in ("source", "packages", "machine", "earlier")]
        groups.setdefault(json.dumps(environment, sort_keys=True), ([], provenance))[0].append(name)
    return [*groups.values()]


def _row(name: str, provenance: dict[str, Any]) -> list[str]:
    batch = provenance.get("batch")
    rows = "–" if batch is None else f"{batch['rows']} {batch['unit']}"
    if batch is not None and batch["micro_batches"] * batch["devices"] > 1:
        rows += f" (in {batch['micro_batches']} parts on {batch['devices']} devices)"
    hashes = ", ".join(f"{split} {digest[:HASH]}" for split, digest in provenance["sha256"].items() if digest)
    seeds = ", ".join(map(str, provenance["seeds"]))
    tokens = "–" if batch is None else f"{batch['tokens']:,.0f}"
    return [name, seeds, rows, tokens, hashes, provenance["config"]]
