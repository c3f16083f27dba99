"""Log-probabilities and entropies of categorical distributions over the vocabulary, in nats."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.core import masking


def token_logprobs(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """`log softmax(logits)[token]` at each position, in float32."""
    shifted, exponentials = _exponentials(logits)
    chosen = jnp.take_along_axis(shifted, tokens[..., None], axis=-1)[..., 0]
    return chosen - jnp.log(jnp.sum(exponentials, axis=-1))


def entropy(logits: Float[Array, "B T V"]) -> Float[Array, "B T"]:
    r"""Entropy $-\sum_v p_v \log p_v$ of the softmax at each position, in nats and float32."""
    shifted, exponentials = _exponentials(logits)
    normaliser = jnp.sum(exponentials, axis=-1)
    return jnp.log(normaliser) - jnp.sum(exponentials * shifted, axis=-1) / normaliser


def _exponentials(logits: Array) -> tuple[Array, Array]:
    # Not logsumexp: written out, the compiler shares one pass over the vocabulary between the functions above and the
    # backward pass, which takes a third less time on CPUs.
    logits = logits.astype(jnp.float32)
    shifted = logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return shifted, jnp.exp(shifted)


def sequence_logprobs(logprobs: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
    """Log-probability of each response: the sum over its tokens, EOS included."""
    return jnp.sum(jnp.where(mask, logprobs, 0), axis=1)


def length_desensitised(
    logprobs: Float[Array, "B T"], mask: Bool[Array, "B T"], shared: Int[Array, "B"], *, alpha: float
) -> Float[Array, "B"]:
    r"""LD-DPO's log-probability of a response: the sum over its first tokens plus alpha times the sum over the rest.

    $\sum_{t \le l} \log\pi(y_t) + \alpha \sum_{t > l} \log\pi(y_t)$, where l is the length of the pair's shorter
    response (`shared`, in tokens): Liu et al. 2024 (arXiv:2409.06411). Alpha = 1 gives the plain log-probability; with
    alpha = 0 both responses count the same number of tokens.
    """
    within = jnp.cumsum(mask, axis=1, dtype=jnp.int32) <= shared[:, None]
    return jnp.sum(jnp.where(mask, jnp.where(within, logprobs, alpha * logprobs), 0), axis=1)


def on_policy_weights(
    logprobs: Float[Array, "B T"], log_sum_sq_probs: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    r"""WPO's weight of each response: $\exp \frac{1}{|y|} \sum_t (\log \pi(y_t) - \log \sum_v \pi(v)^2)$, no gradient.

    Eq. 2 of Zhou et al. 2024 (WPO, arXiv:2406.11827), aligned to sampled outputs: a response sampled from the policy
    weighs about 1. The loss of a pair is multiplied by the weights of both responses. The authors' code caps this
    product at 1; TRL does not, and nor do we.
    """
    aligned = jnp.sum(jnp.where(mask, logprobs - log_sum_sq_probs, 0), axis=1)
    tokens = jnp.maximum(masking.lengths(mask), 1).astype(aligned.dtype)
    return jax.lax.stop_gradient(jnp.exp(aligned / tokens))


def cross_entropy(
    logprobs: Float[Array, "B T"], loss_mask: Bool[Array, "B T"], axes: tuple[str, ...]
) -> Float[Array, ""]:
    """Cross-entropy: negative mean log-probability of the trained tokens of the whole batch, in nats per token."""
    return -masking.masked_mean(logprobs, loss_mask, axes)
