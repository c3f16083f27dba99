"""The benchmark of training: its rows are complete, its FLOPs are those counted by hand, and its stages load."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import training, training_ours, training_work
from rlhf_jax import experiment, load_policy
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.types import RlhfError

PAIRS = Path(__file__).parents[2] / "experiments/smoke/pairs_train.jsonl"
FLAGS = ["--batch=4", "--group=2", "--rows=8", "--prompt=6", "--response=8", "--rounds=2"]
KINDS = tuple(training.PASSES)


def arguments(*flags: str) -> argparse.Namespace:
    return training.parse([*FLAGS, *flags])


def run(kind: str, *flags: str) -> dict:
    (row,) = training.main([*FLAGS, f"--kind={kind}", *flags])
    return row


def check(row: dict, kind: str) -> None:
    """The figures of a row agree with each other."""
    assert row["kind"] == kind and row["side"] == "ours" and row["ratio"] == 1.0
    assert len(row["seconds_all"]) == len(row["tokens_all"]) == 2
    speeds = np.divide(row["tokens_all"], row["seconds_all"])
    assert row["tokens_per_second"] == pytest.approx(np.median(speeds))
    assert row["utilisation"] == pytest.approx(row["flops"] / row["seconds"] / row["matrix_flops_per_second"])
    assert row["compile_seconds"] > 0 and row["first_step_seconds"] > 0  # some widths compile later
    assert 2**27 < row["peak_bytes"] < 2**33  # an interpreter with JAX, and no more than a tiny model


@pytest.mark.nightly
def test_a_row_of_random_tokens(tmp_path):
    out = tmp_path / "rows" / "training.jsonl"
    row = run("sft", f"--out={out}")
    assert [json.loads(line) for line in out.read_text().splitlines()] == [row]
    check(row, "sft")
    assert row["tokens_all"] == [8 * (6 + 8)] * 2 and row["steps"] == 2
    assert re.fullmatch("[0-9a-f]{40}", row["commit"]) and re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"])
    assert row["packages"]["jax"] == jax.__version__ and row["machine"]["threads"] == 2


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_real_pairs(kind):
    row = run(kind, f"--data={PAIRS}")
    check(row, kind)
    assert row["data"] == "pairs_train.jsonl"
    if kind in training.ONLINE:
        responses = row["batch"] * row["steps"]
        assert all(responses <= tokens < 8 * responses for tokens in row["tokens_all"])
    else:
        assert row["tokens_all"][0] == row["tokens_all"][1]


@pytest.mark.nightly_rest
@pytest.mark.parametrize("kind", KINDS)
def test_the_config_of_each_kind_is_valid(kind, tmp_path):
    work = training.prepare(kind, "tiny", arguments(f"--data={PAIRS}"), tmp_path).work
    parsed = experiment.parse(training_ours.config_of(work))
    assert list(parsed.stages) == [kind]
    stage: Any = parsed.stages[kind]
    assert stage.kind == {"grpo": "group_rl"}.get(kind, kind) and stage.batch_size == 4
    assert stage.loop.steps_per_call == 1  # a step is counted at each update of the bar
    assert work.steps == {"kto": 4, "grpo": 4}.get(kind, 2)


def test_flops_by_hand():
    config = ModelConfig(
        d_model=4,
        n_layers=3,
        n_heads=2,
        n_kv_heads=1,
        d_ff=8,
        activation="silu",
        param_dtype="float32",
        compute_dtype="float32",
    )
    # A layer's matrices: q and o 4 x 4, k and v 4 x 2, three of the MLP 4 x 8. A = 3 x 2 x 2.
    weights = 3 * (2 * 16 + 2 * 8 + 3 * 32)
    assert weights == 432
    five, seven = 2 * 5 * 432 + 2 * 25 * 12, 2 * 7 * 432 + 2 * 49 * 12  # sequences of five and of seven tokens
    logits = 2 * 4 * 10
    lengths = [(3, 2), (4, 3)]
    found = {kind: training_work.model_flops(kind, config, 10, lengths) for kind in KINDS}
    bodies, heads = five + seven, (2 + 3) * logits
    assert found["sft"] == 3 * bodies + 3 * heads
    assert found["reward_model"] == 3 * bodies
    assert found["dpo"] == 4 * bodies + 4 * heads  # the reference is one forward pass more
    assert found["kto"] == 6 * bodies + 6 * heads  # and the mismatched pairs, of both models
    assert found["ppo"] == 11 * bodies + 6 * heads
    assert found["grpo"] == 5 * bodies + 5 * heads


@pytest.mark.nightly
@pytest.mark.parametrize(("data", "mean"), [(None, None), (PAIRS, 4)])
def test_the_probability_of_eos_is_set(data, mean, tmp_path):
    flags = [] if data is None else [f"--data={data}"]
    prepared = training.prepare("ppo", "tiny", arguments(*flags), tmp_path)
    policy = load_policy(prepared.work.policy)
    tokens = jax.random.randint(jax.random.key(1), (4, 6), 4, policy.network.vocab_size)
    hidden = policy.network.apply(policy.params, tokens, jnp.ones(tokens.shape, bool))
    probabilities = jax.nn.softmax(policy.network.logits(policy.params, hidden.reshape(24, -1)))
    eos = probabilities[:, policy.tokenizer.eos_id]
    if mean is None:
        assert jnp.max(eos) < 1e-6
    else:
        np.testing.assert_allclose(eos, 1 / mean, rtol=0.1)
    assert jnp.max(probabilities[:, jnp.array(policy.tokenizer.suppressed)]) < 1e-6


def test_random_rows_are_full(tmp_path):
    prepared = training.prepare("dpo", "tiny", arguments(), tmp_path)
    assert prepared.lengths == [(6, 8)] * 16
    pairs = [json.loads(line) for line in Path(prepared.work.ids).read_text().splitlines()]
    assert {(len(pair["prompt"]), len(pair["chosen"]), len(pair["rejected"])) for pair in pairs} == {(6, 8, 8)}


def test_a_side_that_sees_other_tokens_is_an_error(tmp_path):
    prepared = training.prepare("dpo", "tiny", arguments(), tmp_path)
    with pytest.raises(RlhfError, match=r"trl saw .* tokens in its rounds of 224"):
        training.summarise("trl", prepared, [], {"tokens": [224, 224, 223]})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds=0"], "--rounds must be at least 1"),
        (["--kind=kto", "--batch=3"], "--batch must be even for kto"),
        (["--kind=grpo", "--batch=3"], "does not divide into groups of --group=2"),
        (["--peer=trl", "--peer-python=/no/python"], "/no/python has no TRL: name another interpreter"),
    ],
)
def test_bad_arguments(flags, message, capsys):
    with pytest.raises(SystemExit):
        arguments(*flags)
    assert message in capsys.readouterr().err


def test_bad_data(tmp_path):
    with pytest.raises(RlhfError, match="8 pairs do not fill a batch of 9: lower --batch or raise --rows"):
        training.prepare("sft", "tiny", arguments("--kind=sft", "--batch=9", f"--data={PAIRS}"), tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    with pytest.raises(RlhfError, match="no preference pairs"):
        training.prepare("sft", "tiny", arguments(f"--data={prompts}"), tmp_path)
