"""Our group methods against what TRL's GRPOTrainer and RLOOTrainer computed: advantages, losses and gradients."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core import advantages, importance, kl
from rlhf_jax.stages import group_rl
from tests.support import tiny

close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)

ADVANTAGES = ("grpo", "grpo_batch_std", "dr_grpo", "rloo", "rloo_normalized")


def check_group_advantages(trl: Mapping[str, np.ndarray], num_generations: int, kl_coef: float) -> None:
    """Recompute losses on responses that the trainers sampled and scored; RLOO's rewards include the penalty."""
    for name in ADVANTAGES:
        found = {key.split("/")[1]: jnp.asarray(trl[key]) for key in trl if key.startswith(f"{name}_sampled/")}
        mask, in_reward = found["mask"], name.startswith("rloo")
        divergence = kl.k1(found["logprobs"], found["ref_logprobs"]) if in_reward else jnp.zeros(mask.shape)
        assert not in_reward or abs(np.asarray(divergence)[np.asarray(mask)]).max() > 0.05
        rewards = advantages.token_rewards(found["scores"], divergence, mask, kl_coef=kl_coef)
        ours = advantages.CRITIC_FREE[name].function(rewards, mask, num_generations=num_generations, axes=())
        close(ours, np.where(mask, trl[f"{name}_sampled/advantages"][:, None], 0), err_msg=name)


def check_importance_weights(trl: Mapping[str, np.ndarray], cap: float, floor: float) -> None:
    """Every mode's weights of one rollout, whose sampler is up to 0.3 nats or so off."""
    mask = jnp.asarray(trl["importance/mask"])
    logprobs, sampler = (jnp.asarray(trl[f"importance/{name}"]) for name in ("logprobs", "sampler_logprobs"))
    for name, weigh in importance.WEIGHTS.items():
        ours = np.where(mask, weigh(logprobs, sampler, mask, cap=cap, floor=floor), 0)
        close(ours, trl[f"importance/{name}"], err_msg=name)
        inside = ours[np.asarray(mask)]
        reached = {floor, cap} if name.endswith("truncate") else {0.0}
        assert any(np.isclose(inside, bound).any() for bound in reached), name


# TRL's loss -> our method, and its fields that are set.
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo")},
    "sapo": ("sapo", {"sapo_temperature_pos": 0.9, "sapo_temperature_neg": 1.4}),
    "grpo, k3_weighted": ("grpo", {"kl_estimator": "k3_weighted"}),
    "grpo, dual_clip": ("grpo", {"dual_clip": 1.35}),
    "grpo, weights": ("grpo", {}),
}


def check_group_losses(
    trl: Mapping[str, np.ndarray],
    clip_ratio: float,
    clip_ratio_high: float,
    dual_clip: float,
    kl_coef: float,
    max_tokens: int,
) -> None:
    """Every method's loss of a minibatch, by the function that trains; all but RLOO's have k3 in it."""
    mask = jnp.asarray(trl["mask"])
    batch = {
        "logprobs": jnp.asarray(trl["old"]),
        "advantages": jnp.where(mask, jnp.asarray(trl["token_advantages"])[:, None], 0),
        "loss_mask": mask,
    }
    assert mask.shape[1] == max_tokens and LOSSES["grpo, dual_clip"][1] == {"dual_clip": dual_clip}

    def loss(logprobs, name):
        method, changes = LOSSES[name]
        every = {"clip_ratio": clip_ratio, "clip_ratio_high": clip_ratio_high}
        bounds = {option: value for option, value in every.items() if option in group_rl.METHODS[method]}
        config = tiny.group_config(method, **bounds, **changes, kl_coef=kl_coef)
        rows = dict(batch)
        if method != "rloo":
            rows["ref_logprobs"] = jnp.asarray(trl["ref_logprobs"])
        if name == "grpo, weights":
            rows["weights"] = jnp.asarray(trl["weights"])
        return tiny.given_loss(config, logprobs, rows)

    at = {name: trl["far_logprobs" if name == "grpo, dual_clip" else "logprobs"] for name in LOSSES}

    @jax.jit  # one program for all of them
    def everything(at):
        return {name: jax.value_and_grad(loss, has_aux=True)(logprobs, name) for name, logprobs in at.items()}

    for name, ((value, metrics), grad) in everything(jax.tree.map(jnp.asarray, at)).items():
        close(value, trl[f"{name}/loss"], err_msg=name)
        close(grad, trl[f"{name}/grad"], err_msg=name)
        assert metrics["policy/clipfrac_avg"] > 0 or name not in ("grpo", "dapo")  # whole responses: less often
    assert {name.split("/")[0] for name in trl if name.endswith("/grad")} == set(LOSSES)
    for name in ("grpo, k3_weighted", "grpo, weights"):  # else they would say nothing
        assert np.abs(trl[f"{name}/grad"] - trl["grpo/grad"]).max() > 1e-3, name
    assert np.any(np.asarray(mask) & (trl["token_advantages"][:, None] < 0) & (trl["far_logprobs"] > trl["old"] + 0.31))


# With the settings of tests/parity/trl_1_16_online.py.
ONLINE_CHECKS = [
    functools.partial(check_group_advantages, num_generations=4, kl_coef=0.2),
    functools.partial(check_importance_weights, cap=1.25, floor=0.7),
    functools.partial(
        check_group_losses, clip_ratio=0.1, clip_ratio_high=0.3, dual_clip=1.35, kl_coef=0.2, max_tokens=6
    ),
]
