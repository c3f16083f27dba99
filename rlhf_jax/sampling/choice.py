"""The choice of a token from its logits: which tokens may be chosen, and by one uniform number, which one is."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from, and what ends a response.

    The temperature comes first, then the filters in this order, as in transformers' `generate`: `top_k` keeps the k
    most likely tokens, `top_p` the fewest whose probabilities reach p (Holtzman et al. 2020, arXiv:1904.09751), `min_p`
    those with at least that share of the most likely one's probability (Nguyen et al. 2024, arXiv:2407.01082).
    Temperature 0 takes the most likely token.
    """

    max_new_tokens: int
    temperature: float
    stop_ids: tuple[int, ...]  # each ends a response, and is its last token
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
        """Whether some tokens may be ruled out."""
        return self.top_k is not None or self.top_p is not None or self.min_p is not None


def stated_temperature(temperature: float) -> float:
    """The temperature at which log-probabilities of samples are stated: that of sampling, and 1 for greedy samples.

    Greedy decoding (temperature 0) puts all its mass on one answer, so that its KL to another policy is infinite or 0.
    Log-probabilities and log-ratios of greedy answers are therefore those of softmax(logits).
    """
    return temperature if temperature > 0 else 1.0


def draw(
    logits: Float[Array, "B V"], uniforms: Float[Array, "B"], sampling: Sampling
) -> tuple[Int[Array, "B"], Float[Array, "B"], Float[Array, "B"]]:
    """A token a row, its log-probability where it was drawn from, and under softmax(logits), in nats.

    The most likely token, which temperature 0 takes, has log-probability 0 where it was drawn from.
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
    """Logits, minus infinity where a filter rules a token out. Of equally likely tokens at a border, all stay."""
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if sampling.top_p is not None:
        falling = -jnp.sort(-logits, axis=-1)
        before = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1)
        before = jnp.pad(before[:, :-1], ((0, 0), (1, 0)))  # what all more likely tokens have together
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
    """Uniform numbers in [0, 1): one key a sequence, `fold_in(key, row)`, folded with the position of each token.

    They depend on the key, the row's global number and the position alone, so the same row gets the same text however
    the batch is split or padded.
    """
    return jax.vmap(lambda row: jax.vmap(lambda t: uniform_at(key, row, t))(jnp.arange(length)))(rows)


def uniform_at(key: PRNGKeyArray, row: Int[Array, ""], position: Int[Array, ""]) -> Float[Array, ""]:
    """The uniform number of one row's token at one position."""
    return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row), position))


BLOCK = 64
"""Tokens whose probabilities are summed into one before the running sum is taken over blocks."""


def choose(logits: Float[Array, "B V"], uniforms: Float[Array, "B"], *, temperature: float) -> Int[Array, "B"]:
    """Samples from softmax(logits / temperature) by inverting its cumulative distribution at a uniform number.

    A Gumbel draw needs a random number for every token of the vocabulary; this needs one. The running sum is taken over
    blocks of tokens and then within the chosen block, which is quicker than one over the vocabulary, and more precise.
    A token of probability 0 is never chosen.
    """
    batch, vocab = logits.shape
    shifted = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    padded = jnp.pad(jnp.exp(shifted), ((0, 0), (0, -vocab % BLOCK)))
    blocks = padded.reshape(batch, -1, BLOCK)
    block, left = _invert(jnp.sum(blocks, axis=-1), uniforms)
    within, _ = _invert(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], left)
    return block * BLOCK + within


def _invert(masses: Float[Array, "B N"], uniforms: Float[Array, "B"]) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """The item in which a uniform number falls, by mass, and how far into that item, in [0, 1)."""
    cumulative = jnp.cumsum(masses, axis=-1)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    # Asked of every item, because a running sum need not stand still at an item of mass 0 where it is summed in a tree.
    positive = masses > 0
    places = jnp.arange(masses.shape[-1], dtype=jnp.int32)[None, :]
    last = jnp.max(jnp.where(positive, places, 0), axis=-1, keepdims=True)
    item = jnp.min(jnp.where(positive & (cumulative > threshold), places, last), axis=-1)
    mass, end = (jnp.take_along_axis(x, item[:, None], axis=1) for x in (masses, cumulative))
    return item, jnp.clip((threshold - (end - mass)) / mass, 0, 1)[:, 0]
