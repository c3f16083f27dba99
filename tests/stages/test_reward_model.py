"""The reward model's stage: ensembles, normalised scores, its losses' tables, and what it reports."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from experiments import preferences
from rlhf_jax import experiment
from rlhf_jax.config import ModelSource
from rlhf_jax.core.metrics import values
from rlhf_jax.core.sequences import joined
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.models import RewardModel
from rlhf_jax.loading.stage_models import load_stage_reward_model
from rlhf_jax.methods import reward as reward_loss
from rlhf_jax.methods.reward_table import RewardLossConfig
from rlhf_jax.models.reward_ensemble import EnsembleConfig
from rlhf_jax.models.sharding import shardings
from rlhf_jax.runtime.progress import Display
from rlhf_jax.runtime.workdir import Workdir
from rlhf_jax.sampling.batches import score_all
from rlhf_jax.stages import reward_model
from rlhf_jax.text.tokenizer import load_tokenizer
from rlhf_jax.types import ComparisonBatch, RlhfError, Rollout
from tests.support import tiny

WORDS = ["the", "film", "is", "good", "bad", "dull", "and", "long"]


def pairs(path: Path, rows: int, seed: int) -> Path:
    """Two pairs to every prompt, the second among one of the first's answers and another one."""
    rng = np.random.default_rng(seed)

    def text(least: int = 1) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(least, 5)))

    with path.open("w") as file:
        for number in range(rows // 2):
            prompt, answers = f"{text()} {number}", [f" {place} {text()}" for place in range(3)]
            for chosen, rejected in ((0, 1), (1, 2)):
                row = {"prompt": prompt, "chosen": answers[chosen], "rejected": answers[rejected]}
                more = {"margin": float(rng.uniform(0, 2)), "labels": [1, 1, int(rng.integers(2))]}
                file.write(json.dumps(row | more) + "\n")
    return path


def run(directory: Path, seed: int, sections: dict[str, dict[str, Any]]) -> Context:
    """Trains the sections' reward models after SFT; returns the last one's surroundings."""
    config = preferences.get_config("smoke").unlock()
    config.seed, config.stages = seed, ("sft", *sections)
    for split, rows in (("train", 48), ("eval", 16)):
        config.data[split] = str(pairs(directory / f"{split}.jsonl", rows, rows))
    config.sft.update({"epochs": 0.1, "sample_prompts": 0})
    for name, changes in sections.items():
        config[name] = ConfigDict({**config.reward_model.to_dict(), **changes})
        config[name].loop.update({"steps_per_call": 2})
    for name in ("reward_model", "dpo", "ppo", "evaluate"):
        if name not in sections:
            del config[name]
    parsed, workdir = experiment.parse(config), Workdir(directory / f"run_{seed}", None)
    console = Console(file=io.StringIO())
    experiment.run(parsed, workdir, None, console)
    display = Display(console)
    with display.running(), display.bar("again") as bar:
        stages = tuple(parsed.stages)
        return Context(workdir, stages, stages[-1], seed, 1, parsed.data, parsed.runtime, bar)


SCRATCH = {"policy": "sft", "model": dict(preferences.model(d_model=16, n_layers=1))}
NORMALISE = {"policy": "sft", "prompts": 24}
UWO = {"members": 2, "combine": "uwo", "variance_coefficient": 0.1}


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory) -> Context:
    directory = tmp_path_factory.mktemp("ensemble")
    k_wise = {"name": "k_wise", "label_smoothing": 0.1, "center_rewards_coefficient": 0.01}
    sections = {
        "k_wise": {"loss": k_wise, "normalise": NORMALISE, "pooling": "last"},
        "reward": {**SCRATCH, "ensemble": UWO, "normalise": NORMALISE},
    }
    return run(directory, 0, sections)


def load(context: Context, stage: str) -> RewardModel:
    return load_stage_reward_model(context.workdir.find(stage), find=context.workdir.find)


