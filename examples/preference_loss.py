"""Your own preference loss: DPO with a length penalty (R-DPO, Park et al. 2024, arXiv:2403.19159).

    rlhf-jax run --config=EXPERIMENT.py --workdir=DIR --config.dpo.loss.losses=examples/preference_loss.py:r_dpo

A loss returns one number per pair. The names of its parameters say what it reads: inputs (`INPUTS` in
`rlhf_jax.methods.preference_table`) and options of the config. Any other parameter needs a default, which it keeps. A
weighted sum with built-in losses is possible, with `loss_weights`. A changed file counts as a changed config.
"""

import jax
from jaxtyping import Array, Float, Int


def r_dpo(
    chosen_logratios: Float[Array, "B"],
    rejected_logratios: Float[Array, "B"],
    chosen_tokens: Int[Array, "B"],
    rejected_tokens: Int[Array, "B"],
    *,
    beta: Float[Array, ""],
    length_penalty: float = 0.01,
) -> Float[Array, "B"]:
    r"""$-\log\sigma(\beta(\rho_w - \rho_l) + \alpha(|y_w| - |y_l|))$, with alpha as `length_penalty`."""
    lengths = (chosen_tokens - rejected_tokens).astype(chosen_logratios.dtype)
    return -jax.nn.log_sigmoid(beta * (chosen_logratios - rejected_logratios) + length_penalty * lengths)
