"""Pairs of an online iteration: the learner of online DPO.

Steps 4 and 6 of `policy_gradient.py`: of two responses to a prompt the one with the higher score is chosen over the
other, and a preference loss (`dpo.py`) is taken of the pairs.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from rlhf_jax.core import masking
from rlhf_jax.methods.dpo import ReferencedBatch, pair_logps, pair_loss, tokens_per_pair
from rlhf_jax.methods.policy_parts import Coefficient, Evaluated, Metrics, Numbers, Params, Setting
from rlhf_jax.methods.preference_table import PreferenceLossConfig
from rlhf_jax.types import PreferenceBatch, Rollout


@dataclasses.dataclass(frozen=True)
class PairLearner:
    """A preference loss on the policy's own pairs, whose models are read at temperature 1."""

    loss_config: PreferenceLossConfig
    beta: float

    def prepare(
        self, at: Setting, evaluated: Evaluated, frozen: Params, kl_coef: Coefficient
    ) -> tuple[ReferencedBatch, Numbers]:
        """Choose pairs by their scores, and read them with the reference if the loss does."""
        del kl_coef
        pairs, margins = choose(evaluated.rollout, evaluated.scores)
        reference = None
        if self.loss_config.needs_reference:
            reference = pair_logps(self.loss_config, at.networks.policy, frozen["reference"], pairs)
        metrics = {
            "objective/scores_margin": masking.mean(margins, at.axes),
            "objective/ties": masking.mean((margins == 0).astype(jnp.float32), at.axes),
        }
        return ReferencedBatch(pairs, reference), metrics

    def loss(
        self,
        at: Setting,
        params: Params,
        rows: ReferencedBatch,
        dropout: Key[Array, "B"] | None,
        *,
        whole: ReferencedBatch,
        kl_coef: Coefficient,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Compute the preference loss of pairs; the mean length of a pair is the whole minibatch's."""
        del kl_coef
        return pair_loss(
            self.loss_config,
            at.networks.policy,
            params["policy"],
            rows,
            dropout,
            beta=self.beta,
            axes=at.axes,
            tokens_per_pair=tokens_per_pair(whole.pairs.chosen_mask, at.axes),
        )

    def weight(self, rows: ReferencedBatch, axes: tuple[str, ...]) -> Int[Array, ""]:
        """Count the pairs."""
        return masking.rows(rows.pairs.chosen, axes)


def choose(rollout: Rollout, scores: Float[Array, "N"]) -> tuple[PreferenceBatch, Float[Array, "B"]]:
    """Make a pair of every two rows, the one with the higher score as chosen (of a tie the first), and its margin.

    Two samples to one prompt are exchangeable: given that they tie, either is as likely to be the first, so that a tie
    pulls towards neither of two answers (and two equal answers have no margin at all). TRL chooses the first as well.
    """
    first, second = scores.reshape(-1, 2).T
    rows = 2 * jnp.arange(len(first))
    chosen, rejected = (jnp.where(wins, rows, rows + 1) for wins in (first >= second, first < second))
    pairs = PreferenceBatch(
        prompt=rollout.prompt[rows],
        prompt_mask=rollout.prompt_mask[rows],
        chosen=rollout.response[chosen],
        chosen_mask=rollout.response_mask[chosen],
        rejected=rollout.response[rejected],
        rejected_mask=rollout.response_mask[rejected],
    )
    return pairs, jnp.abs(first - second)
