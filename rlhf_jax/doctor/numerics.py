"""Numeric paths on a device, held against float64 on the CPU."""

import contextlib
import functools
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rlhf_jax import config as configs
from rlhf_jax.core import masking
from rlhf_jax.core.advantages import gae
from rlhf_jax.core.policy_losses import POLICY_LOSSES
from rlhf_jax.doctor import float64_network
from rlhf_jax.methods import preference_table
from rlhf_jax.methods.dpo import PairLogps, preference_loss
from rlhf_jax.methods.preference_table import PreferenceLossConfig
from rlhf_jax.models.attention import attend
from rlhf_jax.models.model_config import AttentionBy, DType
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import PromptBatch, Sequences

PRODUCTS = {"cpu": 2e-5, "gpu": 3e-3, "tpu": 3e-2}
"""Largest errors of float32 products, relative to the largest result: GPUs compute them in TF32, TPUs in bfloat16."""
ELEMENTWISE = {"cpu": 2e-5, "gpu": 2e-5, "tpu": 2e-4}
"""Largest relative errors of float32 without products: exponentials and logarithms of TPUs are approximate."""
BFLOAT16 = 3e-2
"""Largest relative error of products in bfloat16, which has 8 bits."""

POLICY_OPTIONS = {
    "clip_ratio": 0.2,
    "clip_ratio_high": 0.28,
    "dual_clip": 3.0,
    "sapo_temperature_pos": 1.0,
    "sapo_temperature_neg": 1.05,
}


class NumericCheck(NamedTuple):
    """Largest error of a numeric path."""

    name: str
    error: float
    limit: float
    worst: str = ""  # case with the largest error, if there are several

    @property
    def passed(self) -> bool:
        """True if the error is within the limit; False for NaN."""
        return self.error <= self.limit


def checks(device: jax.Device) -> Iterator[NumericCheck]:
    """Check every path on a device."""
    with jax.default_device(device):
        yield _largest("preference losses", _preference_losses(), ELEMENTWISE[device.platform])
        yield _largest("policy losses", _policy_losses(), ELEMENTWISE[device.platform])
        yield _largest("advantages (GAE, whitened)", {"gae": _error(_advantages, *_token_arrays(4))}, 1e-4)
        for by in _attention_of(device.platform):
            for dtype in ("bfloat16",) if by != "xla" else ("float32", "bfloat16"):
                limit = BFLOAT16 if dtype == "bfloat16" else PRODUCTS[device.platform]
                yield NumericCheck(f"attention by {by}, {dtype}", _attention_error(by, dtype), limit)
        for dtype in ("float32", "bfloat16"):
            limit = 0.1 if dtype == "bfloat16" else 3 * PRODUCTS[device.platform]
            yield NumericCheck(f"log-probabilities of a network, {dtype} (nats)", network_error(dtype), limit)
        for dtype in ("float32", "bfloat16"):
            limit = 0.1 if dtype == "bfloat16" else 3 * PRODUCTS[device.platform]
            yield NumericCheck(f"generation against a full forward pass, {dtype} (nats)", sampler_error(dtype), limit)


def _largest(name: str, errors: dict[str, float], limit: float) -> NumericCheck:
    worst = max(errors, key=lambda case: errors[case] if np.isfinite(errors[case]) else np.inf)
    return NumericCheck(f"{name}: {len(errors)} with gradients", errors[worst], limit, worst)


# ---- losses ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Compute in float64 on the CPU."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield


def _error(function: Callable[..., jax.Array], *arrays: np.ndarray) -> float:
    """Largest error of a scalar function and its gradients in float32, relative to the largest value of each."""
    by_all = jax.value_and_grad(lambda arrays: function(*arrays))
    own = jax.device_get(jax.jit(by_all)([jnp.asarray(array, jnp.float32) for array in arrays]))
    with in_float64():
        exact = jax.device_get(jax.jit(by_all)([jnp.asarray(array, jnp.float64) for array in arrays]))
    return largest_error(own, exact)


def largest_error(own: PyTree, exact: PyTree) -> float:
    """Largest error of arrays, each relative to its largest value, or to 1 if that is smaller."""
    errors = jax.tree.map(
        lambda a, b: np.max(np.abs(np.asarray(a, np.float64) - b)) / max(1.0, np.max(np.abs(b))), own, exact
    )
    return float(np.max(jax.tree.leaves(errors)))


def _preference_losses() -> dict[str, float]:
    rng, rows = np.random.default_rng(0), 64
    logps = [-rng.uniform(20, 60, rows) for _ in range(4)]
    lengths = rng.integers(8, 40, (2, rows))
    found = {}
    for name, spec in preference_table.LOSSES.items():
        options = {option: float(usual) for option, usual in spec.nonzero.items()}
        config = configs.build(PreferenceLossConfig, {"losses": (name,), **options}, "loss")

        def loss(*each: jax.Array, config: PreferenceLossConfig = config) -> jax.Array:
            policy, reference = PairLogps(*each[:2], *each[:2]), PairLogps(*each[2:], *each[2:])
            chosen, rejected = jnp.asarray(lengths[0], jnp.int32), jnp.asarray(lengths[1], jnp.int32)
            tokens = jnp.mean(chosen.astype(each[0].dtype))
            return preference_loss(
                config, policy, reference, (chosen, rejected), beta=0.1, axes=(), tokens_per_pair=tokens
            )[0]

        found[name] = _error(loss, *logps)
    return found


def _token_arrays(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.normal(size=(16, 32)) for _ in range(count)]


