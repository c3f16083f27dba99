"""Our numbers against what TRL's trainers computed from the same inputs: values, gradients and metrics.

The records come from TRL itself in `make parity`, and from tests/goldens, where such runs were written down, otherwise.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core import advantages, kl, logprobs, masking, policy_losses, reward_losses, unpaired_losses
from rlhf_jax.methods import dpo
from rlhf_jax.methods.preference_table import PreferenceLossConfig
from rlhf_jax.models.head import TokenStats
from tests.support import tiny
from tests.support.against_trl_online import ONLINE_CHECKS
from tests.support.padded_arrays import with_values
from tests.support.pairs import loss_of

Record = Mapping[str, np.ndarray]
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """A golden: the versions that made it, and its arrays."""
    golden = json.loads(path.read_text())
    arrays = {name: np.asarray(values) for name, values in golden["arrays"].items()}
    single = {name: array.astype(np.float32) for name, array in arrays.items() if array.dtype == np.float64}
    return golden["versions"], {**arrays, **single}


def check_dpo(trl: Record, beta: float = 0.3) -> None:
    """DPOTrainer, from the hidden states that enter the head to the loss. Chosen rows come first, then rejected."""
    tokens, mask = jnp.asarray(trl["tokens"][:, 1:], jnp.int32), jnp.asarray(trl["completion_mask"][:, 1:])

    @jax.jit
    def sequences(hidden, head):
        return jnp.split(logprobs.sequence_logprobs(logprobs.token_logprobs(hidden[:, :-1] @ head.T, tokens), mask), 2)

    reference = sequences(jnp.asarray(trl["ref_hidden"]), jnp.asarray(trl["ref_head"]))

    def loss(hidden, head):
        chosen, rejected = jnp.split(masking.lengths(mask), 2)
        logps = (*sequences(hidden, head), *reference)
        return with_values(loss_of)(PreferenceLossConfig(), logps, (chosen, rejected), beta=beta)

    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        jnp.asarray(trl["hidden"]), jnp.asarray(trl["head"])
    )
    close(value, trl["loss"])
    close(grads[0], trl["hidden_grad"])
    close(grads[1], trl["head_grad"])
    for name, number in metrics.items():  # TRL counts a tie as wrong, and we as half right; here there is none
        close(number, trl[name], err_msg=name)


def check_sft(trl: Record) -> None:
    """SFTTrainer, from the hidden states that enter the head to the loss over the completions' tokens."""
    tokens, mask = jnp.asarray(trl["tokens"][:, 1:], jnp.int32), jnp.asarray(trl["completion_mask"][:, 1:])

    def loss(hidden, head):
        logits = hidden[:, :-1] @ head.T
        return logprobs.cross_entropy(logprobs.token_logprobs(logits, tokens), mask, ()), logprobs.entropy(logits)

    (value, entropy), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        jnp.asarray(trl["hidden"]), jnp.asarray(trl["head"])
    )
    close(value, trl["loss"])
    close(grads[0], trl["hidden_grad"])
    close(grads[1], trl["head_grad"])
    close(masking.masked_mean(entropy, mask, ()), trl["entropy"])


def check_reward(trl: Record) -> None:
    """RewardTrainer's Bradley-Terry loss."""
    loss = with_values(functools.partial(reward_losses.bradley_terry_loss, axes=()))
    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        jnp.asarray(trl["chosen_scores"]), jnp.asarray(trl["rejected_scores"])
    )
    close(value, trl["loss"])
    close(grads[0], trl["chosen_grad"])
    close(grads[1], trl["rejected_grad"])
    for name, number in metrics.items():
        close(number, trl[name], err_msg=name)


def check_centered_reward(trl: Record, center_rewards_coefficient: float) -> None:
    """RewardTrainer's loss with margins and centering."""

    def loss(chosen, rejected):
        value, _ = reward_losses.margin_loss(chosen, rejected, jnp.asarray(trl["margins"]), axes=())
        return value + center_rewards_coefficient * reward_losses.centering(chosen, rejected, axes=()).value

    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(
        jnp.asarray(trl["chosen_scores"]), jnp.asarray(trl["rejected_scores"])
    )
    close(value, trl["loss"])
    close(grads[0], trl["chosen_grad"])
    close(grads[1], trl["rejected_grad"])


def check_rewards(trl: Record, kl_coef: float) -> None:
    """PPOTrainer's penalty and score; TRL puts the score one position after the last token, where there is one."""
    mask = jnp.asarray(trl["response_mask"])
    divergence = kl.k1(jnp.asarray(trl["logprobs"]), jnp.asarray(trl["ref_logprobs"]))
    close(jnp.where(mask, divergence, 0), trl["kl"])
    ours = advantages.token_rewards(jnp.asarray(trl["scores"]), divergence, mask, kl_coef=kl_coef)

    theirs = trl["rewards"].copy()
    shorter, last = np.flatnonzero(~mask[:, -1]), np.sum(np.asarray(mask), axis=1) - 1
    theirs[shorter, last[shorter]] += theirs[shorter, last[shorter] + 1]
    theirs[shorter, last[shorter] + 1] = 0
    close(ours, theirs)


