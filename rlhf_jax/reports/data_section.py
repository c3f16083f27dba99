"""Section of the report about the data: lengths, columns, repeated rows, and warnings, as printed before training."""

from rlhf_jax.loading.data_report import SHOWN, joined, read_reports, unseen
from rlhf_jax.reports.markup import table_of, text
from rlhf_jax.reports.run import Run


def data(run: Run) -> str:
    """Render a table of lengths for each stage that reads data which no earlier stage reads, and the sentences."""
    reports, parts = [], []
    for name in run.stages:
        for report in read_reports([run.directory(name)]):
            new = unseen(report, reports)
            reports.append(report)
            if not any(new.values()):
                continue
            parts.append(f"<h3>{text(name)}</h3>")
            if new["splits"]:
                parts.append(_lengths(new["splits"]))
            items = [f"<strong>Warning:</strong> {text(warning)}" for warning in new["warnings"]]
            items += map(text, joined(new["notes"]))
            parts.append(f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>" if items else "")
    if not parts:
        return ""
    note = "Lengths in tokens, by the first stage that reads the rows. Cut: the share of rows above the limit."
    return f'<p class="note">{note}</p>{"".join(parts)}'


def _lengths(splits: dict[str, dict]) -> str:
    rows = []
    for split, described in splits.items():
        for row in described["lengths"]:
            values = [f"{row[name]:.0%}" if name == "cut" else str(row[name]) for name in SHOWN[1:]]
            rows.append([f"{split} · {row['column']}", *values])
    return table_of(["", *SHOWN[1:]], rows)
