"""The tutorial's table and the README's claims: every number from the runs, with intervals over seeds."""

import runpy
import types

import numpy as np
import pytest
import scipy.stats

from rlhf_jax.reports.run import Run
from rlhf_jax.runtime import provenance
from rlhf_jax.runtime.files import read_json, read_rows, write_json, write_rows
from tests.support import workdirs
from tests.support.own_data import ROOT

GOLD = {"sft": (0.0, 0.1, -0.1), "best_of_16": (1.1, 1.3, 1.0), "dpo_1": (0.2, 0.3, 0.2), "ppo": (2.1, 1.8, 1.9)}
CHOSEN = (0.7, 0.7, 0.5)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    here, runs = provenance.environment(), []
    for seed in range(3):
        run = workdirs.write_all(root / str(seed))
        path = run / "evaluate" / "results.jsonl"
        gold = {**{name: values[seed] for name, values in GOLD.items()}, "dpo_01": CHOSEN[seed]}
        rows = [row | {"seed": seed, "gold_score": gold[row["method"]], "win_rate": 0.7} for row in read_rows(path)]
        write_rows(path, rows)
        for summary in run.glob("*/summary.json"):
            write_json(summary, read_json(summary) | {"provenance": here})
        (run / "results.csv").write_text("")
        runs.append(str(run))
    script = runpy.run_path(str(ROOT / "experiments" / "movie_reviews" / "write_readme.py"))
    script["main"].__globals__.update(HERE=root, ROOT=root)
    tutorial = root / script["TUTORIAL"]
    tutorial.parent.mkdir(parents=True)
    for file in (root / "README.md", tutorial):
        file.write_text(f"before\n{script['BEGIN']}stale\n{script['END']}after\n")
    script["main"](runs)
    readme = (root / "README.md").read_text()
    return types.SimpleNamespace(root=root, main=script["main"], runs=runs, text=tutorial.read_text(), readme=readme)


def interval(values) -> str:
    low, high = scipy.stats.t.interval(0.95, df=len(values) - 1, loc=np.mean(values), scale=scipy.stats.sem(values))
    return f"{np.mean(values):.2f} [{low:.2f}, {high:.2f}]"


def test_a_row_has_the_mean_over_seeds_and_its_t_interval(written):
    row = next(line for line in written.text.splitlines() if line.startswith("| `ppo`"))
    assert f"| {interval(GOLD['ppo'])} |" in row
    assert written.text.startswith("before\n") and written.text.endswith("after\n") and "stale" not in written.text


def test_methods_are_compared_within_runs(written):
    gain = np.subtract(GOLD["ppo"], GOLD["sft"])
    assert f"`ppo` {interval(gain)}" in written.text
    assert f"`dpo` {interval(np.subtract(CHOSEN, GOLD['sft']))}" in written.text, "as each run has chosen"
    assert f"`ppo` minus `best_of_16` {interval(np.subtract(GOLD['ppo'], GOLD['best_of_16']))}" in written.text
    assert "**holds**" in written.text
    assert "**holds**" in written.readme and "stale" not in written.readme and "| `ppo`" not in written.readme


def test_it_says_where_the_runs_were_made(written):
    here = Run(written.runs[0]).summary("ppo")["provenance"]
    assert here["source"]["commit"][:12] in written.text and here["packages"]["jax"] in written.text
    kept = read_json(written.root / "results" / "seed_1" / "stages.json")
    assert kept["ppo"]["provenance"]["machine"] == here["machine"]


def test_one_run_is_not_enough(written):
    with pytest.raises(SystemExit, match="two runs or more"):
        written.main(written.runs[:1])
