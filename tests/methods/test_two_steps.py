"""Iterations in two programs, packed or at the widths of each batch, equal those in one at the maximum lengths."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.sequences import joined
from rlhf_jax.methods import two_steps
from rlhf_jax.methods.policy_gradient import Iteration
from rlhf_jax.methods.policy_parts import OnlineBatch
from rlhf_jax.runtime.programs import SEED_AXIS, make_placement
from rlhf_jax.runtime.two_programs import Scored, TwoPrograms
from rlhf_jax.sampling import buckets
from rlhf_jax.stages import online_dpo
from tests.support import tiny
from tests.support.compilations import compilations
from tests.support.programs import assert_close, runtime

LIMIT, ROWS, ROUNDS = 16, 16, 2
STOPS = (2, 4, 5, 6, 7, 8)  # about half of all tokens end a response
NETWORKS = dataclasses.replace(tiny.NETWORKS, stop_ids=STOPS, max_new_tokens=LIMIT)
ONLINE_DPO = online_dpo.OnlineDPOConfig(
    **{name: getattr(tiny.PPO, name) for name in ("policy", "reward_model", "iterations", "optimizer", "loop")},
    **{"minibatches": 2, "epochs": 2, "temperature": 1.0, "samples_every": 1, "samples_written": 4},
    kind="online_dpo",
    batch_size=ROWS // 2,
    beta=0.1,
)
CASES: dict[str, Any] = {
    "ppo": tiny.with_config(importance_cap=2.0, temperature=0.9),
    "once": tiny.with_config(epochs=1, minibatches=1),
    "dapo": tiny.group_config("dapo", dynamic_sampling_rounds=ROUNDS, minibatches=2),
    "online_dpo": ONLINE_DPO,
    "grpo": tiny.group_config("grpo", old_logprobs="sampler", epochs=2, minibatches=2),
    "rloo": tiny.group_config("rloo", minibatches=2, reject_truncated=True),
}
SLOW = ("ppo", "dapo", "online_dpo", "grpo", "rloo")


@pytest.fixture(autouse=True)
def narrow_buckets(monkeypatch):
    """Buckets of 1, 2, 4, ... tokens, so that tiny batches differ in width."""
    monkeypatch.setattr(buckets, "LEAST", 1)


def iteration_of(name: str, axes=(), loop_axes=()) -> Iteration:
    config = CASES[name]
    method = online_dpo.build_method(config) if name == "online_dpo" else tiny.build_method(config)
    networks = NETWORKS if name in ("ppo", "once") else dataclasses.replace(NETWORKS, value=None)
    return Iteration(networks, config, axes, loop_axes, method)


def batch_of(iteration: Iteration, seed: int) -> OnlineBatch[np.ndarray]:
    """Prompts of 1 to 3 of 4 positions."""
    rounds = ROUNDS if iteration.method.dynamic_sampling else 1
    prompts = tiny.prompts(ROWS // iteration.method.num_generations * rounds, seed)
    mask = prompts.mask.copy()
    mask[:, :2] = False
    prompts = prompts._replace(mask=mask)
    if rounds > 1:
        prompts = jax.tree.map(lambda leaf: leaf.reshape(rounds, -1, *leaf.shape[1:]).swapaxes(0, 1), prompts)
    return OnlineBatch(prompts)


def run(iteration: Iteration, steps, where=tiny.ONE_DEVICE, seeds=(0,)):
    """Parameters, metrics and samples of two iterations of each seed."""
    placement = make_placement(where, len(seeds))
    params = {"policy": tiny.policy_params()}
    if iteration.networks.value is not None:
        params["value"] = tiny.REWARD.init_value(tiny.reward_params())
    state, batches = iteration.init_state(params), [[batch_of(iteration, 7 * k + i) for k in seeds] for i in range(2)]
    keys = [jax.random.key(k) for k in seeds]
    if len(seeds) > 1:
        state = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(seeds)), state)
        stacked, key = tiny.several([tiny.several(each) for each in batches]), jnp.stack(keys)
    else:
        stacked, key = tiny.several([each[0] for each in batches]), keys[0]
    state, frozen = placement.put_state(state), placement.put_frozen(tiny.ppo_frozen())
    program = (
        TwoPrograms(placement, steps) if isinstance(steps, two_steps.TwoSteps) else placement.compile(steps, state)
    )
    state, metrics, samples = program(state, frozen, stacked, key)
    return jax.device_get((placement.whole(state).params, metrics, samples))


def watched(fit: two_steps.Fit, seen: list) -> two_steps.Fit:
    """The fit, which appends its choices to a list."""

    def seeing(choose):
        return lambda *args: seen.append(choose(*args)) or seen[-1]

    return two_steps.Fit(seeing(fit.prompts), seeing(fit.rows))


def equal(found, expected) -> None:
    (params, metrics, samples), (one_params, one_metrics, one_samples) = found, expected
    jax.tree.map(np.testing.assert_array_equal, samples.rollout, one_samples.rollout)
    assert metrics.keys() == one_metrics.keys()
    shares = metrics["token_share"], one_metrics["token_share"]
    apart = ("token_share", "rewards/accuracies")  # equal responses of a pair win or lose by rounding
    metrics, one_metrics = (
        {key: value for key, value in each.items() if key not in apart} for each in (metrics, one_metrics)
    )
    assert np.all(shares[0] > 1.2 * shares[1])
    tokens = np.sum(samples.rollout.prompt_mask, axis=(1, 2)) + np.sum(samples.rollout.response_mask, axis=(1, 2))
    np.testing.assert_allclose(shares[1], tokens / (ROWS * (tiny.PROMPT + LIMIT)), rtol=1e-5)
    assert_close(metrics, one_metrics, 1e-4)
    assert_close((params, samples.scores, samples.kl), (one_params, one_samples.scores, one_samples.kl))
    written = {name: value[:, : one_samples.tokens[name].shape[1]] for name, value in samples.tokens.items()}
    assert_close(written, one_samples.tokens, 1e-3)  # under pmap, every device records as many


@functools.cache
def padded(name: str):
    """Run the iterations in one program, which several tests compare with."""
    at = iteration_of(name)
    return run(at, at.step(tiny.REWARD))


EACH = [pytest.param(name, marks=pytest.mark.nightly) if name in SLOW else name for name in CASES]


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in CASES if name != "online_dpo"])
def test_packed_rows_give_the_iteration_of_padded_ones(name):
    at, seen = iteration_of(name), []
    if name == "rloo":  # minibatches of 8 rows, in two parts
        optimizer = dataclasses.replace(at.config.optimizer, micro_batch=4)
        at = dataclasses.replace(at, config=dataclasses.replace(at.config, optimizer=optimizer))
    found = run(at, two_steps.scored_by_network(at, tiny.REWARD, watched(two_steps.fit_of(at, 1), seen)))
    for plan in seen[1::2]:
        for packing in [each for each in plan.given if each is not None]:  # a single update has that of the whole batch
            assert np.any((packing.sequence >= 0) & (packing.sequence != packing.sequence[..., :1]))  # rows are shared
    equal(found, run(at, at.step(tiny.REWARD)) if name == "rloo" else padded(name))


def test_online_dpo_does_not_pack():
    assert two_steps.fit_of(iteration_of("online_dpo"), 1) is two_steps.LONGEST


@pytest.mark.nightly
@pytest.mark.parametrize("name", EACH)
def test_an_iteration_at_the_widths_of_its_batch_equals_the_padded_one(name):
    at, seen = iteration_of(name), []
    steps = two_steps.scored_by_network(at, tiny.REWARD, watched(two_steps.LONGEST, seen))
    with compilations() as compiled:
        found = run(at, steps)
    expected = padded(name)
    equal(found, expected)
    rollout = expected[2].rollout
    responses = rollout.response_mask.sum(axis=-1)
    rows = rollout.prompt_mask.sum(axis=-1) + responses
    widths = [plan.widths for plan in seen[1::2]]
    for i, (row, response, _) in enumerate(widths):
        assert row in (5, 10, 15) and row - 5 < rows[i].max() <= row
        assert response in (8, 16) and response - 8 < responses[i].max() <= response
    assert seen[::2] == [2, 2]
    assert compiled["learn"] == len(set(widths))
    assert compiled["fill" if at.method.dynamic_sampling else "sample"] == 1


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["ppo", "rloo"])
def test_slots_sample_the_same_responses(name):
    at, seed = iteration_of(name), 3
    params = {"policy": tiny.policy_params(), "value": tiny.reward_params()}
    batch, state = jax.tree.map(jnp.asarray, batch_of(at, seed)), at.init_state({"policy": params["policy"]})

    def sampled(**changes):
        own = dataclasses.replace(at, config=dataclasses.replace(at.config, **changes))
        sample = jax.jit(own.sample, static_argnums=4)
        return sample(state._replace(params=params), tiny.ppo_frozen(), batch, jax.random.key(seed), 2)

    found, expected = sampled(slots=5), sampled()
    jax.tree.map(np.testing.assert_array_equal, found.rollout, expected.rollout)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
    assert len(set(found.rollout.response_mask.sum(axis=1).tolist())) > 3


@pytest.mark.nightly
@pytest.mark.parametrize("scorer", ["network", "host"])
@pytest.mark.parametrize("where", [runtime("pmap", data=2), runtime("jit", data=2, fsdp=2)], ids=["pmap", "mesh"])
@pytest.mark.parametrize("packs", [False, True])
def test_seeds_on_several_devices_share_the_widths_and_equal_the_runs_of_each(packs, where, scorer):
    at, seen = iteration_of("ppo", make_placement(where, 2).axes, (SEED_AXIS,)), []
    fit = two_steps.fit_of(at, where.data * where.fsdp) if packs else two_steps.LONGEST
    fit, reward = watched(fit, seen), jax.jit(tiny.REWARD.scores)

    def score(rollout):
        return Scored(np.asarray(reward(tiny.reward_params(), joined(rollout))), {})

    if scorer == "host":
        steps = two_steps.scored_on_host(at, score, fit)
    else:
        steps = two_steps.scored_by_network(at, tiny.REWARD, fit)
    params, metrics, samples = run(at, steps, where, seeds=(0, 1))
    assert all(bool(plan.widths.packed) == packs for plan in seen[1::2])
    assert len(seen) == 4  # a width of the prompts and one of the rows for each iteration, whatever the seeds
    alone = iteration_of("ppo")
    for seed in range(2):
        of_seed = (
            jax.tree.map(lambda leaf, k=seed: leaf[k], params),
            *jax.tree.map(lambda leaf, k=seed: leaf[:, k], (metrics, samples)),
        )
        equal(of_seed, run(alone, alone.step(tiny.REWARD), seeds=(seed,)))
