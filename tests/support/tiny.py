"""Tiny networks, batches and configs for tests of whole steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.config import ModelSource
from rlhf_jax.core.metrics import values
from rlhf_jax.core.sequences import joined
from rlhf_jax.data.ragged import RaggedPairs, RaggedSequences
from rlhf_jax.methods.policy_gradient import Iteration
from rlhf_jax.methods.policy_parts import Experience, Networks, OnlineBatch
from rlhf_jax.models.head import TokenStats
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.loop import LoopConfig
from rlhf_jax.runtime.optimizers import OptimizerConfig, make_optimizer
from rlhf_jax.runtime.programs import RuntimeConfig
from rlhf_jax.stages import group_rl, ppo
from rlhf_jax.types import PreferenceBatch, PromptBatch, Rollout, Sequences, TokenBatch
from tests.support import networks

VOCAB, EOS, SUPPRESSED = 16, 2, (0, 1, 3)
PROMPT, RESPONSE = 4, 6

MODEL = networks.config(n_layers=1, d_ff=32)
OPTIMIZER = OptimizerConfig(
    learning_rate=3e-4, schedule="constant", warmup_steps=0, weight_decay=0.0, epsilon=1e-5, max_grad_norm=1.0
)
LOOP = LoopConfig(steps_per_call=1, checkpoint_every=100)
POLICY = PolicyNetwork(MODEL, VOCAB, SUPPRESSED)
REWARD = ScalarNetwork(MODEL, VOCAB, "mean")
ONE_DEVICE = RuntimeConfig(
    strategy="jit", data=1, fsdp=1, tensor=1, inference_batch=16, deterministic=False, compile_quickly=False
)


class GivenPolicy(PolicyNetwork):
    """A policy whose parameters are the log-probabilities of the response tokens: a loss's gradient is by these."""

    def response_hidden(self, params, sequences, *, dropout_keys=None):
        """The parameters."""
        del sequences, dropout_keys
        return params

    def stats_of_responses(self, params, hidden, sequences, *, temperature, stats_fn=None):
        """The parameters, with 0 for what is not a log-probability."""
        del params, sequences, temperature, stats_fn
        return TokenStats(hidden, jnp.zeros_like(hidden), jnp.zeros(hidden.shape, bool), jnp.zeros_like(hidden))


def build_method(config) -> Any:
    """The method that a config resolves to."""
    return (ppo if isinstance(config, ppo.PPOConfig) else group_rl).build_method(config)


def given_loss(config, logprobs, batch: dict):
    """Loss and metrics of one minibatch as training computes them, for log-probabilities [B, T] as they are given.

    Args: batch has some fields of Experience; loss_mask is the response mask.
    """
    mask, method = batch["loss_mask"], build_method(config)
    rollout = Rollout(*(jnp.zeros(mask.shape, jnp.int32), mask) * 2)
    networks = Networks(GivenPolicy(MODEL, VOCAB, SUPPRESSED), None, (EOS,), mask.shape[1])
    rows: dict[str, Any] = dict.fromkeys(Experience._fields) | batch | {"sequences": joined(rollout)}
    experience = Experience(**rows)
    at = Iteration(networks, config, (), (), method)
    loss, metrics = method.learner.loss(
        at, {"policy": logprobs}, experience, None, whole=experience, kl_coef=method.kl_coef
    )
    return loss, values(metrics)


PPO = ppo.PPOConfig(
    kind="ppo",
    policy=ModelSource("sft"),
    reward_model=ModelSource("reward_model"),
    iterations=20,
    batch_size=16,
    minibatches=2,
    epochs=2,
    temperature=1.0,
    kl_coef=0.1,
    missing_eos_penalty=0.5,
    gamma=1.0,
    gae_lambda=0.95,
    clip_ratio=0.2,
    value_clip=0.2,
    vf_coef=0.1,
    optimizer=OPTIMIZER,
    samples_every=1,
    samples_written=4,
    loop=LOOP,
)
GROUP_RL = {
    "kind": "group_rl",
    "policy": ModelSource("sft"),
    "reward_model": ModelSource("reward_model"),
    "iterations": 30,
    "batch_size": 16,
    "minibatches": 1,
    "epochs": 1,
    "temperature": 1.0,
    "num_generations": 4,
    "optimizer": dataclasses.replace(OPTIMIZER, learning_rate=1e-2),
    "samples_every": 1,
    "samples_written": 4,
    "loop": LOOP,
}
NETWORKS = Networks(POLICY, REWARD, (EOS,), RESPONSE)
CRITIC_FREE = dataclasses.replace(NETWORKS, value=None)


def iteration(config=PPO, axes=(), loop_axes=(), networks=None, method=None) -> Iteration:
    """An iteration of the tiny networks: of PPO or a group method, with networks or a method of another kind."""
    default = NETWORKS if isinstance(config, ppo.PPOConfig) else CRITIC_FREE
    return Iteration(networks or default, config, axes, loop_axes, method or build_method(config))


