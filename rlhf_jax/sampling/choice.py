"""Drawing tokens from logits: temperature, filters, and inversion of the CDF at one uniform number per token."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling distribution and stopping criteria.

    The temperature is applied first, then the filters in this order, as in transformers' `generate`: `top_k` keeps the
    k most likely tokens; `top_p` keeps the smallest set of most likely tokens whose probability reaches p (Holtzman et
    al. 2020, arXiv:1904.09751); `min_p` keeps tokens with at least min_p times the probability of the most likely one
    (Nguyen et al. 2024, arXiv:2407.01082). Temperature 0 is greedy decoding.
    """

    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]  # a response ends with, and includes, the first of these
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature = {self.temperature} must be at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k} must be at least 1")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} = {value} must be above 0 and at most 1")

    @property
    def filtered(self) -> bool:
        """True if a filter may exclude tokens."""
        return self.top_k is not None or self.top_p is not None or self.min_p is not None


def stated_temperature(temperature: float) -> float:
    """Return the temperature for reporting log-probabilities of samples: the sampling temperature, or 1 if it is 0.

    Greedy decoding puts all mass on one response, so that its KL to another policy would be infinite or 0.
    """
    return temperature if temperature > 0 else 1.0


def draw(
    logits: Float[Array, "B V"], uniforms: Float[Array, "B"], sampling: Sampling
) -> tuple[Int[Array, "B"], Float[Array, "B"], Float[Array, "B"]]:
    """Draw one token per row.

    Returns: the token, its log-probability under the sampling distribution (0 for greedy decoding), and its
    log-probability under softmax(logits), in nats.
    """
    if sampling.temperature == 0:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, jnp.zeros(token.shape, jnp.float32), _logprob(logits, token)
    if not sampling.filtered:
        token = choose(logits, uniforms, temperature=sampling.temperature)
        model = _logprob(logits, token)
        return token, model if sampling.temperature == 1 else _logprob(logits / sampling.temperature, token), model
    kept = keep_likely(logits / sampling.temperature, sampling)
    token = choose(kept, uniforms, temperature=1.0)
    return token, _logprob(kept, token), _logprob(logits, token)


def keep_likely(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Apply the filters by setting logits of excluded tokens to minus infinity. Tokens tied at a threshold are kept."""
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if sampling.top_p is not None:
        falling = -jnp.sort(-logits, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1)
        before = jnp.pad(before[:, :-1], ((0, 0), (1, 0)))  # total probability of all more likely tokens
        least = jnp.min(jnp.where(before < sampling.top_p, falling, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if sampling.min_p is not None:
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p))
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def _logprob(logits: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B"]:
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(shifted, token[:, None], axis=-1)[:, 0]
    return chosen - jnp.log(jnp.sum(jnp.exp(shifted), axis=-1))


def row_uniforms(key: PRNGKeyArray, rows: Int[Array, "B"], length: int) -> Float[Array, "B T"]:
    """Uniform numbers in [0, 1) from keys `fold_in(fold_in(key, row), position)`.

    They depend only on the key, the row's global index and the token's position, so that a row's text does not depend
    on how the batch is split or padded.
    """
    return jax.vmap(lambda row: jax.vmap(lambda t: uniform_at(key, row, t))(jnp.arange(length)))(rows)


def uniform_at(key: PRNGKeyArray, row: Int[Array, ""], position: Int[Array, ""]) -> Float[Array, ""]:
    """Uniform number for one row and position."""
    return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row), position))


BLOCK = 64
"""Tokens per block in `choose`."""


def choose(logits: Float[Array, "B V"], uniforms: Float[Array, "B"], *, temperature: float) -> Int[Array, "B"]:
    """Sample from softmax(logits / temperature) by inverting the CDF at a uniform number.

    This needs one random number per row, whereas the Gumbel trick needs one per vocabulary entry. The cumulative sum is
    taken over blocks of tokens and then within the chosen block, which is faster and more precise than over the whole
    vocabulary. Tokens of probability 0 are never chosen.
    """
    batch, vocab = logits.shape
    shifted = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    padded = jnp.pad(jnp.exp(shifted), ((0, 0), (0, -vocab % BLOCK)))
    blocks = padded.reshape(batch, -1, BLOCK)
    block, left = _invert(jnp.sum(blocks, axis=-1), uniforms)
    within, _ = _invert(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], left)
    return block * BLOCK + within


def _invert(masses: Float[Array, "B N"], uniforms: Float[Array, "B"]) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Find the item in which a uniform number falls, by mass, and the relative position within it, in [0, 1)."""
    cumulative = jnp.cumsum(masses, axis=-1)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    # Items of mass 0 are excluded explicitly: a tree-shaped cumulative sum can increase at them by rounding.
    positive = masses > 0
    indices = jnp.arange(masses.shape[-1], dtype=jnp.int32)[None, :]
    last = jnp.max(jnp.where(positive, indices, 0), axis=-1, keepdims=True)
    item = jnp.min(jnp.where(positive & (cumulative > threshold), indices, last), axis=-1)
    mass, end = (jnp.take_along_axis(x, item[:, None], axis=1) for x in (masses, cumulative))
    return item, jnp.clip((threshold - (end - mass)) / mass, 0, 1)[:, 0]
