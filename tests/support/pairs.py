"""Preference losses of log-probabilities that a test gives directly."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from rlhf_jax.core import masking
from rlhf_jax.core.metrics import Metric
from rlhf_jax.methods.dpo import PairLogps, preference_loss
from rlhf_jax.methods.preference_table import PreferenceLossConfig


def loss_of(
    config: PreferenceLossConfig,
    logps: Sequence[jax.Array],
    tokens: tuple[jax.Array, ...],
    *,
    beta: float | jax.Array,
    axes: tuple[str, ...] = (),
    weights: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, Metric]]:
    """Loss and metrics, given the log-probabilities of chosen and rejected responses, policy first, and their lengths.

    They are those of a whole batch, without LD-DPO.
    """
    policy = PairLogps(*logps[:2], *logps[:2], weights=weights)
    reference = PairLogps(*logps[2:], *logps[2:]) if config.needs_reference else None
    mean = masking.mean(tokens[0].astype(jnp.float32), axes)
    lengths = tokens[0], tokens[1]
    return preference_loss(config, policy, reference, lengths, beta=beta, axes=axes, tokens_per_pair=mean)