def ppo_step(config=PPO, axes=(), loop_axes=(), networks=None):
    """A whole iteration, scored by the tiny reward model."""
    return iteration(config, axes, loop_axes, networks).step(REWARD)


def sharper(params):
    """Parameters whose distribution is far from uniform, so that texts end early and differ in length."""
    return {**params, "embedding": 8 * params["embedding"]}


def policy_params(seed: int = 0):
    return sharper(POLICY.init(jax.random.key(seed)))


def reward_params(seed: int = 1):
    return REWARD.init(jax.random.key(seed))


def ppo_state(config: ppo.PPOConfig = PPO) -> TrainState:
    params = {"policy": policy_params(), "value": REWARD.init_value(reward_params())}
    return iteration(config).init_state(params)


def ppo_frozen():
    return {"reference": policy_params(2), "reward": reward_params()}


def dpo_state() -> TrainState:
    params = {"policy": policy_params()}
    return TrainState(jnp.int32(0), params, make_optimizer(OPTIMIZER, 3).init(params))


def prefix_mask(rng: np.random.Generator, rows: int, width: int, least: int = 1) -> np.ndarray:
    return np.arange(width)[None] < rng.integers(least, width + 1, rows)[:, None]


def prompts(rows: int, seed: int = 0) -> PromptBatch[np.ndarray]:
    """Left-padded prompts of uneven lengths; the padding is full of other tokens."""
    rng = np.random.default_rng(seed)
    return PromptBatch(
        rng.integers(4, VOCAB, (rows, PROMPT)).astype(np.int32),
        prefix_mask(rng, rows, PROMPT)[:, ::-1],
        np.arange(rows, dtype=np.int32),
    )


def online(rows: int, seed: int = 0) -> OnlineBatch[np.ndarray]:
    """Inputs of an online iteration."""
    return OnlineBatch(prompts(rows, seed))


def preferences(rows: int, seed: int = 0) -> PreferenceBatch[np.ndarray]:
    """Pairs with uneven masks on both sides; the padding is full of other tokens."""
    rng = np.random.default_rng(seed)
    before = prompts(rows, seed)
    tokens = [rng.integers(4, VOCAB, (rows, RESPONSE)).astype(np.int32) for _ in range(2)]
    masks = [prefix_mask(rng, rows, RESPONSE) for _ in range(2)]
    sides = (Rollout(before.tokens, before.mask, *side) for side in zip(tokens, masks, strict=True))
    return PreferenceBatch(*(jax.tree.map(np.asarray, joined(side)) for side in sides))


def ragged(sequences: Sequences[np.ndarray]) -> RaggedSequences:
    """The rows of a batch of `preferences`, without padding."""
    before = sequences.start[0]
    prompt, mask = sequences.tokens[:, :before], sequences.mask[:, :before]
    return RaggedSequences.of_rollout(Rollout(prompt, mask, sequences.response, sequences.response_mask))


def ragged_pairs(rows: int, seed: int = 0) -> RaggedPairs:
    """The pairs of `preferences`, without padding."""
    return RaggedPairs(*map(ragged, preferences(rows, seed)))


def with_last_token(sequences: Sequences[np.ndarray], rows: np.ndarray) -> Sequences[np.ndarray]:
    """Responses without token 5, but at the end of the rows that are marked."""
    response = np.where(sequences.response == 5, 6, sequences.response)
    last = sequences.response_mask.sum(axis=1) - 1
    response[rows, last[rows]] = 5
    before = sequences.tokens[:, : sequences.start[0]]
    return sequences._replace(tokens=np.concatenate([before, response], axis=1), response=response)


def several(batches: list):
    """Batches stacked as a program takes them."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def with_config(**changes) -> ppo.PPOConfig:
    return dataclasses.replace(PPO, **changes)


def group_config(method, **changes) -> group_rl.GroupRLConfig:
    """A group method's config; kl_coef = 0.01 where the method leaves it open."""
    fields: dict[str, Any] = {**GROUP_RL, "method": method, **changes}
    if "kl_coef" not in group_rl.METHODS[method]:
        fields.setdefault("kl_coef", 0.01)
    return group_rl.GroupRLConfig(**fields)


def with_micro_batch(rows, **changes) -> OptimizerConfig:
    return dataclasses.replace(OPTIMIZER, micro_batch=rows, **changes)


def demonstrations(rows: int = 16) -> TokenBatch[np.ndarray]:
    """Lengths from 2 tokens to all: the micro-batches' means are far from equally weighted."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, VOCAB, (rows, 10)).astype(np.int32)
    mask = prefix_mask(rng, rows, 10, least=2)
    return TokenBatch(tokens, mask, mask & (np.arange(10)[None] > 0))
