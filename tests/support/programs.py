"""Training steps of the tiny networks: one step on one device and on meshes, and short runs that must learn."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.optimizers import make_optimizer
from rlhf_jax.runtime.programs import RuntimeConfig, make_placement
from rlhf_jax.stages import ppo
from tests.support import tiny


def runtime(strategy: Literal["jit", "pmap"], **sizes: Any) -> RuntimeConfig:
    """Placement of a step: a strategy and the sizes of its mesh."""
    return dataclasses.replace(tiny.ONE_DEVICE, strategy=strategy, **sizes)


PLACEMENTS = {
    "data=8": runtime("jit", data=8, fsdp=1, tensor=1),
    "fsdp=4 x tensor=2": runtime("jit", data=1, fsdp=4, tensor=2),
    "pmap=8": runtime("pmap", data=8, fsdp=1, tensor=1),
}


def run_ppo(where: RuntimeConfig, config: ppo.PPOConfig = tiny.PPO, iterations: int = 1):
    """Parameters, metrics and samples of PPO iterations in one program."""
    placement = make_placement(where, seeds=1)
    step = tiny.ppo_step(config, placement.axes)
    state = placement.put_state(tiny.ppo_state(config))
    frozen = placement.put_frozen(tiny.ppo_frozen())
    batches = tiny.several([tiny.online(config.batch_size, seed) for seed in range(iterations)])
    state, metrics, samples = placement.compile(step, state)(state, frozen, batches, jax.random.key(0))
    return jax.device_get((placement.whole(state).params, metrics, samples))


def assert_close(actual, expected, tolerance: float = 1e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), actual, expected)


QUICK = dataclasses.replace(tiny.OPTIMIZER, learning_rate=1e-2)


def learn(step, params, frozen, batches):
    """Run one step a batch: the parameters at the end, and the metrics and samples of all steps."""
    state = TrainState(jnp.int32(0), params, make_optimizer(QUICK, len(batches)).init(params))
    placement = make_placement(tiny.ONE_DEVICE, seeds=1)
    state = placement.put_state(state)
    program = placement.compile(step, state)
    state, metrics, samples = program(state, placement.put_frozen(frozen), tiny.several(batches), jax.random.key(0))
    return jax.device_get((placement.whole(state).params, metrics, samples))


@jax.jit
def token_logprobs(policy, sequences):
    """Compute the log-probability of every response token by the tiny policy, [B, T]; 0 at padding."""
    stats = tiny.POLICY.response_stats(policy, sequences, temperature=1.0)
    return jnp.where(sequences.response_mask, stats.logprobs, 0)


def log_ratios(policy, reference, sequences) -> np.ndarray:
    """Compute log(pi / pi_ref) of every response, [B]."""
    return np.sum(token_logprobs(policy, sequences) - token_logprobs(reference, sequences), axis=1)


@jax.jit
def score(reward, sequences):
    """Compute the tiny reward model's score of every response, [B]."""
    return tiny.REWARD.scores(reward, sequences)