def spec(context: Context, stage: str) -> dict[str, Any]:
    return json.loads((context.workdir.find(stage) / "model.json").read_text())


@pytest.mark.nightly
def test_member_k_is_the_single_run_with_that_seed(ensemble, tmp_path):
    alone = run(tmp_path, 1, {"reward": SCRATCH})
    member, single = load(ensemble, "reward").members()[1], load(alone, "reward")
    (mean, deviation), rollout = spec(ensemble, "reward")["moments"][1], responses(member)
    scores = score_all(single.network, single.params, rollout, 16)
    np.testing.assert_allclose(
        score_all(member.network, member.params, rollout, 16), (scores - mean) / deviation, atol=1e-4
    )
    first = score_all(*load(ensemble, "reward").members()[0][:2], rollout, 16)
    assert np.abs(first - score_all(member.network, member.params, rollout, 16)).max() > 0.1
    columns = ("loss", "accuracy", "eval/accuracy")
    ours, theirs = (
        [
            [row[name] for name in columns if name in row]
            for row in map(json.loads, (context.workdir.find("reward") / "metrics.jsonl").read_text().splitlines())
            if row["seed"] == 1
        ]
        for context in (ensemble, alone)
    )
    assert len(ours[-1]) == 3
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def responses(model: RewardModel) -> Rollout[np.ndarray]:
    rng = np.random.default_rng(0)
    masks = [np.arange(6)[None] < rng.integers(1, 7, 16)[:, None] for _ in range(2)]
    tokens = [rng.integers(3, model.network.vocab_size, (16, 6)).astype(np.int32) for _ in range(2)]
    return Rollout(tokens[0], masks[0][:, ::-1], tokens[1], masks[1])


@pytest.mark.nightly
def test_an_ensemble_is_a_reward_model_of_what_its_members_say(ensemble):
    model = load(ensemble, "reward")
    rollout = responses(model)
    each = np.stack([score_all(one.network, one.params, rollout, 16) for one in model.members()]).astype(np.float64)
    expected = each.mean(axis=0) - 0.1 * each.var(axis=0)
    np.testing.assert_allclose(score_all(model.network, model.params, rollout, 16), expected, atol=1e-5)
    start = model.network.init_value(model.params)
    jax.tree.map(np.testing.assert_array_equal, start["body"], model.members()[0].params["body"])
    values = jax.jit(model.network.values)(start, joined(rollout))
    assert values.shape == (16, 6) and not np.any(values)
    rows = [json.loads(line) for line in (ensemble.directory / "metrics.jsonl").read_text().splitlines()]
    assert {row["seed"] for row in rows} == {0, 1}


@pytest.mark.nightly
@pytest.mark.parametrize("stage", ["k_wise", "reward"])
def test_scores_of_the_policys_samples_have_mean_0_and_variance_1(ensemble, stage):
    context = dataclasses.replace(ensemble, name=stage)
    before = spec(ensemble, stage)["moments"]
    assert all(abs(mean) > 0.02 and abs(deviation - 1) > 0.02 for mean, deviation in before)
    after = reward_model.score_moments(
        reward_model.NormaliseConfig(ModelSource("sft"), 24), load(ensemble, stage), context
    )
    assert len(after) == len(before) == (2 if stage == "reward" else 1)
    np.testing.assert_allclose(after, [[0, 1]] * len(before), atol=1e-4)


@pytest.mark.nightly
def test_what_is_reported_of_held_out_pairs(ensemble):
    for stage in ("k_wise", "reward"):
        directory = ensemble.workdir.find(stage)
        summary = json.loads((directory / "summary.json").read_text())
        found = json.loads((directory / "calibration.json").read_text())
        assert summary["eval_pairs"] == 16 and found["all"]["n"] == 16
        assert 0 <= summary["accuracy_low"] <= summary["accuracy"] <= summary["accuracy_high"] <= 1
        for groups in ("by_margin", "by_length", "by_label_margin", "reliability"):
            assert sum(row["n"] for row in found[groups]) == 16, groups
        assert sum(found["scores"]["chosen"]) == sum(found["scores"]["rejected"]) == 16


