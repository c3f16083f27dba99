"""Section of the report about the reward model on held-out pairs: calibration, scores, and accuracy by group."""

from typing import Any

from rlhf_jax.reports import frames
from rlhf_jax.reports.markup import chart, text
from rlhf_jax.reports.results_section import intervals
from rlhf_jax.reports.reward_figures import GROUPS, span
from rlhf_jax.reports.run import Run


def calibration(run: Run, number: int) -> str:
    """Render the section of the last reward model; empty if it has not recorded its calibration."""
    report = frames.calibration_of(run)
    if report is None:
        return ""
    error = f"Expected calibration error {100 * report['ece']:.1f} %. Dashed: perfect calibration. Bars: Wilson's 95 %"
    parts = [
        chart(f"reliability-{number}", "Calibration", f"{error} intervals.", headed=True),
        chart(f"scores-{number}", "Scores of held-out responses", "Chosen and rejected responses.", headed=True),
    ]
    whole = report["all"]
    everything = ("all pairs", whole["accuracy"], whole["low"], whole["high"], "grey")
    for name, title, unit in GROUPS:
        if name in report:
            rows = [_group(row) for row in report[name]]
            heading = f"Pairs ranked correctly, {title[0].lower()}{title[1:]}: {unit}"
            parts.append(f"<h3>{text(heading)}</h3>{intervals([everything, *rows])}")
    note = "Groups of about equal size, with Wilson's 95 % intervals. Line: 50 %, chance."
    return f'<div class="pair">{"".join(parts[:2])}</div>{"".join(parts[2:])}<p class="note">{text(note)}</p>'


def _group(row: dict[str, Any]) -> tuple[str, float, float, float, str]:
    return span(row["from"], row["to"]), row["accuracy"], row["low"], row["high"], "pink"
