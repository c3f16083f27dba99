"""Write the table of finished quickstart runs into the docs, its claims into the README, and keep the runs' results.

    python experiments/movie_reviews/write_readme.py runs/seed0 runs/seed1 runs/seed2

Every number comes from files that the runs wrote. Each run is the whole pipeline with its own seed; intervals are
Student's t over the runs, and methods are compared by their differences within a run.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from rlhf_jax.core.statistics import t_interval
from rlhf_jax.reports.origins import source_name
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.files import write_json, write_text
from rlhf_jax.runtime.provenance import machine_name

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TUTORIAL = Path("docs") / "tutorials" / "quickstart.md"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"
CLAIM_WIN_RATE, CLAIM_KL = 0.6, 15.0
LEVEL = 0.95


def main(workdirs: list[str]) -> None:
    """Read the runs, keep their results, and replace the text between the marks of the README and of the tutorial."""
    if len(workdirs) < 2:
        raise SystemExit("name two runs or more, of different seeds: one run has no interval over seeds")
    runs = [Run(workdir) for workdir in workdirs]
    tables = [run.results() for run in runs]
    for run, table in zip(runs, tables, strict=True):
        keep(run, int(table["seed"].iloc[0]))
    found = claims(runs, tables)
    table = markdown(pd.concat(tables), selected(runs))
    replace(ROOT / "README.md", [*found, "", record(runs, tables, "")])
    replace(ROOT / TUTORIAL, [*table, "", record(runs, tables, "../../"), "", *found])


def replace(file: Path, lines: list[str]) -> None:
    """Replace the text between the marks of a file."""
    before, rest = file.read_text(encoding="utf-8").split(BEGIN)
    write_text(file, before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END)[1])


def keep(run: Run, seed: int) -> None:
    """Copy results.csv, and record where and when each stage ran and how long it took."""
    directory = HERE / "results" / f"seed_{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(run.workdir / "results.csv", directory / "results.csv")
    stages = {name: {key: run.summary(name)[key] for key in ("provenance", "time/seconds")} for name in run.stages}
    write_json(directory / "stages.json", stages)


def markdown(results: pd.DataFrame, chosen: set[str]) -> list[str]:
    """Table with one row per method: the mean over seeds, with its 95 % interval over seeds."""
    head = ["method", "gold score", "wins against SFT, %", "reward score", "KL, nats", "tokens", "VADER", "distinct-2"]
    lines = [f"| {' | '.join([*head, 'seconds'])} |", "|---" + "|---:" * len(head) + "|"]
    for method, group in results.groupby("method", sort=False):
        cells = [
            f"`{method}`{' *' if method in chosen else ''}",
            _spread(group["gold_score"], 2),
            "–" if method == "sft" else _spread(100 * group["win_rate"], 0),
            _spread(group["reward_score"], 2),
            _spread(group["kl"], 1),
            _spread(group["length"], 1),
            _spread(group["vader"], 2),
            _spread(group["distinct_2"], 2),
            "–" if group["seconds"].isna().all() else _spread(group["seconds"], 0),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def record(runs: list[Run], tables: list[pd.DataFrame], up: str) -> str:
    """Machine, versions, date, seeds, prompts and time, from the stages' summaries. Args: up is the way to the root."""
    summaries = [[run.summary(name) for name in run.stages] for run in runs]
    places = [summary["provenance"] for stages in summaries for summary in stages]
    ran = dict.fromkeys(f"{machine_name(one['machine'])}, {source_name(one['source'])}" for one in places)
    found = places[-1]
    minutes = [sum(summary["time/seconds"] for summary in stages) / 60 for stages in summaries]
    seeds = ", ".join(str(table["seed"].iloc[0]) for table in tables)
    return (
        f"The whole pipeline, run with seeds {seeds} [95 % t interval over seeds], "
        f"{tables[0]['n_prompts'].iloc[0]} test prompts, one answer each. "
        f"{' and '.join(ran)}; Python {found['machine']['python']}, JAX {found['packages']['jax']}, {found['date']}; "
        f"{' / '.join(f'{m:.1f}' for m in minutes)} minutes per run. "
        f"Files: [experiments/movie_reviews/results]({up}experiments/movie_reviews/results)."
    )


def claims(runs: list[Run], tables: list[pd.DataFrame]) -> list[str]:
    """Gains over SFT and differences between methods, paired over seeds, and whether the criterion holds."""
    rows = [{row["method"]: row for row in table.to_dict("records")} for table in tables]
    found: dict[str, list[dict]] = {"sft": [], "best_of_16": [], "dpo": [], "ppo": []}
    for run, table in zip(runs, rows, strict=True):
        (chosen,) = run.selected()
        for name in found:
            found[name].append(table[chosen if name == "dpo" else name])

    def difference(own: str, other: str) -> tuple[float, float, float]:
        pairs = zip(found[own], found[other], strict=True)
        apart = np.array([its["gold_score"] - others["gold_score"] for its, others in pairs])
        return float(apart.mean()), *t_interval(apart, level=LEVEL)

    gains = {f"`{name}`": difference(name, "sft") for name in ("best_of_16", "dpo", "ppo")}
    others = {
        f"`{own}` minus `{other}`": difference(own, other)
        for own, other in (("ppo", "best_of_16"), ("best_of_16", "dpo"), ("ppo", "dpo"))
    }
    won = {name: float(np.mean([row["win_rate"] for row in found[name]])) for name in ("best_of_16", "dpo", "ppo")}
    held = (
        all(low > 0 for _, low, _ in gains.values())
        and all(rate > CLAIM_WIN_RATE for rate in won.values())
        and all(row["kl"] < CLAIM_KL for row in found["ppo"])
    )
    return [
        f"- Gain in gold score over SFT, paired over seeds: {_intervals(gains)}. Criterion: all are above 0, each "
        f"method wins more than {CLAIM_WIN_RATE:.0%} of pairs on average, and PPO stays below {CLAIM_KL:.0f} nats: "
        f"**{'holds' if held else 'does not hold'}**",
        f"- Differences between methods, paired over seeds: {_intervals(others)}",
        "- `dpo` uses the value of beta that each run selected on its validation split (marked by * in a table)",
    ]


def _intervals(found: dict[str, tuple[float, float, float]]) -> str:
    return ", ".join(f"{name} {mean:.2f} [{low:.2f}, {high:.2f}]" for name, (mean, low, high) in found.items())


def selected(runs: list[Run]) -> set[str]:
    """DPO stages that any of the runs selected on the validation split."""
    return {name for run in runs for name in run.selected()}


def _spread(values: pd.Series, digits: int) -> str:
    low, high = t_interval(values.to_numpy(float), level=LEVEL)
    return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    main(sys.argv[1:])
