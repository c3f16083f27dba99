"""Provenance of a run as readers see it: source, machine, packages, and each stage's seeds, data and batch."""

import json
from typing import Any

from rlhf_jax.reports.markup import as_json, fold, text
from rlhf_jax.reports.run import Run

HASH = 12
"""Characters of a hash that are shown; summaries have it whole."""


def source_named(source: dict[str, Any]) -> str:
    """The source of a `provenance` in a few words: its commit, or its version where it has none."""
    if source["commit"] is None:
        return f"version {source['version']} ({source['origin']})"
    return f"commit {source['commit'][:HASH]} ({'clean' if source['clean'] else 'with uncommitted changes'})"


def machine_named(machine: dict[str, Any]) -> str:
    """The machine of a `provenance` in a few words: its accelerators, or its processor and the threads in use."""
    if machine["platform"] != "cpu":
        kinds = machine["devices"]
        return " and ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
    target = machine["cpu_target"]
    compiled = f" (compiled for {target['name']})" if target else ""
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{threads} of {machine['processor']}{compiled}"


def found_in(run: Run) -> dict[str, dict[str, Any]]:
    """The provenance of each complete stage; stages of releases that kept none are left out."""
    complete = [name for name in run.stages if run.is_complete(name)]
    summaries = {name: run.summary(name) for name in complete}
    return {name: summary["provenance"] for name, summary in summaries.items() if "provenance" in summary}


def headline(run: Run) -> str:
    """One line: source, JAX, machine and date of the last stage that says so; empty where none does."""
    found = [*found_in(run).values()]
    if not found:
        return ""
    last, several = found[-1], len(_environments(run)) > 1
    return (
        f"{source_named(last['source'])}, JAX {last['packages']['jax']}, {machine_named(last['machine'])}, "
        f"{last['date']}{'; not all stages were run so: see below' if several else ''}"
    )


def origins(run: Run) -> str:
    """The section of the report: each environment with the stages that ran in it, then a row a stage."""
    found = found_in(run)
    if not found:
        return ""
    parts = []
    for stages, one in _environments(run):
        rows = {
            "stages": ", ".join(stages),
            "source": source_named(one["source"]),
            "machine": machine_named(one["machine"]),
            "packages": ", ".join(f"{name} {version}" for name, version in one["packages"].items()),
        }
        if one["source"].get("changed"):
            rows["changed files"] = ", ".join(one["source"]["changed"])
        if one.get("earlier"):
            rows["begun by"] = "; ".join(
                f"{source_named(other['source'])}, {machine_named(other['machine'])}" for other in one["earlier"]
            )
        terms = "".join(f"<dt>{text(term)}</dt><dd>{text(value)}</dd>" for term, value in rows.items())
        parts.append(f"<dl>{terms}</dl>{fold('Machine', 'devices, CPU features, flags', as_json(one['machine']))}")
    body = "".join(_row(name, one) for name, one in found.items())
    unknown = [name for name in run.stages if run.is_complete(name) and name not in found]
    note = f'<p class="note">Not recorded: {text(", ".join(unknown))}.</p>' if unknown else ""
    return (
        f'<section id="origins"><h2>Where the numbers come from</h2>{"".join(parts)}'
        '<div class="scroll"><table><thead><tr><th>stage</th><th>seeds</th><th>rows an update</th>'
        "<th>tokens an update</th><th>data, SHA-256</th><th>config and inputs</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>{note}</section>"
    )


def _environments(run: Run) -> list[tuple[list[str], dict[str, Any]]]:
    """The different environments, each with its stages."""
    groups: dict[str, tuple[list[str], dict[str, Any]]] = {}
    for name, one in found_in(run).items():
        key = json.dumps([one["source"], one["packages"], one["machine"], one["earlier"]], sort_keys=True)
        groups.setdefault(key, ([], one))[0].append(name)
    return [*groups.values()]


def _row(name: str, one: dict[str, Any]) -> str:
    batch = one.get("batch")
    rows = "–" if batch is None else f"{batch['rows']} {batch['unit']}"
    if batch is not None and batch["micro_batches"] * batch["devices"] > 1:
        rows += f" (in {batch['micro_batches']} parts on {batch['devices']} devices)"
    hashes = ", ".join(f"{split} {digest[:HASH]}" for split, digest in one["sha256"].items() if digest)
    seeds = ", ".join(map(str, one["seeds"]))
    tokens = "–" if batch is None else f"{batch['tokens']:,.0f}"
    cells = [seeds, text(rows), tokens, text(hashes), one["config"]]
    return f"<tr><th>{text(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
