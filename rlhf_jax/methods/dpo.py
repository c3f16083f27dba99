"""DPO (Rafailov et al. 2023, arXiv:2305.18290) and related methods: one step on a batch of pairs.

In order: log-probabilities of both responses under the policy and the reference, the loss, its metrics, and the update.
The losses are in `preference_table`. `reference_cache` stores the reference's log-probabilities; `stages.online_dpo`
trains on pairs sampled from the policy.
"""

import dataclasses
import functools
from typing import Annotated, Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from rlhf_jax.config import Count, Range, check_ranges
from rlhf_jax.core import logprobs, masking
from rlhf_jax.core.metrics import Metric, mean, values
from rlhf_jax.core.preference_losses import Beta, per_token
from rlhf_jax.core.sequences import mask_read
from rlhf_jax.data.batching import Fit
from rlhf_jax.data.ragged import RaggedPairs, pair_table
from rlhf_jax.loading.trainable import full_params
from rlhf_jax.methods.offline import Updates
from rlhf_jax.methods.per_run import IN_UPDATES, beta_of_run, of_run
from rlhf_jax.methods.preference_table import DIVERGENCES, LOSS_OPTIONS, LossSpec, PreferenceLossConfig
from rlhf_jax.models.head import TokenStats
from rlhf_jax.models.policy import PolicyNetwork, both_responses
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.programs import Step
from rlhf_jax.sampling.batches import map_table
from rlhf_jax.sampling.buckets import bucketed
from rlhf_jax.sampling.compiled import compiled
from rlhf_jax.types import A, PreferenceBatch

SIGMOID = PreferenceLossConfig()
Metrics = dict[str, Metric]
Lengths = tuple[Int[Array, "B"], Int[Array, "B"]]


# ---- log-probabilities of pairs -------------------------------------------------------------------------------------


class PairLogps(NamedTuple, Generic[A]):
    """Log-probabilities of B pairs of responses under one model, in nats, summed over tokens, EOS included."""

    chosen: Float[A, "B"]
    rejected: Float[A, "B"]
    full_chosen: Float[A, "B"]  # the plain sum, without LD-DPO's weights
    full_rejected: Float[A, "B"]
    weights: Float[A, "B"] | None = None  # WPO's weight of each pair


def pair_logps(
    config: PreferenceLossConfig,
    network: PolicyNetwork,
    params: PyTree,
    batch: PreferenceBatch,
    dropout_keys: Key[Array, "B"] | None = None,
) -> PairLogps:
    """Compute a model's log-probabilities of both responses of each pair, in one forward pass."""
    chosen, rejected = network.pair_stats(params, batch, dropout_keys=dropout_keys)
    return sum_tokens(config, chosen, rejected, batch.chosen.response_mask, batch.rejected.response_mask)


def sum_tokens(
    config: PreferenceLossConfig,
    chosen: TokenStats,
    rejected: TokenStats,
    chosen_mask: Bool[Array, "B T"],
    rejected_mask: Bool[Array, "B T"],
) -> PairLogps:
    """Sum the tokens' log-probabilities, with the LD-DPO and WPO weights that the config enables."""
    sides = ((chosen, chosen_mask), (rejected, rejected_mask))
    full = counted = [logprobs.sequence_logprobs(stats.logprobs, mask) for stats, mask in sides]
    if config.ld_alpha is not None:
        shared, alpha = jnp.minimum(masking.lengths(chosen_mask), masking.lengths(rejected_mask)), config.ld_alpha
        counted = [logprobs.length_desensitised(stats.logprobs, mask, shared, alpha=alpha) for stats, mask in sides]
    weights = None
    if config.use_weighting:
        each = [logprobs.on_policy_weights(stats.logprobs, stats.log_sum_sq_probs, mask) for stats, mask in sides]
        weights = each[0] * each[1]
    return PairLogps(counted[0], counted[1], full[0], full[1], weights)


def pair_logps_all(
    config: PreferenceLossConfig,
    network: PolicyNetwork,
    params: PyTree,
    pairs: RaggedPairs,
    batch_size: int,
    fit: Fit = bucketed,
) -> PairLogps[np.ndarray]:
    """Compute `pair_logps` of a whole data set, in batches of similar length; returns NumPy arrays."""
    return map_table(lambda batch: _compiled_logps(config, network, params, batch), pair_table(pairs), batch_size, fit)


@compiled(0, 1)
def _compiled_logps(
    config: PreferenceLossConfig, network: PolicyNetwork, params: PyTree, batch: PreferenceBatch
) -> PairLogps:
    return pair_logps(config, network, params, batch)


# ---- the reference --------------------------------------------------------------------------------------------------


class ReferencedBatch(NamedTuple, Generic[A]):
    """Pairs, and their log-probabilities under the reference if they are precomputed."""

    pairs: PreferenceBatch[A]
    reference: PairLogps[A] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceUpdate:
    """TR-DPO: move the reference towards the policy every few steps."""

    # Weight of the policy in the new reference; 1: the reference becomes the policy.
    alpha: Annotated[float, Range(above=0, at_most=1)]
    every: Count  # steps between updates

    def __post_init__(self) -> None:
        check_ranges(self)


