"""A policy whose every response can be listed, so that expectations are sums.

Four tokens, one of them EOS, one prompt, and responses of at most three tokens: 40 responses, 27 of them cut off. The
networks, the halves of an iteration and the optimiser are those that train.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from rlhf_jax.config import ModelSource
from rlhf_jax.core.logprobs import sequence_logprobs
from rlhf_jax.core.sequences import joined
from rlhf_jax.data.padding import pad_right
from rlhf_jax.methods.policy_gradient import Iteration
from rlhf_jax.methods.policy_parts import Networks, Sampled
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.runtime.loop import LoopConfig
from rlhf_jax.runtime.optimizers import OptimizerConfig
from rlhf_jax.stages.group_rl import GroupRLConfig
from rlhf_jax.stages.ppo import PPOConfig
from rlhf_jax.types import Rollout
from tests.support import networks, tiny

VOCAB, EOS = 4, 3
MODEL = networks.config(d_model=8, n_layers=1, d_ff=16, activation="gelu")
POLICY = PolicyNetwork(MODEL, VOCAB, ())
RATE = 1e3  # so large that rounding of the parameters is nothing beside an update
COMMON: dict[str, Any] = {
    "policy": ModelSource("sft"),
    "reward_model": ModelSource("reward_model"),
    "iterations": 1,
    "minibatches": 1,
    "epochs": 1,
    "temperature": 1.0,
    "optimizer": OptimizerConfig(
        name="sgd", learning_rate=RATE, schedule="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1e9
    ),
    "samples_every": 1,
    "samples_written": 1,
    "loop": LoopConfig(steps_per_call=1, checkpoint_every=1),
}
"""Fields of every policy gradient's config: one update an iteration, along a gradient that nothing bounds."""


def of_group(method: str, size: int, **fields: Any) -> GroupRLConfig:
    """A method of `group_rl` in batches of one group, without a penalty, unless told otherwise."""
    given = {**COMMON, "kl_coef": 0.0, "batch_size": size, **fields}
    return GroupRLConfig(kind="group_rl", method=method, num_generations=size, **given)  # type: ignore[arg-type]


class World(NamedTuple):
    """All responses to one prompt, their scores, and the parameters of policies far from uniform and each other."""

    responses: Rollout[np.ndarray]
    scores: jax.Array  # [N]
    policy: Any
    reference: Any
    sampler: Any  # what responses are sampled from


@functools.cache
def world(longest: int) -> World:
    """The world of responses of at most so many tokens, of which there are 4, 13, 40 for 1, 2, 3; sampled on-policy."""
    policy, reference = (sharper(POLICY.init(jax.random.key(seed))) for seed in (0, 1))
    responses = every_response(longest)
    return World(responses, jnp.asarray(scores(len(responses.prompt)), jnp.float32), policy, reference, policy)


def scores(count: int) -> np.ndarray:
    """Scores with one decimal, some of them equal, float64[N]."""
    return np.round(np.random.default_rng(0).normal(size=count), 1)


def sharper(params: Any) -> Any:
    """Parameters whose distribution is far from uniform."""
    return {**params, "embedding": 12 * params["embedding"]}


def every_response(longest: int) -> Rollout[np.ndarray]:
    """All responses of at most so many tokens: those that EOS ends, and those that are cut off."""
    rest = [token for token in range(VOCAB) if token != EOS]
    found = [(*text, EOS) for length in range(longest) for text in itertools.product(rest, repeat=length)]
    return _padded([*found, *itertools.product(rest, repeat=longest)], longest)


def _padded(responses: list[tuple[int, ...]], longest: int) -> Rollout[np.ndarray]:
    tokens, mask = pad_right(responses, longest)
    prompt = np.zeros((len(responses), 1), np.int32)
    return Rollout(prompt, np.ones(prompt.shape, bool), tokens, mask)


@jax.jit
def token_logprobs(params: Any, responses: Rollout) -> jax.Array:
    """The log-probability of every token of every response, [N, T]; 0 where there is none."""
    stats = POLICY.response_stats(params, joined(responses), temperature=1.0)
    return jnp.where(responses.response_mask, stats.logprobs, 0)


@jax.jit
def response_logprobs(params: Any, responses: Rollout) -> jax.Array:
    """The log-probability of every response, [N]."""
    return sequence_logprobs(token_logprobs(params, responses), responses.response_mask)


def chances(params: Any, responses: Rollout[np.ndarray]) -> np.ndarray:
    """The probability of every response, float64[N]."""
    found = np.exp(np.asarray(response_logprobs(params, responses), np.float64))
    np.testing.assert_allclose(found.sum(), 1, atol=1e-5)
    return found / found.sum()


class States(NamedTuple):
    """Every text that a response may go on from, each with all tokens that may follow."""

    texts: list[tuple[int, ...]]
    following: Rollout[np.ndarray]  # [S * V]: each text and one more token


