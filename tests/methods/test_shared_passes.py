"""Forward passes that the compiler computes once: counts of the matrix products of compiled programs."""

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import PyTree

from rlhf_jax.methods.policy_gradient import Iteration
from rlhf_jax.methods.policy_parts import OnlineBatch
from rlhf_jax.models.policy import PolicyNetwork
from tests.support import tiny


def products(function: Callable, *args: PyTree) -> int:
    """Number of matrix products of the compiled function."""
    return len(re.findall(r" dot\(", str(jax.jit(function).lower(*args).compile().as_text())))


@pytest.mark.nightly
@pytest.mark.parametrize(("activation", "gated"), [("silu", True), ("gelu", True), ("gelu", False), ("relu", False)])
def test_gradient_shares_its_forward_pass_with_one_outside_it(activation, gated):
    config = dataclasses.replace(tiny.POLICY.config, activation=activation, gated=gated)
    policy: PolicyNetwork = dataclasses.replace(tiny.POLICY, config=config)
    params, tokens = policy.init(jax.random.key(0)), jnp.ones((4, 5), int)

    def loss(params):
        return jnp.sum(jnp.sin(policy.apply(params, tokens, jnp.ones(tokens.shape, bool))))

    gradient = jax.value_and_grad(loss)
    assert products(lambda params: (loss(params), gradient(params)), params) == products(gradient, params)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_single_update_has_no_forward_pass_of_its_own(name):
    params, networks = {"policy": tiny.policy_params()}, tiny.NETWORKS
    if name == "ppo":
        params["value"] = tiny.REWARD.init_value(tiny.reward_params())
    else:
        networks = dataclasses.replace(networks, value=None)

    def iteration_of(minibatches: int) -> Iteration:
        config = tiny.with_config() if name == "ppo" else tiny.group_config(name)
        config = dataclasses.replace(config, epochs=1, minibatches=minibatches)
        return Iteration(networks, config, (), (), tiny.build_method(config))

    def of_iteration(minibatches: int) -> int:
        iteration = iteration_of(minibatches)
        batch = OnlineBatch(tiny.prompts(8 // iteration.method.num_generations, 0))
        state = iteration.init_state(params)
        return products(iteration.step(tiny.REWARD), state, tiny.ppo_frozen(), batch, jax.random.key(0))

    forward = products(functools.partial(networks.forward, temperature=1.0), params, tiny.preferences(8).chosen)
    assert of_iteration(2) - of_iteration(1) == forward