def sync_reference(config: ReferenceUpdate, reference: PyTree, policy: PyTree, step: Int[Array, ""]) -> PyTree:
    r"""Update the reference's parameters to $\alpha \pi + (1 - \alpha) \pi_{ref}$ if an update is due after `step`.

    Gorbatovski et al. 2024 (TR-DPO, arXiv:2404.09656): the soft update; alpha = 1 is the hard one. Only trained
    parameters are updated. For adapters, A and B are averaged separately. After a soft update, the product of the
    averages is not the average of the products, which may need a higher rank; after a hard update, both models are
    equal.
    """
    due = step % config.every == 0

    def mixed(ref: Array, own: Array) -> Array:
        mean = config.alpha * own.astype(jnp.float32) + (1 - config.alpha) * ref.astype(jnp.float32)
        return jnp.where(due, mean.astype(ref.dtype), ref)

    return jax.tree.map(mixed, reference, policy)


# ---- loss and metrics -----------------------------------------------------------------------------------------------


def lengths_of(pairs: PreferenceBatch) -> Lengths:
    """Numbers of tokens of the chosen and the rejected responses."""
    return masking.lengths(pairs.chosen.response_mask), masking.lengths(pairs.rejected.response_mask)


def tokens_per_pair(pairs: PreferenceBatch, axes: tuple[str, ...]) -> Float[Array, ""]:
    """Mean number of chosen tokens over the pairs of a batch."""
    return masking.mean(lengths_of(pairs)[0].astype(jnp.float32), axes)


def preference_loss(
    config: PreferenceLossConfig,
    policy: PairLogps,
    reference: PairLogps | None,
    tokens: Lengths,
    *,
    beta: Beta,
    axes: tuple[str, ...],
    tokens_per_pair: Float[Array, ""],
) -> tuple[Float[Array, ""], Metrics]:
    """Weighted sum of the configured losses, each averaged over the pairs of the batch.

    Args: reference is None if no configured loss reads it; tokens are the lengths of chosen and rejected responses;
    tokens_per_pair is computed on the whole batch, so that likelihood terms of micro-batches add up to a mean over
    tokens.
    Returns: the loss, and the metrics of `reward_metrics`; with several losses, also each one as `loss/NAME`.
    """
    inputs = loss_inputs(config, policy, reference, tokens, beta, tokens_per_pair, axes)
    losses: Metrics = {}
    for name, spec in zip(config.losses, config.specs, strict=True):
        each = spec.function(**{argument: inputs[argument] for argument in spec.reads})
        losses[name] = mean(each if policy.weights is None else policy.weights * each, axes)
    weighted = (weight * loss.value for weight, loss in zip(config.weights, losses.values(), strict=True))
    metrics = reward_metrics(config.specs, policy, reference, tokens, beta, axes)
    if len(losses) > 1:
        metrics |= {f"loss/{name}": loss for name, loss in losses.items()}
    return sum(weighted, start=jnp.float32(0)), metrics


def pair_loss(
    config: PreferenceLossConfig,
    network: PolicyNetwork,
    params: PyTree,
    batch: ReferencedBatch,
    dropout_keys: Key[Array, "B"] | None,
    *,
    beta: Beta,
    axes: tuple[str, ...],
    tokens_per_pair: Float[Array, ""],
) -> tuple[Float[Array, ""], Metrics]:
    """Compute `preference_loss` of pairs from the policy's parameters and the reference's log-probabilities."""
    policy = pair_logps(config, network, params, batch.pairs, dropout_keys)
    tokens = lengths_of(batch.pairs)
    return preference_loss(
        config, policy, batch.reference, tokens, beta=beta, axes=axes, tokens_per_pair=tokens_per_pair
    )


def loss_inputs(
    config: PreferenceLossConfig,
    policy: PairLogps,
    reference: PairLogps | None,
    tokens: Lengths,
    beta: Beta,
    tokens_per_pair: Float[Array, ""],
    axes: tuple[str, ...],
) -> dict[str, object]:
    """All inputs and options that a loss may read, by their names in `preference_table.INPUTS` and in the config."""
    inputs: dict[str, object] = {name: getattr(config, name) for name in LOSS_OPTIONS} | {
        "chosen_logps": policy.chosen,
        "rejected_logps": policy.rejected,
        "full_chosen_logps": policy.full_chosen,
        "full_rejected_logps": policy.full_rejected,
        "chosen_tokens": tokens[0],
        "rejected_tokens": tokens[1],
        "tokens_per_pair": jnp.maximum(tokens_per_pair, 1),
        "beta": beta,
        "axes": axes,
    }
    if reference is not None:
        transform = DIVERGENCES[config.divergence]
        inputs |= {
            "ref_chosen_logps": reference.chosen,
            "ref_rejected_logps": reference.rejected,
            "chosen_logratios": transform(policy.chosen - reference.chosen, config),
            "rejected_logratios": transform(policy.rejected - reference.rejected, config),
        }
    return inputs


