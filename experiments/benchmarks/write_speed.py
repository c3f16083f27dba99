"""Write the tables of docs/explanation/speed.md from the results of `training.py` and `generation.py`.

python -m experiments.benchmarks.write_speed
"""

import json
from pathlib import Path
from typing import Any

from experiments.benchmarks import tables
from rlhf_jax.runtime.files import write_text

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "speed.md"
KINDS = {"sft": "SFT", "reward_model": "reward model", "dpo": "DPO", "kto": "KTO", "ppo": "PPO", "grpo": "GRPO"}
SHAPES = {"tiny": "2 layers, d 128", "m": "6 layers, d 256", "S": "SmolLM2-135M's"}


def rows_of(name: str) -> list[dict[str, Any]]:
    """Rows of a file of results."""
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]


def training() -> list[str]:
    """Lines of the table of training: one for each kind, shape and data."""
    runs: dict[tuple[str, str, bool], dict[str, dict[str, Any]]] = {}
    for row in rows_of("training.jsonl"):
        runs.setdefault((row["kind"], row["shape"], row["data"] is not None), {})[row["side"]] = row
    lines = [
        "| work | model | rows | tokens/s | TRL's | ratio | to TRL grouped by length | utilisation | TRL's | memory |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (kind, shape, real), sides in sorted(
        runs.items(), key=lambda item: (not item[0][2], [*KINDS].index(item[0][0]))
    ):
        ours, peer, grouped = sides["ours"], sides["trl"], sides.get("trl, grouped")
        cells = [
            *(KINDS[kind], SHAPES[shape], "human pairs" if real else "full length"),
            *(f"{side['tokens_per_second']:,.0f}" for side in (ours, peer)),
            f"{peer['ratio']:.2f}",
            f"{grouped['ratio']:.2f}" if grouped else "",
            *(f"{side['utilisation']:.0%}".replace("%", " %") for side in (ours, peer)),
            f"{ours['peak_bytes'] / peer['peak_bytes']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", origin(rows_of("training.jsonl"))]


def sampling() -> list[str]:
    """Lines of the table of sampling."""
    lines = ["| model | tokens/s | transformers' | ratio | a token's time over that of reading weights and cache |"]
    lines.append("|---|--:|--:|--:|--:|")
    for row in rows_of("generation.jsonl"):
        cells = [
            SHAPES[row["shape"]],
            *(f"{row[name]:,.0f}" for name in ("tokens_per_second", "peer_tokens_per_second")),
            *(f"{row['peer_ratio']:.2f}", f"{1 / row['roofline_ratio']:.1f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", origin(rows_of("generation.jsonl"))]


def origin(rows: list[dict[str, Any]]) -> str:
    """Sentence about the commits, the machine, the versions and the dates of rows."""
    commits = ", ".join(sorted({row["commit"][:7] for row in rows}))
    machines = " and ".join(sorted({f"{row['machine']['processor']}, {row['machine']['cores']} cores" for row in rows}))
    versions = {"trl": set(), "torch": set(), "jax": set()}
    for row in rows:
        for name, found in versions.items():
            found |= {row["packages"][name]} if name in row.get("packages", {}) else set()
    packages = "; ".join(f"{name} {' and '.join(sorted(found))}" for name, found in versions.items() if found)
    peers = sorted({row["peer"].partition(",")[0] for row in rows if "peer" in row})
    dates = sorted({row["date"][:10] for row in rows})
    period = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return f"Commits {commits}; {machines}; {packages or '; '.join(peers)}; {period}."


def page(text: str) -> str:
    """Put the tables into the text of the page."""
    for name, lines in (("training", training()), ("sampling", sampling())):
        text = tables.put(text, name, lines)
    return text


if __name__ == "__main__":
    write_text(PAGE, page(PAGE.read_text(encoding="utf-8")))
