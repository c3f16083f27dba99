"""Rows of prompt and response without padding before the prompt: the same numbers and gradients as with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.sequences import compacted, joined
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from tests.support.networks import SUPPRESSED, VOCAB, config, random_params, uneven_rollout

WIDTH, RESPONSE_WIDTH = 7, 5
"""Tokens of the longest row and of the longest response of `uneven_rollout`."""


def test_a_compacted_row_is_the_prompt_the_response_and_then_padding():
    rollout = uneven_rollout(filling=9)
    got = compacted(rollout, width=WIDTH, response_width=RESPONSE_WIDTH)
    assert got.tokens.shape == (4, WIDTH) and got.response.shape == (4, RESPONSE_WIDTH)
    for row in range(4):
        prompt, response = rollout.prompt[row, rollout.prompt_mask[row]], rollout.response[row]
        response = response[rollout.response_mask[row]]
        count = len(prompt) + len(response)
        np.testing.assert_array_equal(got.tokens[row, :count], [*prompt, *response])
        np.testing.assert_array_equal(got.mask[row], np.arange(WIDTH) < count)
        assert got.start[row] == len(prompt)
    np.testing.assert_array_equal(got.response, rollout.response)
    wider = compacted(rollout, width=12, response_width=3)
    np.testing.assert_array_equal(wider.mask[:, WIDTH:], False)
    np.testing.assert_array_equal(wider.response_mask, rollout.response_mask[:, :3])


def test_an_empty_prompt_keeps_one_position():
    rollout = uneven_rollout()
    rollout = rollout._replace(prompt_mask=np.zeros_like(rollout.prompt_mask))
    got = compacted(rollout, width=6, response_width=5)
    np.testing.assert_array_equal(got.start, 1)
    np.testing.assert_array_equal(got.tokens[:, 1:], rollout.response)
    np.testing.assert_array_equal(got.mask[:, 1:], rollout.response_mask)
    assert not np.any(got.mask[:, 0])


POSITIONS = {
    "rotary": config(positions="rotary"),
    "learned": config(positions="learned", context=16),
    "a window": config(windows=(3, None)),
}


@pytest.mark.parametrize(
    "name", [name if name == "rotary" else pytest.param(name, marks=pytest.mark.nightly) for name in POSITIONS]
)
def test_padding_before_the_prompt_changes_no_number_and_no_gradient(name):
    shape = POSITIONS[name]
    policy, scalar = PolicyNetwork(shape, VOCAB, SUPPRESSED), ScalarNetwork(shape, VOCAB, "mean")
    last = ScalarNetwork(shape, VOCAB, "last")
    params, rollout = (random_params(policy), random_params(scalar)), uneven_rollout()
    mask = rollout.response_mask

    @functools.partial(jax.jit, static_argnums=0)
    def outputs(compact):
        rows = compacted(rollout, width=WIDTH + 2, response_width=RESPONSE_WIDTH) if compact else joined(rollout)

        def loss(params):
            stats = policy.response_stats(params[0], rows, temperature=0.7)
            numbers = (
                jnp.where(mask, stats.logprobs, 0),
                jnp.where(mask, stats.entropy, 0),
                jnp.where(mask, scalar.values(params[1], rows), 0),
                scalar.scores(params[1], rows),
                last.scores(params[1], rows),
            )
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in numbers), numbers

        return jax.grad(loss, has_aux=True)(params)

    jax.tree.map(
        lambda got, expected: np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4),
        outputs(True),
        outputs(False),
    )
