"""A comparison that means nothing says so before anything else."""

import pytest

from rlhf_jax.reports import report
from rlhf_jax.reports.cautions import cautions, meaningless, of_several
from rlhf_jax.reports.html import page
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.files import read_json, read_rows, write_json, write_rows
from tests.support import workdirs
from tests.support.workdirs import shown


def reward_model_ranks(root, accuracy, low, high):
    path = root / "reward_model" / "summary.json"
    figures = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "eval_pairs": 480}
    write_json(path, read_json(path) | figures)


def prompts(root, number):
    path = root / "evaluate" / "results.jsonl"
    write_rows(path, [row | {"n_prompts": number} for row in read_rows(path)])


@pytest.fixture
def good(tmp_path):
    """Judged by gold on 200 prompts, with a reward model that ranks most pairs correctly."""
    workdirs.write_all(tmp_path)
    reward_model_ranks(tmp_path, 0.7, 0.66, 0.74)
    prompts(tmp_path, 200)
    return tmp_path


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(report, "draw", lambda run: {})


def test_a_sound_run_has_no_caution(good, no_figures):
    assert cautions(Run(good)) == [] and "Caution" not in shown(Run(good))
    report.write_report(good)
    assert '<ul class="caution">' not in (good / "report.html").read_text()


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ((0.49, 0.45, 0.53), "no better than chance: it ranks 49 % [45, 53] of 480"),
        ((0.4, 0.36, 0.44), "worse than chance"),
    ],
)
def test_a_reward_model_at_chance_is_named_with_its_interval(good, found, words):
    reward_model_ranks(good, *found)
    (sentence,) = cautions(Run(good))
    assert words in sentence
    assert not meaningless(Run(good)), "the gold judge's scores are none of the reward model's"


def test_few_prompts_are_counted(good):
    prompts(good, 99)
    (sentence,) = cautions(Run(good))
    assert "Only 99 prompts" in sentence


def test_a_judge_of_its_own_choices_names_the_methods(tmp_path):
    workdirs.write_all(tmp_path, gold=False)
    prompts(tmp_path, 200)
    (sentence,) = cautions(Run(tmp_path))
    assert sentence.startswith(
        "The judge scores answers that were optimised for it: best_of_16 and ppo were selected by, or trained on"
    )
    assert "reward model reward_model" in sentence and "dpo" not in sentence
    config = tmp_path / "evaluate" / "config.json"
    whole = read_json(config)
    for judge, number in (
        ("other", 0),
        ({"model": "reward_model", "functions": ["f.py:f"]}, 1),
        ({"url": "x", "model": "y"}, 0),
    ):
        write_json(config, {**whole, "section": {**whole["section"], "judge": judge}})
        assert len(cautions(Run(tmp_path))) == number, judge


def test_a_divergence_below_zero_is_named_with_its_method(good):
    path = good / "evaluate" / "results.jsonl"
    rows = read_rows(path)
    for kl, number in ((-0.05, 0), (-0.07, 1)):  # the standard error is 0.02
        write_rows(path, [row | ({"kl": kl} if row["method"] == "ppo" else {}) for row in rows])
        found = cautions(Run(good))
        assert len(found) == number
    assert "divergence of ppo was measured below 0 (−0.07 nats)".replace("−", "-") in found[0]


def test_a_reference_with_two_scores_is_named_with_both(good):
    path = good / "best_of_n" / "curve.jsonl"
    rows = read_rows(path)
    for shift, number in ((0.15, 0), (0.25, 1)):  # the standard errors are 0.05 and 0.04
        write_rows(path, [row | {"gold": row["gold"] + shift} for row in rows])
        found = cautions(Run(good))
        assert len(found) == number
    assert "SFT scores 0.10 on the prompts of the evaluation and 0.35 on those of best_of_n" in found[0]


@pytest.mark.parametrize("test", [None, "eval.jsonl"])
def test_test_rows_that_are_the_evaluation_rows_are_named_with_what_was_selected_on_them(good, test):
    path = good / "evaluate" / "config.json"
    config = read_json(path)
    config["common"]["data"]["test"] = test
    write_json(path, config)
    (sentence,) = cautions(Run(good))
    assert "a stage or setting that was selected on them, as dpo_01 was, looks better than it is" in sentence
    write_json(good / "evaluate" / "summary.json", read_json(good / "evaluate" / "summary.json") | {"selected": {}})
    assert "selected on them looks better" in cautions(Run(good))[0]


@pytest.mark.parametrize(
    ("stage", "section", "summary", "updates"),
    [
        ("dpo_1", {}, {"steps": 40}, 40),
        ("ppo", {"iterations": 5, "epochs": 4, "minibatches": 2}, {}, 40),
        ("ppo", {"iterations": 50, "epochs": 4, "minibatches": 2}, {"steps": 5}, 40),  # stopped early
    ],
)
def test_training_within_the_warm_up_is_named(good, stage, section, summary, updates):
    path = good / stage / "config.json"
    for warmup, found in ((updates, True), (updates - 1, False)):
        config = read_json(path)
        config["section"] |= {**section, "optimizer": {"warmup_steps": warmup}}
        write_json(path, config)
        write_json(good / stage / "summary.json", read_json(good / stage / "summary.json") | summary)
        words = f"of {stage} (optimizer.warmup_steps = 40, 40 updates) was still rising at the last update"
        assert [words in sentence for sentence in cautions(Run(good))] == [True] * found


def test_cautions_stand_before_every_finding_and_a_meaningless_score_has_no_headline(tmp_path, no_figures):
    workdirs.write_all(tmp_path, gold=False)
    reward_model_ranks(tmp_path, 0.49, 0.45, 0.53)
    assert meaningless(Run(tmp_path))
    for width in (100, 80):
        text = shown(Run(tmp_path), width)
        plain = " ".join(text.split())
        assert plain.startswith("Caution: The reward model reward_model is no better than chance")
        assert plain.index("Only 8 prompts") < plain.index("method")
        assert max(map(len, text.splitlines())) <= width
    report.write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.index("<h1>") < page.index("no better than chance") < page.index("<table>")
    assert "has the highest reward score" not in page
    assert "No finding: the reward model that compares the methods ranks held-out pairs no better than chance." in page


def test_a_reward_model_at_chance_is_named_before_anything_is_evaluated(tmp_path):
    workdirs.write_training(tmp_path)
    assert cautions(Run(tmp_path)) == []
    reward_model_ranks(tmp_path, 0.49, 0.45, 0.53)
    (sentence,) = cautions(Run(tmp_path))
    assert "no better than chance" in sentence


@pytest.mark.nightly
def test_runs_whose_references_or_judges_differ_are_not_to_be_compared_by_score(good, tmp_path_factory):
    other = workdirs.write_all(tmp_path_factory.mktemp("other"))
    runs = {"one": Run(good), "two": Run(other)}
    assert of_several(runs) == [] == of_several({"one": Run(good)})
    path = other / "evaluate" / "results.jsonl"
    raised = [row | ({"gold_score": 0.5} if row["method"] == "sft" else {}) for row in read_rows(path)]
    write_rows(path, raised)  # the standard errors are 0.05
    (sentence,) = of_several(runs)
    assert "they score 0.10 in one (SFT) and 0.50 in two (SFT)" in sentence
    assert sentence in page(runs, "samples.js").html
    config = other / "evaluate" / "config.json"
    whole = read_json(config)
    write_json(config, {**whole, "section": {**whole["section"], "judge": "another"}})
    assert of_several(runs) == ["The runs were not judged by the same judge: do not compare their scores."]