def reward_metrics(
    specs: tuple[LossSpec, ...],
    policy: PairLogps,
    reference: PairLogps | None,
    tokens: Lengths,
    beta: Beta,
    axes: tuple[str, ...],
) -> Metrics:
    """Mean implicit rewards as `rewards/{chosen,rejected,margins,accuracies}`, and `logps/{chosen,rejected}`.

    The implicit reward of a response is beta log(pi / pi_ref). Without a reference it is beta log pi, divided by the
    length if the first loss is `per_token`. A tie counts half in the accuracy.
    """
    if reference is not None:
        logratios = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    elif specs[0].per_token:
        logratios = per_token(policy.full_chosen, tokens[0]), per_token(policy.full_rejected, tokens[1])
    else:
        logratios = policy.chosen, policy.rejected
    chosen, rejected = beta * logratios[0], beta * logratios[1]
    margins = chosen - rejected
    return {
        "rewards/chosen": mean(chosen, axes),
        "rewards/rejected": mean(rejected, axes),
        "rewards/margins": mean(margins, axes),
        "rewards/accuracies": mean(0.5 * (1 + jnp.sign(margins)), axes),
        "logps/chosen": mean(policy.chosen, axes),
        "logps/rejected": mean(policy.rejected, axes),
    }


def evaluate(
    config: PreferenceLossConfig,
    policy: PairLogps[np.ndarray],
    reference: PairLogps[np.ndarray] | None,
    pairs: RaggedPairs,
    beta: float,
) -> dict[str, float]:
    """Compute the loss and metrics on all held-out pairs as one batch, with the prefix `eval/`."""
    policy, reference = jax.tree.map(jnp.asarray, (policy, reference))
    chosen, rejected = (jnp.asarray(side.responses.lengths, jnp.int32) for side in pairs)
    tokens, whole = (chosen, rejected), masking.mean(chosen.astype(jnp.float32), ())
    loss, metrics = preference_loss(config, policy, reference, tokens, beta=beta, axes=(), tokens_per_pair=whole)
    return {"eval/loss": float(loss)} | {f"eval/{name}": float(value) for name, value in values(metrics).items()}


# ---- the step -------------------------------------------------------------------------------------------------------


def make_step(
    updates: Updates[PolicyNetwork],
    loss_config: PreferenceLossConfig = SIGMOID,
    reference_update: ReferenceUpdate | None = None,
) -> Step:
    """Make the step: one update on a PreferenceBatch or a ReferencedBatch.

    `frozen` holds beta and the reference, which is also an adapter's base. With `reference_update` the reference is in
    the state's parameters instead; if the policy is an adapter, the reference is a second adapter of the same base.
    Beta is an array, so that runs that differ only in beta share one compiled program.
    """
    return _make_step(updates, loss_config, reference_update, loss_config.specs)


@functools.lru_cache  # specs are part of the key, because a user's file may have changed
def _make_step(
    updates: Updates[PolicyNetwork],
    loss_config: PreferenceLossConfig,
    reference_update: ReferenceUpdate | None,
    specs: tuple[LossSpec, ...],
) -> Step:
    network, axes = updates.network, updates.axes

    def step(
        state: TrainState, frozen: dict[str, PyTree], batch: PreferenceBatch | ReferencedBatch, run_key: jax.Array
    ) -> tuple[TrainState, dict[str, Array], tuple]:
        rows = batch if isinstance(batch, ReferencedBatch) else ReferencedBatch(batch, None)
        whole_batch, beta = tokens_per_pair(rows.pairs, axes), beta_of_run(frozen)

        def loss_fn(
            params: PyTree, rows: ReferencedBatch, keys: Key[Array, "B"] | None
        ) -> tuple[Float[Array, ""], Metrics]:
            if rows.reference is None and loss_config.needs_reference:
                rows = rows._replace(reference=pair_logps(loss_config, network, reference_params(), rows.pairs))
            policy = full_params(network, params["policy"], frozen, "reference")
            return pair_loss(
                loss_config, network, policy, rows, keys, beta=beta, axes=axes, tokens_per_pair=whole_batch
            )

        def reference_params() -> PyTree:
            if reference_update is None:
                return frozen["reference"]
            return full_params(network, state.params["reference"], frozen, "reference")

        def pairs(rows: ReferencedBatch) -> Array:
            return masking.rows(rows.pairs.chosen.tokens, axes)

        state, logged = of_run(updates, frozen, IN_UPDATES).update(
            state, rows, run_key, loss_fn, weight=pairs, trained=("policy",)
        )
        if reference_update:
            policy, reference = state.params["policy"], state.params["reference"]
            reference = sync_reference(reference_update, reference, policy, state.step)
            state = state._replace(params={"policy": policy, "reference": reference})
        both = both_responses(rows.pairs)
        counts = {
            "num_tokens": masking.count(both.response_mask, axes),
            "token_share": masking.share(mask_read(both), axes),
        }
        return state, logged | counts, ()

    return step
