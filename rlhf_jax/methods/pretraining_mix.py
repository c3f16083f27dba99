"""Pretraining mix of InstructGPT: a maximum-likelihood term on demonstrations in every policy-gradient update."""

import dataclasses

import jax
from jaxtyping import Array, Float, Int

from rlhf_jax.config import Count, Positive
from rlhf_jax.core import masking
from rlhf_jax.core.logprobs import cross_entropy
from rlhf_jax.methods.policy_parts import Metrics, Networks, Params
from rlhf_jax.runtime.optimizers import OptimizerConfig, gradients
from rlhf_jax.types import TokenBatch


@dataclasses.dataclass(frozen=True)
class PretrainingMix:
    """PPO-ptx, eq. 2 of Ouyang et al. 2022 (arXiv:2203.02155)."""

    coef: Positive  # weight of the likelihood (gamma in the paper)
    batch_size: Count  # demonstrations per iteration, from the experiment's data

    def gradients(
        self,
        networks: Networks,
        optimizer: OptimizerConfig,
        params: Params,
        frozen: Params,
        batch: TokenBatch,
        axes: tuple[str, ...],
    ) -> tuple[Float[Array, ""], Params]:
        """Compute the loss of demonstrations and its gradient, accumulated over micro-batches if configured."""

        def loss_fn(params: Params, rows: TokenBatch) -> tuple[Float[Array, ""], Metrics]:
            stats = networks.policy.sequence_stats(networks.full_params(params, frozen)["policy"], rows)
            return cross_entropy(stats.logprobs, rows.loss_mask[:, 1:], axes), {}

        def trained_tokens(rows: TokenBatch) -> Int[Array, ""]:
            return masking.count(rows.loss_mask[:, 1:], axes)

        rows = batch.tokens.shape[0] * (jax.lax.axis_size(axes) if axes else 1)
        if optimizer.micro_batch is not None and rows <= optimizer.micro_batch:
            optimizer = dataclasses.replace(optimizer, micro_batch=None)
        loss, _, grads = gradients(optimizer, loss_fn, params, batch, trained_tokens, axes)
        return loss, grads
