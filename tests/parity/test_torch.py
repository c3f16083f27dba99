# torch and its kin are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""Against the papers' equations, written once more in torch: float64, its own derivatives, loops where ours scans."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from rlhf_jax.core import advantages, logprobs, policy_losses, preference_losses
from tests.support.padded_arrays import ppo_loss

B, T, V = 7, 9, 13
SEEDS = range(5)


def arrays(seed: int, count: int, *shape: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32))


def prefix_mask(seed: int) -> np.ndarray:
    lengths = np.random.default_rng(seed).integers(0, T + 1, size=B)
    lengths[:2] = [0, T]
    return np.arange(T)[None, :] < lengths[:, None]


def assert_same(ours: Callable[..., jax.Array], theirs: Callable[..., torch.Tensor], inputs: list[np.ndarray]) -> None:
    """Equal values, and equal gradients of a random combination of them with respect to every input."""
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs]
    expected = theirs(*leaves)
    weights = np.random.default_rng(0).normal(size=expected.shape)
    (expected * torch.as_tensor(weights)).sum().backward()

    @jax.jit
    def evaluate(*inputs):
        value, pull_back = jax.vjp(ours, *inputs)
        return value, pull_back(jnp.asarray(weights, jnp.float32))

    value, grads = evaluate(*inputs)
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-4, atol=1e-5)
    for grad, leaf in zip(grads, leaves, strict=True):
        np.testing.assert_allclose(grad, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, 1e-4, 1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_token_logprobs_and_entropy_against_torchs_distributions(seed):
    tokens = np.random.default_rng(seed).integers(V, size=(B, T))
    logits = [3 * x for x in arrays(seed, 1, B, T, V)]

    def categorical(logits):
        return torch.distributions.Categorical(logits=logits)

    assert_same(
        lambda x: logprobs.token_logprobs(x, jnp.asarray(tokens, jnp.int32)),
        lambda x: categorical(x).log_prob(torch.as_tensor(tokens)),
        logits,
    )
    assert_same(logprobs.entropy, lambda x: categorical(x).entropy(), logits)


@pytest.mark.parametrize("seed", SEEDS)
def test_dpo_against_equation_7(seed):
    """Rafailov et al. 2023, from logits and labels as the authors' trainer reads them: ignored labels are -100.

    The loss is the cross-entropy of a choice between two implicit rewards whose first is right.
    """
    beta, mask = 0.3, prefix_mask(seed) | (np.arange(T) == 0)
    tokens = np.random.default_rng(seed).integers(V, size=(4, B, T))
    inputs = arrays(seed, 4, B, T, V)

    def ours(*logits):
        sequences = [
            logprobs.sequence_logprobs(logprobs.token_logprobs(x, jnp.asarray(t, jnp.int32)), jnp.asarray(mask))
            for x, t in zip(logits, tokens, strict=True)
        ]
        chosen, rejected, ref_chosen, ref_rejected = sequences
        losses = preference_losses.sigmoid_loss(chosen - ref_chosen, rejected - ref_rejected, beta=beta)
        return jnp.mean(losses)

    def theirs(*logits):
        chosen, rejected, ref_chosen, ref_rejected = (
            -torch.nn.functional.cross_entropy(
                x.transpose(1, 2), torch.as_tensor(np.where(mask, t, -100)), ignore_index=-100, reduction="none"
            ).sum(1)
            for x, t in zip(logits, tokens, strict=True)
        )
        rewards = beta * torch.stack([chosen - ref_chosen, rejected - ref_rejected], dim=1)
        return torch.nn.functional.cross_entropy(rewards, torch.zeros(B, dtype=torch.long))

    assert_same(ours, theirs, inputs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("output", ["advantages", "returns"])
def test_gae_against_a_loop_over_each_response(seed, gamma, gae_lambda, output):
    mask = prefix_mask(seed)

    def ours(rewards, values):
        both = advantages.gae(rewards, values, jnp.asarray(mask), gamma=gamma, gae_lambda=gae_lambda)
        return both[0] if output == "advantages" else both[1]

    def theirs(rewards, values):
        rows = []
        for row in range(B):
            length = int(mask[row].sum())
            cells = [torch.zeros((), dtype=torch.float64)] * T
            advantage, next_value = 0.0, 0.0
            for t in reversed(range(length)):
                advantage = rewards[row, t] + gamma * next_value - values[row, t] + gamma * gae_lambda * advantage
                next_value = values[row, t]
                cells[t] = advantage if output == "advantages" else advantage + values[row, t]
            rows.append(torch.stack(cells))
        return torch.stack(rows)

    assert_same(ours, theirs, arrays(seed, 2, B, T))


@pytest.mark.parametrize("seed", SEEDS)
def test_policy_loss_against_equation_7_over_the_selected_tokens(seed):
    mask, epsilon = prefix_mask(seed), 0.2
    noise, old, advantage = arrays(seed, 3, B, T)
    ours = functools.partial(ppo_loss, response_mask=jnp.asarray(mask), clip_ratio=epsilon, axes=())

    def theirs(new, old, advantage):
        new, old, advantage = (x[torch.as_tensor(mask)] for x in (new, old, advantage))
        ratio = (new - old).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)
        return -surrogate.sum() / mask.sum()

    inputs = [old + 0.3 * noise, old, advantage]
    assert_same(lambda *x: ours(*x)[0], theirs, inputs)


@pytest.mark.parametrize("seed", SEEDS)
def test_value_loss_over_the_selected_tokens(seed):
    mask, epsilon = prefix_mask(seed), 0.2
    noise, old, returns = arrays(seed, 3, B, T)
    ours = functools.partial(policy_losses.value_loss, response_mask=jnp.asarray(mask), clip_range=epsilon, axes=())

    def theirs(values, old, returns):
        values, old, returns = (x[torch.as_tensor(mask)] for x in (values, old, returns))
        near = old + (values - old).clamp(-epsilon, epsilon)
        return torch.maximum((values - returns) ** 2, (near - returns) ** 2).mean() / 2

    assert_same(lambda *x: ours(*x)[0], theirs, [old + 0.3 * noise, old, returns])