@pytest.mark.nightly
def test_an_ensemble_is_no_start_for_training(ensemble):
    stage = experiment.parse(_with_start(ensemble)).stages["again"]
    assert isinstance(stage, reward_model.RewardModelConfig)
    with pytest.raises(RlhfError, match="is an ensemble: name a single model to start from"):
        reward_model.run(stage, dataclasses.replace(ensemble, name="again"))


def _with_start(context: Context) -> ConfigDict:
    config = preferences.get_config("smoke").unlock()
    config.stages = ("sft", "reward", "again")
    config.reward = ConfigDict({**config.reward_model.to_dict(), **SCRATCH})
    config.again = ConfigDict({**config.reward_model.to_dict(), "model": {"init": "reward"}})
    config.data.update({"train": context.data.train, "eval": context.data.eval})
    return config


# ---- the losses' tables ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def read(ensemble) -> tuple[Any, DataConfig]:
    return load_tokenizer(ensemble.directory / "tokenizer"), ensemble.data


RANKED = [
    {"prompt": "the film", "completions": [" good", " bad", " dull"], "scores": [2.0, 1.0, 0.0]},
    {"prompt": "is", "completions": [" good and long", " bad"], "scores": [1.0, 0.0]},
]


def comparisons(name, rows, read) -> ComparisonBatch[np.ndarray]:
    batch = reward_loss.make_table(RewardLossConfig(name=name), rows, *read).all()
    assert isinstance(batch, ComparisonBatch)
    return jax.tree.map(jnp.asarray, batch)


def scores_of(network, params, batch, row, place):
    one = jax.tree.map(lambda leaf: leaf[row, place][None], batch.responses)
    return float(jax.jit(network.scores)(params, one)[0])


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["k_wise", "plackett_luce"])
def test_k_answers_of_a_prompt_are_one_element(name, read):
    tokenizer, _ = read
    config = RewardLossConfig(name=name, center_rewards_coefficient=0.5)
    network = dataclasses.replace(tiny.REWARD, vocab_size=tokenizer.vocab_size)
    params = network.init(jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, comparisons(name, RANKED, read))
    assert batch.responses.tokens.shape[:2] == (2, 3)
    scores = [[scores_of(network, params, batch, 0, place) for place in range(3)]]
    scores += [[scores_of(network, params, batch, 1, place) for place in range(2)]]
    value, metrics = jax.jit(
        lambda params: reward_loss.loss(config, network, params, batch, dropout_keys=None, axes=())
    )(params)
    ordered = [[(one, two) for i, one in enumerate(row) for two in row[i + 1 :]] for row in scores]
    centering = np.mean([np.mean([(one + two) ** 2 for one, two in row]) for row in ordered])
    if name == "k_wise":
        expected = np.mean([np.mean([np.logaddexp(0, two - one) for one, two in row]) for row in ordered])
    else:
        expected = -np.mean([sum(x - np.logaddexp.reduce(row[i:]) for i, x in enumerate(row)) for row in scores])
    np.testing.assert_allclose(value, expected + 0.5 * centering, rtol=1e-4)
    np.testing.assert_allclose(values(metrics)["centering"], centering, rtol=1e-4)
    assert reward_loss.weight(config, batch, ()) == 2
    assert reward_loss.token_counts(batch, ())["num_tokens"] == batch.responses.response_mask.sum()


@pytest.mark.nightly
def test_pairs_with_one_prompt_are_one_element_of_a_k_wise_batch(read):
    rows = [
        {"prompt": "the", "chosen": " a", "rejected": " b"},
        {"prompt": "film", "chosen": " a", "rejected": " b"},
        {"prompt": "the", "chosen": " c", "rejected": " a"},
    ]
    batch = comparisons("k_wise", rows, read)
    assert np.argwhere(batch.wins).tolist() == [[0, 0, 1], [0, 2, 0], [1, 0, 1]]
    assert batch.responses.response_mask.any(axis=2).tolist() == [[True, True, True], [True, True, False]]


