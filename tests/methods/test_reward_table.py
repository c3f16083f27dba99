"""The table of reward-model losses: the level that each has where all scores are equal."""

import jax.numpy as jnp
import pytest

from rlhf_jax.methods.reward_table import LOSSES

EQUAL = {
    "chosen_scores": jnp.full(3, 0.7),
    "rejected_scores": jnp.full(3, 0.7),
    "margins": jnp.array([0.5, 0.0, 2.0]),
    "votes": jnp.array([[2.0, 1.0], [3.0, 0.0], [0.0, 1.0]]),
    "scores": jnp.full((2, 3), 0.7),
    "wins": jnp.array([[[0, 1, 1], [0, 0, 1], [0, 0, 0]], [[0, 1, 0], [0, 0, 0], [0, 0, 0]]], bool),
    "mask": jnp.array([[1, 1, 1], [1, 1, 0]], bool),
    "label_smoothing": 0.1,
    "axes": (),
}
OTHERS = {
    "chosen_scores": jnp.full(3, -1.0),
    "rejected_scores": jnp.full(3, -1.0),
    "margins": jnp.array([0.1, 0.0, 0.3]),
    "mask": jnp.array([[1, 1, 0], [1, 1, 0]], bool),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_level_at_equal_scores_is_the_loss_there(name):
    spec = LOSSES[name]
    levels = [
        float(spec.function(**{key: value for key, value in inputs.items() if key in spec.reads})[0])
        for inputs in (EQUAL, EQUAL | OTHERS)
    ]
    if spec.at_equal_scores is None:
        assert levels[0] != pytest.approx(levels[1], rel=1e-3), "the level depends on the data"
    else:
        assert levels == pytest.approx([spec.at_equal_scores] * 2)
