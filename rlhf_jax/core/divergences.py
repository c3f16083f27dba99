r"""Direct preference optimisation under divergences other than the reverse KL (Wang et al. 2023, arXiv:2309.16240).

With an f-divergence as regulariser, the implicit reward of a response is $\beta f'(\pi(y) / \pi_{ref}(y))$ up to a
constant per prompt, which cancels between two responses: only losses of their difference can use it. The functions
below are the derivatives $f'(e^\rho)$ at log-ratios $\rho$ in nats; for the reverse KL it is $\rho$ itself.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LARGEST_EXPONENT = 80.0  # avoids overflow in float32; TRL uses it for the alpha-divergence


def forward_kl(logratios: Float[Array, "B"]) -> Float[Array, "B"]:
    r"""$1 - e^{-\rho}$, from $f(u) = -\log u$; the constant makes it 0 at $\rho = 0$, as in TRL."""
    return 1 - jnp.exp(jnp.minimum(-logratios, LARGEST_EXPONENT))


def js_divergence(logratios: Float[Array, "B"]) -> Float[Array, "B"]:
    r"""$\log\frac{2 e^\rho}{1 + e^\rho} = \log 2 + \log\sigma(\rho)$: Jensen-Shannon."""
    return jnp.log(2.0).astype(logratios.dtype) + jax.nn.log_sigmoid(logratios)


def alpha_divergence(logratios: Float[Array, "B"], *, alpha: float) -> Float[Array, "B"]:
    r"""$\frac{1 - e^{-\alpha\rho}}{\alpha}$ for alpha between 0, the limit of the reverse KL, and 1, the forward KL.

    From $f(u) = \frac{u^{1-\alpha} - (1-\alpha) u - \alpha}{\alpha (\alpha - 1)}$. Alpha is that of the paper and of
    its authors' code; TRL's `f_alpha_divergence_coef` is 1 - alpha.
    """
    return (1 - jnp.exp(jnp.minimum(-alpha * logratios, LARGEST_EXPONENT))) / alpha
