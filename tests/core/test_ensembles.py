import jax.numpy as jnp
import numpy as np

from rlhf_jax.core import ensembles

SCORES = jnp.array([[1.0, -2.0], [2.0, 4.0], [6.0, 1.0]])  # of three members, for two responses


def test_combinations_are_those_of_coste_et_al():
    np.testing.assert_allclose(ensembles.mean(SCORES), [3.0, 1.0])
    np.testing.assert_allclose(ensembles.worst_case(SCORES), [1.0, -2.0])
    variances = [(4 + 1 + 9) / 3, (9 + 9 + 0) / 3]
    found = ensembles.uncertainty_weighted(SCORES, variance_coefficient=0.5)
    np.testing.assert_allclose(found, [3 - 0.5 * variances[0], 1 - 0.5 * variances[1]], rtol=1e-6)
