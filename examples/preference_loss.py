"""A preference loss of one's own: DPO with a penalty on length (R-DPO, Park et al. 2024, arXiv:2403.19159).

    rlhf-jax --config=... "--config.dpo.loss.losses=('examples/preference_loss.py:r_dpo',)"

A loss gives one number a pair, in JAX, and names what it reads by its parameters: `rlhf_jax.methods.preference_table`
lists the inputs (`INPUTS`) and the options of the config. Other parameters need a default, and keep it. It can be mixed
with built-in losses, by `loss_weights`. A change to this file is noticed like a changed field.
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