def check_gae(trl: Record, gamma: float, gae_lambda: float) -> None:
    """PPOTrainer's advantages and returns, on its own mask, which reaches one position further than the response."""
    mask = jnp.asarray(trl["value_mask"])
    ours, returns = advantages.gae(
        jnp.asarray(trl["rewards"]), jnp.asarray(trl["values"]), mask, gamma=gamma, gae_lambda=gae_lambda
    )
    close(ours, trl["unwhitened"])
    close(returns, trl["returns"])


def check_whitening(trl: Record) -> None:
    """TRL divides the variance by the count less one, we by the count."""
    for x, mask, theirs in (
        (trl["unwhitened"], trl["response_mask"], trl["advantages"]),
        (trl["random"], trl["random_mask"], np.where(trl["random_mask"], trl["random_white"], 0)),
    ):
        count = np.sum(mask)
        ours = masking.whiten(jnp.asarray(x), jnp.asarray(mask), ())
        close(np.sqrt((count - 1) / count) * ours, theirs)

    x, mask = jnp.asarray(trl["random"]), jnp.asarray(trl["random_mask"])
    weights = jnp.asarray(trl["random_weights"])
    grad = jax.jit(jax.grad(lambda x: jnp.sum(weights * masking.whiten(x, mask, ()))))(x)
    count = np.sum(trl["random_mask"])
    close(np.sqrt((count - 1) / count) * grad, trl["random_grad"])
    variance = masking.masked_variance(x, mask, ())
    close(variance, trl["random_population_variance"])
    close(variance * (count / (count - 1)), trl["random_variance"])


def check_policy_loss(trl: Record, clip_ratio: float) -> None:
    """PPOTrainer's clipped surrogate at its last step, after three epochs, when many ratios are clipped.

    Ours is the loss of a minibatch, by the function that trains, without values: TRL's have another mask.
    """
    config = tiny.with_config(clip_ratio=clip_ratio)
    names = {"logprobs": "logprobs", "advantages": "advantage", "loss_mask": "response_mask"}
    batch = {name: jnp.asarray(trl[f"step_{theirs}"]) for name, theirs in names.items()}

    def loss(logprobs):
        return tiny.given_loss(config, logprobs, batch)

    (value, metrics), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(trl["step_new_logprobs"]))
    close(value, trl["step_pg_loss"])
    close(grad, trl["step_new_logprobs_grad"])
    # TRL's approxkl and ratio average over padding too: ours are not compared.
    close(metrics["policy/clipfrac_avg"], trl["step_pg_clipfrac"])
    assert 0.1 < metrics["policy/clipfrac_avg"] < 0.9


def check_value_loss(trl: Record, clip_range: float, value_coef: float) -> None:
    """PPOTrainer's clipped value loss, on the mask that reaches one position further than the response."""
    loss = with_values(functools.partial(policy_losses.value_loss, clip_range=clip_range, axes=()))
    (value, metrics), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        *(jnp.asarray(trl[f"step_{name}"]) for name in ("vpred", "values", "return", "value_mask"))
    )
    close(value, trl["step_vf_loss"])
    close(value_coef * grad, trl["step_vpred_grad"])
    close(metrics["val/clipfrac_avg"], trl["step_vf_clipfrac"])
    assert 0.1 < metrics["val/clipfrac_avg"] < 0.9


BETA = 0.3
UNPAIRED_WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
Loss = PreferenceLossConfig
# Ours, by the names under which tests/parity/trl_1_16_preferences.py wrote TRL's down.
PREFERENCES: dict[str, PreferenceLossConfig] = {
    **{name: Loss(losses=(name,)) for name in ("sigmoid", "hinge", "ipo", "sigmoid_norm", "nca_pair", "bco_pair")},
    **{name: Loss(losses=(name,)) for name in ("sppo_hard", "apo_zero", "apo_down", "discopop", "sft", "orpo")},
    **{name: Loss(losses=(name,), label_smoothing=0.1) for name in ("robust", "exo_pair", "aot", "aot_unpaired")},
    "discopop, tau": Loss(losses=("discopop",), discopop_tau=0.7),
    "forward_kl": Loss(divergence="forward_kl"),
    "js_divergence, ipo": Loss(divergence="js_divergence", losses=("ipo",)),
    "alpha_divergence": Loss(divergence="alpha_divergence", divergence_alpha=0.7),  # 1 - 0.3
    "desensitised": Loss(ld_alpha=0.4),
    "desensitised, sft": Loss(ld_alpha=0.4, losses=("ipo", "sft"), loss_weights=(0.2, 0.5)),
    "use_weighting": Loss(use_weighting=True, losses=("ipo",)),
    "mixture": Loss(losses=("sigmoid", "sft", "bco_pair"), loss_weights=(0.8, 1.0, 0.2)),
    "cpo": Loss(losses=("cpo",), cpo_alpha=0.6),
    "cpo, smoothed": Loss(losses=("cpo",), label_smoothing=0.1),
    "alphapo": Loss(losses=("alphapo",), alphapo_alpha=0.7, simpo_gamma=0.4, label_smoothing=0.1),
    "simpo": Loss(losses=("simpo",), simpo_gamma=0.4, label_smoothing=0.1),
}