def _policy_losses() -> dict[str, float]:
    noise, advantages = _token_arrays(2)
    old = -np.exp(_token_arrays(3)[2])
    mask = np.arange(32) < np.random.default_rng(2).integers(1, 33, 16)[:, None]
    found = {}
    for name, spec in POLICY_LOSSES.items():
        options = {option: POLICY_OPTIONS[option] for option in spec.options}

        def loss(
            logprobs: jax.Array, old: jax.Array, advantages: jax.Array, spec: Any = spec, options: Any = options
        ) -> jax.Array:
            losses = spec.function(logprobs, old, advantages, jnp.asarray(mask), **options).losses
            return jnp.sum(jnp.where(mask, losses, 0)) / mask.sum()

        found[name] = _error(loss, old + 0.1 * noise, old, advantages)
    return found


def _advantages(rewards: jax.Array, values: jax.Array, weights: jax.Array, more: jax.Array) -> jax.Array:
    mask = jnp.ones(rewards.shape, bool)
    advantages, returns = gae(rewards, values, mask, gamma=0.99, gae_lambda=0.95)
    return jnp.mean(weights * masking.whiten(advantages, mask, ()) + more * returns)


# ---- networks --------------------------------------------------------------------------------------------------------


def _attention_of(platform: str) -> list[AttentionBy]:
    needs = {"cudnn": "gpu", "splash": "tpu"}
    return [by for by in typing.get_args(AttentionBy) if needs.get(by, platform) == platform]


def _attention_error(by: AttentionBy, dtype: DType) -> float:
    """Largest error of attention and its gradients, by causal queries with padding and groups of heads."""
    rng, rows, length, width = np.random.default_rng(3), 2, 128, 64
    shapes = ((rows, length, 4, width), (rows, 2, length, width), (rows, 2, length, width), (rows, length, 4, width))
    arrays = [np.asarray(jnp.asarray(rng.normal(size=shape), dtype), np.float64) for shape in shapes]
    positions = np.arange(length)
    present = positions < np.array([length, length - 37])[:, None]
    mask = (positions[:, None] >= positions) & present[:, None]
    segments = jnp.where(present, 0, -1)
    arrays[3] *= present[:, :, None, None]  # outputs at padding are arbitrary

    def mixed(q: jax.Array, k: jax.Array, v: jax.Array, weights: jax.Array, by: AttentionBy = by) -> jax.Array:
        out = attend(q, k, v, jnp.asarray(mask), scale=width**-0.5, softcap=None, by=by, segments=segments)
        return jnp.sum(out.astype(weights.dtype) * weights)

    def both(arrays: list[jax.Array], by: AttentionBy = by) -> tuple:
        return jax.grad(functools.partial(mixed, by=by), argnums=(0, 1, 2))(*arrays)

    own = jax.device_get(jax.jit(both)([jnp.asarray(array, dtype) for array in arrays]))
    with in_float64():
        exact = jax.device_get(jax.jit(functools.partial(both, by="xla"))([jnp.asarray(array) for array in arrays]))
    return largest_error(own, exact)


def network_error(dtype: DType) -> float:
    """Largest error of a network's log-probabilities, against a forward pass in NumPy."""
    network, params = _network(dtype)
    tokens = np.random.default_rng(4).integers(0, network.vocab_size, (4, 48)).astype(np.int32)
    sequences = _sequences(tokens, prompt=1)
    stats = jax.jit(functools.partial(network.response_stats, temperature=1.0))(params, sequences)
    exact = float64_network.logprobs(network.config, jax.device_get(params), tokens)
    return float(np.max(np.abs(np.asarray(stats.logprobs, np.float64) - exact)))


def sampler_error(dtype: DType) -> float:
    """Largest difference between the sampler's log-probabilities and those of a full forward pass."""
    network, params = _network(dtype)
    prompts, most = np.random.default_rng(5).integers(1, network.vocab_size, (8, 16)).astype(np.int32), 32
    batch = PromptBatch(jnp.asarray(prompts), jnp.ones(prompts.shape, bool), jnp.arange(len(prompts), dtype=jnp.int32))
    sampling = Sampling(most, 1.0, (0,))
    found = jax.jit(lambda params, batch, key: generate(network, params, batch, key, sampling))(
        params, batch, jax.random.key(6)
    )
    response, mask = found.rollout.response, found.rollout.response_mask
    sequences = _sequences(np.concatenate([prompts, np.asarray(response)], axis=1), prompt=prompts.shape[1])
    stats = jax.jit(functools.partial(network.response_stats, temperature=1.0))(params, sequences)
    return float(np.max(np.abs(np.where(mask, stats.logprobs - found.logprobs, 0))))


def _network(dtype: DType) -> tuple[PolicyNetwork, PyTree]:
    """Network with parameters drawn so that its distributions are far from uniform."""
    network = PolicyNetwork(float64_network.config(dtype), 512, ())
    rng = np.random.default_rng(7)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0)))
    return network, jax.tree.map(
        lambda x: jnp.asarray(
            1 + 0.1 * rng.normal(size=x.shape) if x.ndim == 1 else 0.1 * rng.normal(size=x.shape), x.dtype
        ),
        shapes,
    )


def _sequences(tokens: np.ndarray, *, prompt: int) -> Sequences:
    rows, mask = len(tokens), np.ones(tokens.shape, bool)
    start, response, trained = np.full(rows, prompt, np.int32), tokens[:, prompt:], mask[:, prompt:]
    return jax.tree.map(jnp.asarray, Sequences(tokens, mask, start, response, trained))
