"""Writes the table of finished quickstart runs into the README, and keeps the runs' results beside this file.

    python experiments/movie_reviews/write_readme.py runs/seed0 runs/seed1 runs/seed2

Every number comes from files that the runs wrote. Says which of the quickstart's claims hold, for every seed.
"""

import shutil
import sys
from pathlib import Path

import pandas as pd

from rlhf_jax.reports import Run
from rlhf_jax.runtime.files import write_json, write_text

HERE = Path(__file__).parent
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"
CLAIM_STANDARD_ERRORS, CLAIM_WIN_RATE, CLAIM_KL = 4.0, 0.6, 15.0


def main(workdirs: list[str]) -> None:
    """Reads the runs, keeps their results, and replaces what is between the README's marks."""
    runs = [Run(workdir) for workdir in workdirs]
    tables = [run.results() for run in runs]
    for run, table in zip(runs, tables, strict=True):
        keep(run, int(table["seed"].iloc[0]))
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    lines = [*markdown(pd.concat(tables), selected(runs)), "", *record(runs, tables), "", *claims(runs, tables)]
    write_text(README, before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END)[1])


def keep(run: Run, seed: int) -> None:
    """Copies results.csv, and notes where and when each stage ran and how long it took."""
    directory = HERE / "results" / f"seed_{seed}"
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(run.workdir / "results.csv", directory / "results.csv")
    stages = {name: {key: run.summary(name)[key] for key in ("provenance", "time/seconds")} for name in run.stages}
    write_json(directory / "stages.json", stages)


def markdown(results: pd.DataFrame, chosen: set[str]) -> list[str]:
    """One row a method: the mean over seeds, and the lowest and highest of them."""
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


def record(runs: list[Run], tables: list[pd.DataFrame]) -> list[str]:
    """Machine, versions, date, seeds, prompts and time, from the stages' own notes."""
    summaries = [[run.summary(name) for name in run.stages] for run in runs]
    found = summaries[0][-1]["provenance"]
    where, source = found["machine"], found["source"]
    minutes = [sum(summary["time/seconds"] for summary in stages) / 60 for stages in summaries]
    seeds = ", ".join(str(table["seed"].iloc[0]) for table in tables)
    return [
        f"Mean over the whole pipeline run with seeds {seeds} (lowest to highest in brackets), "
        f"{tables[0]['n_prompts'].iloc[0]} test prompts, one answer each; * chosen on the validation split. "
        f"{where['threads']} cores of {where['processor']} ({where['cpu_target']['name']}), Python {where['python']}, "
        f"JAX {found['packages']['jax']}, commit {source['commit'][:7]}{'' if source['clean'] else ' with changes'}, "
        f"{found['date']}; "
        f"{' / '.join(f'{m:.1f}' for m in minutes)} minutes a run. "
        "Files: [experiments/movie_reviews/results](experiments/movie_reviews/results)."
    ]


def claims(runs: list[Run], tables: list[pd.DataFrame]) -> list[str]:
    """Whether each claim holds: gain over SFT in standard errors, share of pairs won, and PPO's divergence."""
    lines = []
    for run, table in zip(runs, tables, strict=True):
        rows = table.set_index("method").loc[["best_of_16", *run.selected(), "ppo"]]
        errors = rows["gold_gain"] / rows["gold_gain_se"]
        held = (
            (errors > CLAIM_STANDARD_ERRORS).all()
            and (rows["win_rate"] > CLAIM_WIN_RATE).all()
            and (rows["kl"].tail(1) < CLAIM_KL).all()
        )
        gains = ", ".join(f"`{name}` {error:.0f}" for name, error in errors.items())
        lines.append(
            f"- seed {table['seed'].iloc[0]}: gains over SFT in standard errors: {gains}. Each method gains more than "
            f"{CLAIM_STANDARD_ERRORS:.0f} and wins more than {CLAIM_WIN_RATE:.0%} of pairs, PPO under {CLAIM_KL:.0f} "
            f"nats: **{'holds' if held else 'does not hold'}**"
        )
    return lines


def selected(runs: list[Run]) -> set[str]:
    """DPO's instances that any of the runs chose on the validation split."""
    return {name for run in runs for name in run.selected()}


def _spread(values: pd.Series, digits: int) -> str:
    low, high = values.min(), values.max()
    return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    main(sys.argv[1:])