def check_preferences(trl: Record) -> None:
    """Every preference loss of TRL's trainers, and its gradient by the log-probability of every token."""
    mask = jnp.asarray(trl["completion_mask"][:, 1:])
    own, reference, squares = (jnp.asarray(trl[name]) for name in ("logprobs", "ref_logprobs", "log_sum_sq_probs"))
    batch = jnp.split(mask, 2)

    def loss(logprobs: jax.Array, config: PreferenceLossConfig) -> jax.Array:
        def logps(logprobs: jax.Array) -> dpo.PairLogps:
            unread = jnp.zeros_like(logprobs)
            leaves = [jnp.split(leaf, 2) for leaf in (logprobs, unread, mask, squares)]
            chosen, rejected = (TokenStats(*side) for side in zip(*leaves, strict=True))
            return dpo.sum_tokens(config, chosen, rejected, *batch)

        tokens = masking.lengths(batch[0]), masking.lengths(batch[1])
        mean = masking.mean(tokens[0].astype(jnp.float32), ())
        ref = logps(reference) if config.needs_reference else None
        return dpo.preference_loss(config, logps(logprobs), ref, tokens, beta=BETA, axes=(), tokens_per_pair=mean)[0]

    @jax.jit  # one program for all of them
    def everything(logprobs: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        return {name: jax.value_and_grad(loss)(logprobs, config) for name, config in PREFERENCES.items()}

    # Padding has no log-probability in TRL: ours may hold anything.
    for name, (value, grad) in everything(jnp.where(mask, own, jnp.nan)).items():
        close(value, trl[f"{name}/loss"], err_msg=name)
        close(grad, np.where(mask, trl[f"{name}/grad"], 0), err_msg=name)  # TRL's padding is a constant
    assert {name.split("/")[0] for name in trl if name.endswith("/grad")} == {*PREFERENCES, *UNPAIRED}


UNPAIRED: dict[str, Callable] = {
    "kto": unpaired_losses.kto_loss,
    "apo_zero_unpaired": unpaired_losses.apo_zero_unpaired_loss,
}


def check_unpaired(trl: Record) -> None:
    """KTOTrainer's losses, gradients and metrics; the mismatched rows, of the baseline, are the rows themselves."""
    mask, desirable = jnp.asarray(trl["completion_mask"][:, 1:]), jnp.asarray(trl["label"])
    own, reference = jnp.asarray(trl["logprobs"]), jnp.asarray(trl["ref_logprobs"])
    reference = logprobs.sequence_logprobs(reference, mask)

    for name, function in UNPAIRED.items():

        def loss(tokens, name=name, function=function):
            sums = logprobs.sequence_logprobs(tokens, mask)
            baseline = {"baseline": unpaired_losses.kto_baseline(sums, reference, ())} if name == "kto" else {}
            return with_values(function)(sums, reference, desirable, **baseline, **UNPAIRED_WEIGHTS, beta=BETA, axes=())

        (value, metrics), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(own)
        close(value, trl[f"{name}/loss"], err_msg=name)
        close(grad, np.where(mask, trl[f"{name}/grad"], 0), err_msg=name)
        for key, number in metrics.items():
            close(number, trl[f"{name}/{key}"], err_msg=f"{name} {key}")


CHECKS: dict[str, list[Callable[[Record], None]]] = {
    "dpo": [check_dpo],
    "sft": [check_sft],
    "reward": [check_reward],
    # With the coefficient of tests/parity/trl_1_16.py.
    "centered_reward": [functools.partial(check_centered_reward, center_rewards_coefficient=0.2)],
    "preferences": [check_preferences, check_unpaired],
    "online": ONLINE_CHECKS,
    # With the settings of tests/parity/trl_1_12.py.
    "ppo": [
        functools.partial(check_rewards, kl_coef=0.3),
        functools.partial(check_gae, gamma=0.95, gae_lambda=0.9),
        check_whitening,
        functools.partial(check_policy_loss, clip_ratio=0.2),
        functools.partial(check_value_loss, clip_range=0.3, value_coef=0.7),
    ],
}
