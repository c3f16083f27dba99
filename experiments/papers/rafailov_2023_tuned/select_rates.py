"""Select learning rates of DPO and PPO on validation prompts, and write rates.csv.

    python experiments/papers/rafailov_2023_tuned/select_rates.py WORKDIR

The seed is not among the paper's. Of each method, the rate whose runs have the highest frontier is selected.
"""

import runpy
import sys
from pathlib import Path

import pandas as pd
from ml_collections import ConfigDict

from rlhf_jax.papers import training

HERE = Path(__file__).parent
SEED = 100
CANDIDATES = {"dpo": (1e-3, 3e-3, 1e-2), "ppo": (1e-3, 3e-3)}


def main(workdir: Path) -> None:
    """Train with every rate, and write the frontiers."""
    paper = runpy.run_path(str(HERE / "paper.py"))
    config, names = sweep(paper)
    run = training.run_each(config, [SEED], workdir, shared=paper["REVIEWS"]["SHARED"])[SEED]
    points = run.points("frontier").assign(seed=SEED)
    rows = []
    for (kind, rate), stages in names.items():
        (area,) = paper["REVIEWS"]["areas"](points, stages, paper["MOST"])
        rows.append({"kind": kind, "rate": rate, "area": round(area, 4)})
    table = pd.DataFrame(rows)
    table["selected"] = table["area"] == table.groupby("kind")["area"].transform("max")
    table.to_csv(HERE / "rates.csv", index=False)
    print(table)


def sweep(paper: dict) -> tuple[ConfigDict, dict[tuple[str, float], list[str]]]:
    """Build the experiment, scored on validation prompts, and list its stages by kind and rate."""
    whole, add = paper["UNTUNED"]["config"](smoke=False), paper["REVIEWS"]["add"]
    found = paper["REVIEWS"]["task"](smoke=False)
    found.data.test = found.data.eval
    names: dict[tuple[str, float], list[str]] = {}
    for kind, rates in CANDIDATES.items():
        for number, rate in enumerate(rates):
            for stage in paper["GROUPS"][kind.upper()]:
                section = whole[stage].copy_and_resolve_references()
                section.optimizer.learning_rate = rate
                section.loop.checkpoint_every //= 2
                add(found, f"{stage}_rate_{number}", section)
                names.setdefault((kind, rate), []).append(f"{stage}_rate_{number}")
    policies = [stage for stages in names.values() for stage in stages]
    add(found, "frontier", paper["REVIEWS"]["frontier"](policies, smoke=False, prompts=400))
    return found, names


if __name__ == "__main__":
    main(Path(sys.argv[1]))