@pytest.mark.nightly
def test_ties_are_no_pairs_and_no_ranking(read):
    tied = [{**RANKED[0], "scores": [1.0, 1.0, 0.0]}]
    batch = comparisons("k_wise", tied, read)
    assert np.argwhere(batch.wins).tolist() == [[0, 0, 2], [0, 1, 2]]
    assert [(row["chosen"], row["rejected"]) for row in reward_loss.pairs_from_ranking(tied[0])] == [
        (" good", " dull"),
        (" bad", " dull"),
    ]
    with pytest.raises(RlhfError, match=r"row 1 of the rankings has ties"):
        reward_loss.make_table(RewardLossConfig(name="plackett_luce"), tied, *read)


@pytest.mark.nightly
def test_margins_and_labels_are_read_from_their_columns(read):
    rows = [{"prompt": "the", "chosen": " a", "rejected": " b", "margin": 2, "labels": [1, True, 0, 0.5]}] * 2
    margin, raters = (
        jax.tree.map(jnp.asarray, reward_loss.make_table(RewardLossConfig(name=name), rows, *read).all())
        for name in ("margin", "raters")
    )
    assert margin.margin.tolist() == [2, 2] and raters.votes.tolist() == [[2.5, 1.5]] * 2
    assert reward_loss.weight(RewardLossConfig(name="raters"), raters, ()) == 8
    assert reward_loss.weight(RewardLossConfig(name="margin"), margin, ()) == 2
    network = dataclasses.replace(tiny.REWARD, vocab_size=read[0].vocab_size)
    params = network.init(jax.random.key(0))
    for batch, name in ((margin, "margin"), (raters, "raters")):
        own, plain = (
            float(
                jax.jit(lambda p, c=c, b=batch: reward_loss.loss(c, network, p, b, dropout_keys=None, axes=())[0])(
                    params
                )
            )
            for c in (RewardLossConfig(name=name), RewardLossConfig())
        )
        assert abs(own - plain) > 0.02
    for column, value in (("margin", "much"), ("margin", None), ("labels", []), ("labels", [2]), ("labels", 1)):
        with pytest.raises(RlhfError, match=rf"row 2 of the preferences, column {column}"):
            name = "margin" if column == "margin" else "raters"
            reward_loss.make_table(RewardLossConfig(name=name), [rows[0], rows[0] | {column: value}], *read)
    with pytest.raises(RlhfError, match="row 1 has no column margin"):
        reward_loss.make_table(RewardLossConfig(name="margin"), [{**RANKED[0], "chosen": "", "rejected": ""}], *read)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_smoothing": 0.5}, "label_smoothing = 0.5 must be"),
        ({"name": "raters", "label_smoothing": 0.1}, "has no effect with name = 'raters'"),
        ({"center_rewards_coefficient": -1.0}, "must be at least 0"),
    ],
)
def test_losses_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        RewardLossConfig(**fields)


def test_ensembles_that_cannot_be_are_refused():
    for fields, message in (
        ((1, "mean", None), "must be at least 2"),
        ((2, "uwo", None), "uwo requires it"),
        ((2, "wco", 0.1), "no other combination uses it"),
        ((2, "uwo", -0.1), "must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            EnsembleConfig(*fields)


def test_an_ensembles_weights_are_not_split_over_its_members():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 2, 2), ("data", "fsdp", "tensor"))
    plain = jax.eval_shape(tiny.REWARD.init, jax.random.key(0))
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape), leaf.dtype), plain)
    one, several = (shardings(tree, mesh, leading_axes=0) for tree in (plain, stacked))
    split = [(tuple(a.spec), tuple(b.spec)) for a, b in zip(*map(jax.tree.leaves, (one, several)), strict=True)]
    assert sum(any(spec) for spec, _ in split) > 5
    for spec, of_members in split:
        assert of_members == (None, *spec) or not any(spec + of_members)
