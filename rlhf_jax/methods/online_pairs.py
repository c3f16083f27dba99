"""The learner of online DPO: steps 4 and 6 of an iteration in `policy_gradient.py`.

Of two responses to a prompt, the one with the higher score is chosen and the other rejected; the loss is a preference
loss of these pairs (`dpo.py`).
"""

import dataclasses
import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from rlhf_jax.core import masking
from rlhf_jax.methods.dpo import ReferencedBatch, pair_logps, pair_loss, tokens_per_pair
from rlhf_jax.methods.policy_parts import Coefficient, Evaluated, Metrics, Numbers, Params, Setting
from rlhf_jax.methods.preference_table import PreferenceLossConfig
from rlhf_jax.types import PreferenceBatch, Sequences


@dataclasses.dataclass(frozen=True)
class PairLearner:
    """A preference loss on pairs of the policy's samples; its log-probabilities are at temperature 1."""

    loss_config: PreferenceLossConfig
    beta: float
    packed: None = None  # which response is chosen is not known when sequences are packed

    def prepare(
        self, setting: Setting, evaluated: Evaluated, frozen: Params, kl_coef: Coefficient
    ) -> tuple[ReferencedBatch, Numbers]:
        """Make pairs by score, with the reference's log-probabilities if the loss reads them."""
        del kl_coef
        pairs, margins = choose(evaluated.sequences._replace(packing=None), evaluated.scores)
        reference = None
        if self.loss_config.needs_reference:
            logps = functools.partial(pair_logps, self.loss_config, setting.networks.policy, frozen["reference"])
            reference = setting.by_slices(logps, pairs, responses=2)
        metrics = {
            "objective/scores_margin": masking.mean(margins, setting.axes),
            "objective/ties": masking.mean((margins == 0).astype(jnp.float32), setting.axes),
        }
        return ReferencedBatch(pairs, reference), metrics

    def loss(
        self,
        setting: Setting,
        params: Params,
        rows: ReferencedBatch,
        dropout: Key[Array, "B"] | None,
        *,
        whole: ReferencedBatch,
        kl_coef: Coefficient,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Compute the preference loss of pairs; likelihoods are divided by the mean length in the whole minibatch."""
        del kl_coef
        return pair_loss(
            self.loss_config,
            setting.networks.policy,
            params["policy"],
            rows,
            dropout,
            beta=self.beta,
            axes=setting.axes,
            tokens_per_pair=tokens_per_pair(whole.pairs, setting.axes),
        )

    def weight(self, rows: ReferencedBatch, axes: tuple[str, ...]) -> Int[Array, ""]:
        """Count the pairs."""
        return masking.rows(rows.pairs.chosen.tokens, axes)


def choose(sequences: Sequences, scores: Float[Array, "N"]) -> tuple[PreferenceBatch, Float[Array, "B"]]:
    """Make a pair of every two consecutive rows: the one with the higher score is chosen, or the first if they tie.

    Ties do not bias the policy: two samples for one prompt are exchangeable, so that either is equally likely to come
    first. TRL also chooses the first. Returns: the pairs, and the absolute difference of their scores.
    """
    first, second = scores.reshape(-1, 2).T
    rows = 2 * jnp.arange(len(first))
    chosen, rejected = (jnp.where(wins, rows, rows + 1) for wins in (first >= second, first < second))
    pairs = PreferenceBatch(*(masking.take_rows(sequences, side, ()) for side in (chosen, rejected)))
    return pairs, jnp.abs(first - second)
