"""Our group methods against what TRL's GRPOTrainer and RLOOTrainer computed: advantages, losses and gradients."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.core import advantages, kl, policy_losses
from rlhf_jax.core.policy_losses import AGGREGATIONS, POLICY_LOSSES
from rlhf_jax.stages.group_rl import METHODS

close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


def check_group_advantages(trl: Mapping[str, np.ndarray], num_generations: int, kl_coef: float) -> None:
    """Of responses that the trainers sampled and scored; RLOO's have the penalty in their rewards."""
    for name in ("grpo", "dr_grpo", "rloo"):
        found = {key.split("/")[1]: jnp.asarray(trl[key]) for key in trl if key.startswith(f"{name}_sampled/")}
        mask, in_reward = found["mask"], METHODS[name]["kl_in"] == "reward"
        divergence = kl.k1(found["logprobs"], found["ref_logprobs"]) if in_reward else jnp.zeros(mask.shape)
        assert not in_reward or abs(np.asarray(divergence)[np.asarray(mask)]).max() > 0.05
        rewards = advantages.token_rewards(found["scores"], divergence, mask, kl_coef=kl_coef)
        function = advantages.CRITIC_FREE[METHODS[name]["advantage"]]
        ours = function(rewards, mask, num_generations=num_generations, axes=())
        close(ours, np.where(mask, trl[f"{name}_sampled/advantages"][:, None], 0), err_msg=name)


def check_group_losses(
    trl: Mapping[str, np.ndarray], clip_ratio: float, clip_ratio_high: float, kl_coef: float, max_tokens: int
) -> None:
    """Every method's loss, with the aggregation that it has here; all but RLOO's have k3 beside it."""
    mask, bounds = jnp.asarray(trl["mask"]), {"clip_ratio": clip_ratio, "clip_ratio_high": clip_ratio_high}
    old, reference = jnp.asarray(trl["old"]), jnp.asarray(trl["ref_logprobs"])
    each = jnp.where(mask, jnp.asarray(trl["token_advantages"])[:, None], 0)

    def loss(logprobs, name):
        function, reads = POLICY_LOSSES[METHODS[name]["policy_loss"]]
        tokens = function(logprobs, old, each, mask, **{bound: bounds[bound] for bound in reads})
        aggregate = AGGREGATIONS[METHODS[name]["aggregation"]][0]
        penalty = 0 if name == "rloo" else kl_coef * kl.k3(logprobs, reference)
        clipped = policy_losses.ratio_metrics(logprobs, old, tokens.clipped, mask, ())["policy/clipfrac_avg"]
        return aggregate(tokens.losses + penalty, mask, max_tokens=max_tokens, axes=()), clipped

    @jax.jit  # one program for all of them
    def everything(logprobs):
        return {name: jax.value_and_grad(loss, has_aux=True)(logprobs, name) for name in NAMES}

    for name, ((value, clipped), grad) in everything(jnp.asarray(trl["logprobs"])).items():
        close(value, trl[f"{name}/loss"], err_msg=name)
        close(grad, trl[f"{name}/grad"], err_msg=name)
        assert clipped > 0 or name not in ("grpo", "dapo")  # whole responses reach a bound less often
    assert {name.split("/")[0] for name in trl if name.endswith("/grad")} == set(NAMES)


NAMES = ("rloo", "grpo", "dr_grpo", "dapo", "gspo", "cispo")

# With the settings of tests/parity/trl_1_16_online.py.
ONLINE_CHECKS = [
    functools.partial(check_group_advantages, num_generations=4, kl_coef=0.2),
    functools.partial(check_group_losses, clip_ratio=0.1, clip_ratio_high=0.3, kl_coef=0.2, max_tokens=6),
]
