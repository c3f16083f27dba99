"""Samples of an iteration for `samples.jsonl`, the first ones with the values of their tokens."""

import jax.numpy as jnp

from rlhf_jax.core.kl import k1
from rlhf_jax.core.row_sharding import row_devices
from rlhf_jax.methods.policy_metrics import reference_divergence, shaped_rewards
from rlhf_jax.methods.policy_parts import Coefficient, Evaluated, Experience, Numbers, Responses, Samples


def samples_of(responses: Responses, evaluated: Evaluated, rows: object, kl_coef: Coefficient, tokens: int) -> Samples:
    """Collect the samples.

    Args: rows is the batch that the epochs train on; tokens is the number of samples whose tokens are recorded.
    """
    values = token_values(evaluated, rows, kl_coef) if tokens else {}
    rollout, devices = responses.sampled.rollout, row_devices()
    count = -(-tokens // devices) * devices  # the devices have equal numbers of rows
    mask, width = evaluated.sequences.response_mask[:count], rollout.response.shape[1]
    recorded = {
        name: jnp.pad(jnp.where(mask, value[:count], 0), ((0, 0), (0, width - mask.shape[1])))
        for name, value in values.items()
    }
    return Samples(rollout, responses.scores, reference_divergence(evaluated), recorded)


def token_values(evaluated: Evaluated, rows: object, kl_coef: Coefficient) -> Numbers:
    r"""Return what the iteration computed for each response token, [B, T] each.

    `kl` is $\log \pi - \log \pi_{ref}$, whose sum over a response is the logged divergence. PPO and the group methods
    have `reward`, which includes the KL penalty unless that is in the loss, and `advantage`, as in the loss. `value`
    needs a value function, and `kl` that the divergence is measured.
    """
    values = {}
    if evaluated.ref_logprobs is not None:
        values["kl"] = k1(evaluated.old.logprobs, evaluated.ref_logprobs)
    if isinstance(rows, Experience):
        values["reward"] = shaped_rewards(evaluated, kl_coef if rows.ref_logprobs is None else 0.0)
        values["advantage"] = rows.advantages
    if evaluated.old.values is not None:
        values["value"] = evaluated.old.values
    return values