@functools.cache
def every_state(longest: int) -> States:
    """The states in which a token of a response is chosen, of which there are 1, 4, 13 for 1, 2, 3 tokens."""
    rest = [token for token in range(VOCAB) if token != EOS]
    texts = [text for length in range(longest) for text in itertools.product(rest, repeat=length)]
    return States(texts, _padded([(*text, token) for text in texts for token in range(VOCAB)], longest))


def next_tokens(params: Any, longest: int) -> tuple[jax.Array, jax.Array]:
    """The probability that a response passes through each state, [S], and the log-probabilities there, [S, V]."""
    following = every_state(longest).following
    tokens = token_logprobs(params, following)
    last = jnp.sum(following.response_mask, axis=1, keepdims=True) - 1
    logprobs = jnp.take_along_axis(tokens, last, axis=1)[:, 0]
    before = jnp.sum(tokens, axis=1) - logprobs
    return jnp.exp(before.reshape(-1, VOCAB)[:, 0]), logprobs.reshape(-1, VOCAB)


Objective = Callable[[Any, World], jax.Array]
"""A scalar function of a policy's parameters, in a world."""


def mean_score(policy: Any, at: World) -> jax.Array:
    """The expected score."""
    return jnp.exp(response_logprobs(policy, at.responses)) @ at.scores


def divergence(policy: Any, at: World) -> jax.Array:
    """The KL divergence from the reference, of whole responses, in nats."""
    logprobs = response_logprobs(policy, at.responses)
    return jnp.exp(logprobs) @ (logprobs - response_logprobs(at.reference, at.responses))


def gradient(objective: Objective, at: World) -> np.ndarray:
    """The gradient of an objective at a world's policy, float64[D]."""
    return np.asarray(ravel_pytree(_gradient(objective)(at.policy, at))[0], np.float64)


@functools.cache
def _gradient(objective: Objective) -> Callable[[Any, World], Any]:
    return jax.jit(jax.grad(objective))


@functools.cache
def score_functions(longest: int) -> np.ndarray:
    """The gradient of the log-probability of every token of every response, float64[N, T, D]."""
    at = world(longest)
    rows = jax.jit(jax.jacrev(lambda params: token_logprobs(params, at.responses)))(at.policy)
    flat = [np.asarray(leaf, np.float64).reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(rows)]
    return np.concatenate(flat, axis=2)


class Batches(NamedTuple):
    """Every batch that the policy may sample, and what the first update of an iteration makes of each."""

    rows: np.ndarray  # int[K, size]: which responses
    chances: np.ndarray  # float64[K]
    ascent: np.ndarray  # float64[K, D]: minus the gradient of the loss
    ratio: np.ndarray  # float64[K]: the mean ratio of the tokens' probabilities, new over old

    def mean(self, weights: np.ndarray | float = 1.0) -> np.ndarray:
        """The expected ascent, of batches that count so much each."""
        return (self.chances * weights) @ self.ascent


def every_batch(
    world: World,
    config: PPOConfig | GroupRLConfig,
    *,
    value: ScalarNetwork | None = None,
    value_params: Any = None,
    **method: Any,
) -> Batches:
    """Learns from each of the N ** batch_size batches, by the second half of an iteration.

    Args: value is the value function, if the method has one; method overrides fields of `OnlineMethod`.
    """
    rows = np.array(list(itertools.product(range(len(world.scores)), repeat=config.batch_size)))
    learn = _learning(config, value, tuple(sorted(method.items())))
    descent, ratio = learn(world, value_params, rows)
    each = np.prod(chances(world.sampler, world.responses)[rows], axis=1)
    return Batches(rows, each, -np.asarray(descent, np.float64), np.asarray(ratio, np.float64))


@functools.cache
def _learning(config: PPOConfig | GroupRLConfig, value: ScalarNetwork | None, changes: tuple) -> Callable[..., Any]:
    """One program for all worlds and values: the gradient and the mean ratio of every batch."""
    method = tiny.build_method(config)
    method = dataclasses.replace(method, **dict(changes))

    def learn(world: World, value_params: Any, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        networks = Networks(POLICY, value, (EOS,), world.responses.response.shape[1])
        iteration = Iteration(networks, config, (), (), method)
        params = {"policy": world.policy} | ({} if value is None else {"value": value_params})
        state = iteration.init_state(params)
        sampled = Sampled(
            jax.tree.map(jnp.asarray, world.responses), token_logprobs(world.sampler, world.responses), None
        )

        def of_batch(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
            batch = jax.tree.map(lambda leaf: leaf[rows], (sampled, world.scores))
            responses, sequences = iteration.scored(*batch), joined(batch[0].rollout)
            frozen, key = {"reference": world.reference}, jax.random.key(0)
            after, metrics, _ = iteration.learn(state, frozen, responses, sequences, key)
            moved = jax.tree.map(jnp.subtract, world.policy, after.params["policy"])
            return ravel_pytree(moved)[0] / RATE, metrics["val/ratio"]

        return jax.vmap(of_batch)(rows)

    return jax.jit(learn)


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """The norm of a difference, as a share of what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """The cosine of the angle between two gradients."""
    return float(found @ expected / np.linalg.norm(found) / np.linalg.norm(expected))
