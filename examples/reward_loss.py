"""Your own reward-model loss: a hinge on the difference of the scores, as in ranking support vector machines.

    rlhf-jax run --config=EXPERIMENT.py --workdir=DIR --config.reward_model.loss.name=examples/reward_loss.py:hinge

A loss takes the scores of pairs and returns one number per pair. It may also have parameters `margins` (the column
margin of the data) and `label_smoothing` (of the config). Any other parameter needs a default, which it keeps. A
changed file counts as a changed config.
"""

import jax
from jaxtyping import Array, Float


def hinge(
    chosen_scores: Float[Array, "B"],
    rejected_scores: Float[Array, "B"],
    margins: Float[Array, "B"],
    *,
    scale: float = 1.0,
) -> Float[Array, "B"]:
    r"""$\max(0, s + m - (r_w - r_l))$, with a given margin m for each pair and s as `scale`."""
    return jax.nn.relu(scale + margins - (chosen_scores - rejected_scores))
