r"""Direct preference optimisation under other divergences than the reverse KL (Wang et al. 2023, arXiv:2309.16240).

With an f-divergence as regulariser the implicit reward of a response is $\beta f'(\pi(y) / \pi_{ref}(y))$ up to a
constant of the prompt, which cancels in the difference of two responses: only losses of that difference can use it.
Here are the derivatives $f'(e^\rho)$ of log-ratios $\rho$ in nats; the reverse KL's is $\rho$ itself.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LARGEST = 80.0  # of an exponent, so that it does not overflow in float32: TRL's for the alpha-divergence


def forward_kl(logratios: Float[Array, "B"]) -> Float[Array, "B"]:
    r"""$1 - e^{-\rho}$, of $f(u) = -\log u$, with the constant that makes it 0 at $\rho = 0$, as in TRL."""
    return 1 - jnp.exp(jnp.minimum(-logratios, LARGEST))


def js_divergence(logratios: Float[Array, "B"]) -> Float[Array, "B"]:
    r"""$\log\frac{2 e^\rho}{1 + e^\rho} = \log 2 + \log\sigma(\rho)$: Jensen-Shannon."""
    return jnp.log(2.0).astype(logratios.dtype) + jax.nn.log_sigmoid(logratios)


def alpha_divergence(logratios: Float[Array, "B"], *, alpha: float) -> Float[Array, "B"]:
    r"""$\frac{1 - e^{-\alpha\rho}}{\alpha}$ for alpha between 0, the limit of the reverse KL, and 1, the forward KL.

    Of $f(u) = \frac{u^{1-\alpha} - (1-\alpha) u - \alpha}{\alpha (\alpha - 1)}$. Alpha is the paper's, and its authors'
    code's; TRL's `f_alpha_divergence_coef` is 1 - alpha.
    """
    return (1 - jnp.exp(jnp.minimum(-alpha * logratios, LARGEST))) / alpha
