"""Spread of the quickstart's PPO over machines, with the same config and seed.

    python experiments/movie_reviews/machines.py runs/quickstart runs/machines [VARIANT ...]

Claim, written before the runs: XLA compiles for the processor's instructions and splits work over its threads, so that
sums differ in their last bits; training amplifies these differences until gold scores differ as much as between seeds.
The claim holds if the standard deviation of PPO's gold score over machines with one seed is between one third and three
times of that over seeds on one machine.

From the SFT policy and the reward model of a finished quickstart (its stages up to `reward_model` are enough), PPO is
trained for half of the quickstart's iterations and evaluated: with the host's instructions, twice; with those of older
processors (`--xla_cpu_max_isa`); on one core; and with three seeds in one program. Variants whose names begin with
`whole` run every stage themselves. Without names, all variants run. `results/machines.csv` has a row for each trained
PPO, with the share of its samples that equal the host's at some iterations; `results/machines.json` has the provenance
of each and the verdict.

`--xla_cpu_max_isa` limits the code that XLA generates. The matrix-multiplication library chooses its own instructions,
so that a real older processor may differ more.

Results of 2026-11-29 at commit a149709 (2 threads of AMD EPYC, compiled for znver4; JAX 0.10.2; 15 minutes for all
variants; results/machines.csv). By this criterion the claim holds: PPO's gold score is 1.29, 1.15, 1.28 and 1.21 for
`host`, `avx2`, `sse4_2` and `one_core` (standard deviation 0.064; standard error over prompts 0.04), and 1.24, 1.17,
1.18 for three seeds (0.039); divergences are 3.9, 3.3, 4.2, 3.7 nats (0.38) and 4.0, 3.6, 3.4 (0.33). `host_again` is
equal to the last digit. All samples of the first iteration equal the host's, and 2 % of those of the tenth. Seed 0
trained together with two others, which is another program on the same machine, differs as much as another machine.

Variants that run every stage give the same PPO as those that start from the host's models: SFT and reward model are
bitwise identical on AVX2, although the logged losses differ by up to 4e-6. Four machines and three seeds are few:
the first three variants alone, with the code of commit c268ed4, had standard deviations of 0.015 over machines and 0.10
over seeds.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.files import write_json, write_text

HERE = Path(__file__).parent
OVERRIDES = (
    "--config.stages=('gold','sft','preferences','reward_model','ppo','evaluate')",
    "--config.ppo.iterations=50",
    "--config.evaluate.selection_prompts=16",
    "--config.evaluate.policies=('ppo',)",
    "--config.evaluate.best_of=()",
)
COMPARED = (1, 10, 50)
COLUMNS = ["variant", "seed", "n_prompts", "gold_score", "gold_se", "reward_score", "kl", "kl_se"]
COLUMNS += [f"samples_as_host_{step}" for step in COMPARED]
NUMBERS = ("gold_score", "reward_score", "kl")
LEAST_RATIO, GREATEST_RATIO = 1 / 3, 3.0


class Variant(NamedTuple):
    """Variant of the run: an imitated machine, or other seeds."""

    name: str
    isa: str | None = None  # the newest instructions that XLA may use; None: the host's
    cores: str | None = None  # as taskset names them; None: all
    seeds: int = 1
    whole: bool = False  # every stage anew, not PPO alone


VARIANTS = (
    Variant("host"),
    Variant("host_again"),
    Variant("avx2", isa="AVX2"),
    Variant("sse4_2", isa="SSE4_2"),
    Variant("one_core", cores="0"),
    Variant("seeds", seeds=3),
    Variant("whole_host", whole=True),
    Variant("whole_avx2", isa="AVX2", whole=True),
)


def main(inputs: str, out: str, *names: str) -> None:
    """Run the named variants as far as they are missing, and write the record of all complete ones."""
    if unknown := set(names) - {variant.name for variant in VARIANTS}:
        raise SystemExit(f"no variant {', '.join(unknown)}; there are {', '.join(v.name for v in VARIANTS)}")
    tables, origins, host = [], {}, None
    for variant in VARIANTS:
        workdir = Path(out) / variant.name
        if not names or variant.name in names:
            train(variant, inputs, workdir)
        if (workdir / "evaluate" / "complete.json").exists():
            run = Run(workdir, None if variant.whole else inputs)
            results, samples = run.results(), run.samples("ppo")
            host = samples if host is None else host
            table = results[results["method"] == "ppo"].assign(variant=variant.name)
            for step in COMPARED:
                table[f"samples_as_host_{step}"] = [share_alike(samples, host, seed, step) for seed in table["seed"]]
            tables.append(table)
            origins[variant.name] = run.summary("ppo")["provenance"]
    table = pd.concat(tables)[COLUMNS]
    write_text(HERE / "results" / "machines.csv", table.to_csv(index=False, lineterminator="\n"))
    found = verdict(table)
    write_json(HERE / "results" / "machines.json", {"verdict": found, "provenance": origins})
    print(table.to_string(index=False), *found.items(), sep="\n")


def train(variant: Variant, inputs: str, workdir: Path) -> None:
    """Train and evaluate one variant in its own process, unless it is complete."""
    flags = os.environ.get("XLA_FLAGS", "") + (f" --xla_cpu_max_isa={variant.isa}" if variant.isa else "")
    pinned = ["taskset", "-c", variant.cores] if variant.cores else []
    places = [f"--config={HERE / 'quickstart.py'}", f"--workdir={workdir}"]
    known = [] if variant.whole else [f"--inputs={inputs}"]
    command = [
        *pinned,
        sys.executable,
        "-m",
        "rlhf_jax",
        *places,
        *known,
        *OVERRIDES,
        f"--config.seeds={variant.seeds}",
    ]
    subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, check=True)


def share_alike(samples: pd.DataFrame, host: pd.DataFrame, seed: int, step: int) -> float:
    """Share of a seed's texts at an iteration that equal those of the host's run."""
    one = samples[(samples["step"] == step) & (samples["seed"] == seed)]["completion"].to_numpy()
    return float((one == host[host["step"] == step]["completion"].to_numpy()).mean())


def verdict(table: pd.DataFrame) -> dict[str, Any]:
    """Standard deviations of gold score and divergence over machines and over seeds, and whether the claim holds.

    The two runs on the host are one machine, and must be equal. What has not been run is None.
    """
    apart = table["variant"].isin(["host_again", "seeds"]) | table["variant"].str.startswith("whole")
    groups = {"machines": table[~apart], "seeds": table[table["variant"] == "seeds"]}
    found: dict[str, Any] = {
        f"{column}_sd_over_{name}": float(rows[column].std()) if len(rows) > 1 else None
        for name, rows in groups.items()
        for column in ("gold_score", "kl")
    }
    host, again = (table[table["variant"] == name][list(NUMBERS)].to_numpy() for name in ("host", "host_again"))
    found["host_again_is_equal"] = bool((host == again).all()) if len(again) else None
    seeds, machines = found["gold_score_sd_over_seeds"], found["gold_score_sd_over_machines"]
    known = seeds is not None and machines is not None
    found["holds"] = LEAST_RATIO <= machines / seeds <= GREATEST_RATIO if known else None
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
