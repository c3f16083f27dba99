"""Methods are compared by paired differences: over seeds where there are several, else over prompts."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from rlhf_jax.reports.differences import at_equal_kl, differences, over_seeds
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.files import read_rows, write_rows
from tests.support import workdirs

PROMPTS, SEEDS = 30, (0, 1, 2, 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A gold score that depends on prompt, seed and method; `ppo` and `grpo` share what their seeds have drawn."""
    root = tmp_path_factory.mktemp("run")
    workdirs.write_all(root, seeds=1)
    rng, rows, results = np.random.default_rng(0), [], []
    prompts, drawn = rng.normal(size=PROMPTS), dict(zip(SEEDS, rng.normal(size=len(SEEDS)), strict=True))
    for method, gain, seeds in (("sft", 0.0, (0,)), ("dpo_1", 0.2, (0,)), ("ppo", 1.0, SEEDS), ("dpo_01", 0.9, SEEDS)):
        for seed in seeds:
            shift = gain + (drawn[seed] if len(seeds) > 1 else 0.0) + 0.05 * rng.normal()
            scores = prompts + shift + 0.1 * rng.normal(size=PROMPTS)
            results.append(workdirs.result_row(method, seed, float(scores.mean()), 0.5, 1.0, None))
            for prompt, score in enumerate(scores):
                row = workdirs.sample_row(prompt, seed, "x", 0.0, 0.0)
                rows.append({**row, "method": method, "gold": float(score)})
    write_rows(root / "evaluate" / "samples.jsonl", rows)
    write_rows(root / "evaluate" / "results.jsonl", results)
    return Run(root)


def of(table: pd.DataFrame, own: str, other: str) -> dict:
    (row,) = table[(table["method"] == own) & (table["against"] == other)].to_dict("records")
    return row


def scores(run: Run) -> dict:
    table = pd.DataFrame(read_rows(run.workdir / "evaluate" / "samples.jsonl"))
    return {key: rows["gold"].to_numpy() for key, rows in table.groupby(["method", "seed"])}


def test_several_seeds_are_compared_by_the_paired_t_test(run):
    by_key, found = scores(run), of(differences(run), "ppo", "dpo_01")
    means = {name: [by_key[name, seed].mean() for seed in SEEDS] for name in ("ppo", "dpo_01")}
    test = scipy.stats.ttest_rel(means["ppo"], means["dpo_01"]).confidence_interval(0.95)
    assert (found["over"], found["seeds"]) == ("seeds", len(SEEDS))
    np.testing.assert_allclose([found["low"], found["high"]], [test.low, test.high])
    assert found["difference"] == pytest.approx(np.mean(means["ppo"]) - np.mean(means["dpo_01"]))
    alone = scipy.stats.t.interval(0.95, df=3, loc=np.mean(means["ppo"]), scale=scipy.stats.sem(means["ppo"]))
    assert found["high"] - found["low"] < 0.3 * (alone[1] - alone[0]), "what both seeds drew has cancelled"


def test_a_method_with_one_seed_is_held_fixed(run):
    by_key, found = scores(run), of(differences(run), "ppo", "sft")
    gains = [by_key["ppo", seed].mean() - by_key["sft", 0].mean() for seed in SEEDS]
    low, high = scipy.stats.t.interval(0.95, df=3, loc=np.mean(gains), scale=scipy.stats.sem(gains))
    np.testing.assert_allclose([found["low"], found["high"]], [low, high])
    back = of(differences(run), "sft", "ppo")
    np.testing.assert_allclose([back["low"], back["high"]], [-high, -low])


def test_two_methods_with_one_seed_are_compared_over_prompts(run):
    by_key, found = scores(run), of(differences(run), "dpo_1", "sft")
    test = scipy.stats.ttest_rel(by_key["dpo_1", 0], by_key["sft", 0]).confidence_interval(0.95)
    assert (found["over"], found["n_prompts"]) == ("prompts", PROMPTS)
    np.testing.assert_allclose([found["low"], found["high"]], [test.low, test.high])


def test_one_seed_each_leaves_nothing_to_compare_over_seeds():
    assert over_seeds(pd.Series({0: 1.0}), pd.Series({0: 2.0})) is None


def test_at_equal_divergence_pairs_are_of_the_seeds_that_both_reached():
    rows = [("a", 0, 1.0), ("a", 1, 2.0), ("a", 2, None), ("b", 0, 0.5), ("b", 1, 1.0), ("b", 2, 9.0), ("c", 0, 3.0)]
    table = pd.DataFrame([{"method": m, "seed": s, "kl": 4.0, "gold": gold} for m, s, gold in rows])
    found = at_equal_kl(table)
    assert set(zip(found["method"], found["against"], strict=True)) == {("a", "b"), ("b", "a")}
    row = of(found, "a", "b")
    low, high = scipy.stats.ttest_rel([1.0, 2.0], [0.5, 1.0]).confidence_interval(0.95)
    assert row["seeds"] == 2 and row["difference"] == pytest.approx(0.75)
    np.testing.assert_allclose([row["low"], row["high"]], [low, high])
