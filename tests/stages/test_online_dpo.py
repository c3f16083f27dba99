"""Online DPO: two samples a prompt, chosen by their scores, on one device and several, for one seed and several."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import ModelSource, StageName
from rlhf_jax.core.sequences import joined
from rlhf_jax.methods import two_steps
from rlhf_jax.methods.online_pairs import choose
from rlhf_jax.methods.policy_parts import Sampled
from rlhf_jax.methods.preference_table import PreferenceLossConfig
from rlhf_jax.reports.run import Run
from rlhf_jax.rewards import judging, tfidf
from rlhf_jax.rewards.tfidf import TfidfRidgeConfig
from rlhf_jax.runtime.programs import SEED_AXIS, make_placement
from rlhf_jax.runtime.two_programs import Scored, TwoPrograms
from rlhf_jax.stages import online_dpo
from rlhf_jax.text.tokenizer import TokenizerConfig, train_tokenizer
from rlhf_jax.types import Rollout
from tests.support import experiments, tiny
from tests.support.judge_server import likes_longer, serving
from tests.support.programs import PLACEMENTS, QUICK, assert_close, learn, score

CONFIG = online_dpo.OnlineDPOConfig(
    kind="online_dpo",
    policy=ModelSource("sft"),
    reward_model=ModelSource("reward_model"),
    iterations=3,
    batch_size=16,
    minibatches=2,
    epochs=2,
    temperature=1.0,
    beta=0.1,
    missing_eos_penalty=0.5,
    optimizer=tiny.OPTIMIZER,
    samples_every=1,
    samples_written=4,
    loop=tiny.LOOP,
)
MIXTURE = PreferenceLossConfig(losses=("sigmoid", "ipo"), loss_weights=(1.0, 1e-4))
KEYS = jnp.stack([jax.random.key(seed) for seed in (5, 6)])
BATCHES = [[tiny.online(16, 10 * seed + i) for i in range(CONFIG.iterations)] for seed in range(2)]


def iteration(config=CONFIG, axes=(), loop_axes=()):
    return tiny.iteration(config, axes, loop_axes, tiny.CRITIC_FREE, online_dpo.build_method(config))


def start(config=CONFIG):
    return iteration(config).init_state({"policy": tiny.policy_params()})


def run(where, config=CONFIG, seed=0):
    """Three iterations of one seed, from a policy that is far from its reference."""
    placement = make_placement(where, seeds=1)
    state, frozen = placement.put_state(start(config)), placement.put_frozen(tiny.ppo_frozen())
    program = placement.compile(iteration(config, placement.axes).step(tiny.REWARD), state)
    state, metrics, samples = program(state, frozen, tiny.several(BATCHES[seed]), KEYS[seed])
    return jax.device_get((placement.whole(state).params, metrics, samples))


@pytest.fixture(scope="module")
def one_device():
    return run(tiny.ONE_DEVICE)


@pytest.mark.nightly
def test_a_seed_of_two_over_devices_and_scored_on_the_host_is_the_run_of_that_seed(one_device):
    placement, frozen = make_placement(dataclasses.replace(PLACEMENTS["pmap=8"], data=2), seeds=2), tiny.ppo_frozen()
    scores = jax.jit(tiny.REWARD.scores)

    def on_host(rollout):
        return Scored(np.asarray(scores(frozen["reward"], joined(rollout))), {})

    at = iteration(CONFIG, placement.axes, (SEED_AXIS,))
    steps = two_steps.scored_on_host(at, on_host, two_steps.LONGEST)
    state = placement.put_state(jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), start()))
    program = TwoPrograms(placement, steps)
    batches = tiny.several([tiny.several(list(pair)) for pair in zip(*BATCHES, strict=True)])
    state, metrics, samples = jax.device_get(program(state, placement.put_frozen(frozen), batches, KEYS))
    params, (one_params, one_metrics, one_samples) = placement.whole(state).params, one_device
    np.testing.assert_array_equal(samples.rollout.response[:, 0], one_samples.rollout.response)
    assert not np.array_equal(samples.rollout.response[:, 0], samples.rollout.response[:, 1])
    assert_close(jax.tree.map(lambda leaf: leaf[0], params), one_params)
    assert metrics.keys() == one_metrics.keys()
    for name, values in one_metrics.items():  # two equal responses have a margin of 0, or of a rounding error
        tolerance = 0.1 if name == "rewards/accuracies" else 1e-5
        np.testing.assert_allclose(metrics[name][:, 0], values, rtol=1e-5, atol=tolerance, err_msg=name)


def test_metrics_are_those_of_the_samples(one_device):
    _, metrics, samples = one_device
    ended = np.any((samples.rollout.response == tiny.EOS) & samples.rollout.response_mask, axis=-1)
    assert 0 < ended.mean() < 1
    np.testing.assert_array_equal(samples.rollout.prompt[:, ::2], samples.rollout.prompt[:, 1::2])
    assert np.any(samples.rollout.response[:, ::2] != samples.rollout.response[:, 1::2], axis=-1).mean() > 0.5
    penalised = samples.scores - 0.5 * ~ended
    pairs = penalised.reshape(3, 16, 2)
    np.testing.assert_allclose(metrics["objective/scores"], penalised.mean(axis=1), rtol=1e-5)
    gaps = np.abs(pairs[..., 0] - pairs[..., 1])
    np.testing.assert_allclose(metrics["objective/scores_margin"], gaps.mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(metrics["objective/ties"], (gaps == 0).mean(axis=1))
    np.testing.assert_allclose(metrics["objective/kl"], samples.kl.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["objective/rlhf_reward"], penalised.mean(axis=1) - 0.1 * samples.kl.mean(axis=1), rtol=1e-4
    )
    lengths = samples.rollout.response_mask.sum(axis=-1)
    np.testing.assert_array_equal(metrics["completions/max_length"], lengths.max(axis=1))
    np.testing.assert_array_equal(metrics["num_tokens"], lengths.sum(axis=1))
    np.testing.assert_array_equal(metrics["val/num_eos_tokens"], ended.sum(axis=1))


def test_the_higher_score_is_chosen_and_of_a_tie_the_first():
    rows = jnp.arange(8)
    rollout = Rollout(*(jnp.stack([rows, rows], axis=1) for _ in range(4)))
    pairs, margins = choose(joined(rollout), jnp.array([1.0, 2.0, 2.0, 1.0, 3.0, 3.0, -1.0, -2.0]))
    np.testing.assert_array_equal(pairs.chosen.tokens[:, 0], [1, 2, 4, 6])  # the prompt of the row itself
    np.testing.assert_array_equal(pairs.rejected.tokens[:, 0], [0, 3, 5, 7])
    np.testing.assert_array_equal(pairs.chosen.response[:, 0], [1, 2, 4, 6])
    np.testing.assert_array_equal(pairs.rejected.response[:, 0], [0, 3, 5, 7])
    np.testing.assert_array_equal(pairs.chosen.response_mask, pairs.chosen.response)
    np.testing.assert_array_equal(margins, [1, 1, 0, 1])


@pytest.mark.nightly
def test_it_pleases_the_reward_model():
    changes = {"iterations": 50, "minibatches": 1, "epochs": 1, "missing_eos_penalty": 0.0, "beta": 0.02}
    config = dataclasses.replace(CONFIG, optimizer=QUICK, loss=MIXTURE, **changes)
    params, frozen = (
        {"policy": tiny.policy_params()},
        {"reference": tiny.policy_params(), "reward": tiny.reward_params()},
    )
    step = iteration(config).step(tiny.REWARD)
    _, metrics, samples = learn(step, params, frozen, [tiny.online(16, seed) for seed in range(50)])
    scores = samples.scores.mean(axis=1)
    last = jax.tree.map(lambda leaf: leaf[-1], samples)
    np.testing.assert_allclose(last.scores, score(tiny.reward_params(), joined(last.rollout)), rtol=1e-4)
    np.testing.assert_allclose(metrics["objective/kl"][0], 0, atol=1e-5)  # the policy is still its reference
    first = (np.log(2), (1 / (2 * 0.02)) ** 2)
    np.testing.assert_allclose((metrics["loss/sigmoid"][0], metrics["loss/ipo"][0]), first, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"][0], first[0] + 1e-4 * first[1], rtol=1e-5)
    assert scores[-10:].mean() > scores[:10].mean() + 3 * scores[:10].std()
    assert metrics["objective/kl"][-1] > 0.1


def test_a_loss_without_a_reference_needs_none_of_the_pairs():
    config = dataclasses.replace(CONFIG, loss=PreferenceLossConfig(losses=("simpo",)))
    prompts, rows = tiny.prompts(16), tiny.preferences(16).chosen
    rollout = Rollout(*map(jnp.asarray, (prompts.tokens, prompts.mask, rows.response, rows.response_mask)))
    params = {"policy": jax.eval_shape(tiny.POLICY.init, KEYS[0])}
    at, frozen = iteration(config), {"reference": params["policy"]}

    def prepare(params, frozen):
        responses = at.scored(Sampled(rollout, jnp.zeros(rollout.response.shape), None), jnp.zeros(16))
        return at.method.learner.prepare(at, at.evaluate(params, frozen, responses, joined(rollout)), frozen, 0.1)

    pairs, _ = jax.eval_shape(prepare, params, frozen)
    assert pairs.pairs.chosen.response.shape == (8, tiny.RESPONSE) and pairs.reference is None
    state, batch = jax.eval_shape(at.init_state, params), tiny.online(8)
    _, metrics, _ = jax.eval_shape(
        at.step(tiny.REWARD), state, frozen | {"reward": tiny.reward_params()}, batch, KEYS[0]
    )
    assert {"loss", "grad_norm", "rewards/margins"} <= metrics.keys()


def test_a_judge_with_scores_reads_prompts_and_responses():
    tokenizer = train_tokenizer(TokenizerConfig("word", 16), ["a good film", "a bad film"])
    judge = tfidf.fit(TfidfRidgeConfig(1.0, 1), ["a good film", "a bad film", "film"], [1.0, -1.0, 0.0])
    prompt, answers = tokenizer.encode("a"), [tokenizer.encode(text) for text in ("bad film", "good film")]
    rollout = Rollout(*(np.array(leaf, np.int32) for leaf in ([prompt] * 2, [[1]] * 2, answers, [[1, 1]] * 2)))
    masks = {"prompt_mask": rollout.prompt_mask.astype(bool), "response_mask": rollout.response_mask.astype(bool)}
    scores = judging.pair_scorer(judge, tokenizer)(rollout._replace(**masks)).scores
    np.testing.assert_allclose(scores, judge.score(["a bad film", "a good film"]))
    assert scores[0] < scores[1]


@pytest.mark.nightly
def test_an_experiment_with_two_seeds_by_a_reward_model_and_one_by_a_judge(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_DATA", str(tmp_path / "cache"))
    model, judge = experiments.models(tmp_path)
    section = {
        "kind": "online_dpo",
        "policy": model,
        "reward_model": judge,
        "iterations": 4,
        "batch_size": 8,
        "minibatches": 1,
        "epochs": 1,
        "temperature": 0.9,
        "beta": 0.1,
        "missing_eos_penalty": 1.0,
        "optimizer": experiments.OPTIMIZER,
        "samples_every": 2,
        "samples_written": 6,
        "loop": {"steps_per_call": 2, "checkpoint_every": 2},
        "tuning": {"lora": {"rank": 2, "alpha": 4.0, "targets": ("attention/q",), "dropout": 0.1}},
    }
    data = experiments.questions(tmp_path / "questions.jsonl", 16)
    directory = experiments.run(tmp_path / "run", data, {"online": section}, seeds=2).find("online")
    with serving(likes_longer) as server:
        asking = {"reward_model": None, "judge": {"url": server.url, "model": "tiny"}, "missing_eos_penalty": 0.0}
        judged = experiments.run(tmp_path / "judged", data, {"online": section | asking}).find("online")
    rows = experiments.rows(judged / "samples.jsonl")
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        lengths = len(one["completion"]), len(other["completion"])
        assert (one["score"], other["score"]) == {1: (1, 0), 0: (0.5, 0.5), -1: (0, 1)}[
            np.sign(lengths[0] - lengths[1])
        ]
    assert {row["score"] for row in rows} >= {0, 1}
    assert json.loads((judged / "summary.json").read_text())["judge_replies"] > 0
    metrics = experiments.rows(directory / "metrics.jsonl")
    assert [(row["step"], row["seed"]) for row in metrics] == [(step, seed) for step in range(1, 5) for seed in (0, 1)]
    alone = experiments.run(tmp_path / "alone", data, {"online": section}, seed=1).find("online")
    for row, one in zip(metrics[1::2], experiments.rows(alone / "metrics.jsonl"), strict=True):
        for name in ("loss", "objective/kl", "objective/scores", "grad_norm"):
            assert row[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name  # its adapter started alike
    experiments.assert_resumes(tmp_path / "alone", data, {"online": section}, seed=1)
    samples = experiments.rows(directory / "samples.jsonl")
    assert [row["step"] for row in samples] == [1] * 12 + [2] * 12 + [4] * 12
    assert samples[0]["prompt"] == samples[1]["prompt"] and samples[0]["completion"] != samples[1]["completion"]
    assert json.loads((directory / "summary.json").read_text())["pairs"] == 4 * 8
    policies = [Run(tmp_path / "run").load_policy("online", seed=seed).params for seed in (0, 1)]
    first, second = ([np.asarray(leaf) for leaf in jax.tree.leaves(policy.adapter)] for policy in policies)
    assert all(np.any(a != b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"minibatches": 3}, "batch_size = 16 is not a multiple of minibatches = 3"),
        ({"temperature": 0.0}, "temperature = 0.0 must be above 0"),
        ({"beta": 0.0}, "beta = 0.0 must be above 0"),
        ({"judge": StageName("gold")}, "exactly one of them labels"),
        (
            {
                "loss": PreferenceLossConfig(losses=("aot",)),
                "optimizer": dataclasses.replace(tiny.OPTIMIZER, micro_batch=4),
            },
            "aot, which uses statistics of the whole batch",
        ),
    ],
    ids=["minibatches", "temperature", "beta", "judge", "micro_batch"],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
