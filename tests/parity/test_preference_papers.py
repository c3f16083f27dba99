# torch is in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""Preference losses that TRL does not have, against their authors' code or equation in torch: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional

from rlhf_jax.methods.preference_table import PreferenceLossConfig
from tests.support.pairs import loss_of

PAIRS, BETA = 8, 0.3


def dpop(w, l, ref_w, ref_l, tokens):  # noqa: E741
    """The loss of arXiv:2402.13228, with lambda = 2; the authors released no code."""
    penalty = torch.clamp(ref_w - w, min=0)
    return -functional.logsigmoid(BETA * ((w - ref_w) - (l - ref_l) - 2.0 * penalty)).mean()


def alpha_dpo(w, l, ref_w, ref_l, tokens):  # noqa: E741
    """`dpo_loss` with loss_type "alpha-dpo" of github.com/junkangwu/alpha-DPO, whose log-probabilities are per token.

    Its running mean and deviation are those of this batch alone: `gamma_update` = 0.
    """
    alpha, gamma_beta_ratio, label_smoothing = 0.7, 0.4 / BETA, 0.1
    w, ref_w, l, ref_l = w / tokens[0], ref_w / tokens[0], l / tokens[1], ref_l / tokens[1]  # noqa: E741
    pi_logratios = w - l
    ref_logratios = ref_w - ref_l
    gap_pos_neg = pi_logratios - ref_logratios
    constant_1, constant_2 = torch.mean(gap_pos_neg), torch.std(gap_pos_neg)
    ref_logratios_normalized = (gap_pos_neg - constant_1) / constant_2
    ref_logratios_scaled = ref_logratios_normalized * alpha + gamma_beta_ratio
    constant_term = ref_logratios_scaled.detach()
    logits = pi_logratios - constant_term
    losses = (
        -functional.logsigmoid(BETA * logits) * (1 - label_smoothing)
        - functional.logsigmoid(-BETA * logits) * label_smoothing
    )
    return losses.mean()


LOSSES = {
    "alpha_dpo": (
        alpha_dpo,
        PreferenceLossConfig(losses=("alpha_dpo",), alpha_dpo_alpha=0.7, simpo_gamma=0.4, label_smoothing=0.1),
    ),
    "dpop": (dpop, PreferenceLossConfig(losses=("dpop",), dpop_lambda=2.0)),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_our_numbers_are_those_of_the_paper(name, seed):
    theirs, config = LOSSES[name]
    rng = np.random.default_rng(seed)
    logps, tokens = rng.normal(-20, 3, (4, PAIRS)).astype(np.float32), rng.integers(3, 30, (2, PAIRS))
    w, l = (torch.tensor(x, requires_grad=True) for x in logps[:2])  # noqa: E741
    ref_w, ref_l = map(torch.tensor, logps[2:])
    expected = theirs(w, l, ref_w, ref_l, torch.tensor(tokens))
    expected.backward()

    def loss(own):
        lengths = jnp.asarray(tokens[0], jnp.int32), jnp.asarray(tokens[1], jnp.int32)
        return loss_of(config, (*own, *map(jnp.asarray, logps[2:])), lengths, beta=BETA)[0]

    value, grads = jax.value_and_grad(loss)((jnp.asarray(logps[0]), jnp.asarray(logps[1])))
    np.testing.assert_allclose(value, expected.detach().numpy(), rtol=1e-5)
    for grad, argument in zip(grads, (w, l), strict=True):
        np.testing.assert_allclose(grad, argument.grad.numpy(), rtol=1e-4, atol=1e-7)
