"""Training of PPO and the group methods: load the reward, make the value function, and run the iterations."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import PRNGKeyArray, PyTree

from rlhf_jax.core.keys import derive
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.trainable import init_trainable, trainable
from rlhf_jax.methods.online import DeviceReward, Inputs, place_reward, read_inputs, train_online
from rlhf_jax.methods.policy_config import PolicyGradientConfig
from rlhf_jax.methods.policy_method import OnlineMethod
from rlhf_jax.methods.policy_parts import Experience, Params, ValueNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.rewards.sources import find_reward
from rlhf_jax.types import Json


class ValueStart(NamedTuple):
    """A value function before the first iteration, without its adapter."""

    network: ValueNetwork
    params: PyTree


StartValue = Callable[[Policy, RewardModel | None, PRNGKeyArray], ValueStart]


def no_value(policy: Policy, reward_model: RewardModel | None, key: PRNGKeyArray) -> ValueStart:
    """Return no value function."""
    del policy, reward_model, key
    return ValueStart(None, None)


def without_params(inputs: Inputs) -> Inputs:
    """Drop the initial policy's parameters, so that they are freed when nothing else holds them."""
    return inputs._replace(reference=inputs.reference._replace(params=None))


def train_policy(
    config: PolicyGradientConfig, method: OnlineMethod[Experience], start_value: StartValue, context: Context
) -> dict[str, Json]:
    """Train `context.seeds` policies, each with its own value function from `start_value`. Returns the summary."""
    inputs = read_inputs(config, context)
    reward = place_reward(find_reward(context, config.reward_model), without_params(inputs), context)
    reward_model = reward.model.members()[0] if isinstance(reward, DeviceReward) else None
    first_key = derive(context.key("init"), "value")
    network, value_base = start_value(inputs.reference, reward_model, first_key)
    policy, frozen = inputs.reference.network, {}
    if isinstance(network, ScalarNetwork):
        network = trainable(network, config.tuning)
        frozen["value_base"] = value_base if config.tuning.lora else None
    del value_base
    kept = inputs.reference if method.measures_kl or config.tuning.lora else None
    inputs = inputs if kept else without_params(inputs)

    def init_params(key: PRNGKeyArray) -> Params:
        start = kept or context.policy(config.policy, config.tuning)
        adapter_key, value_key, value_adapter_key = (derive(key, tag) for tag in ("adapter", "value", "value adapter"))
        params = {"policy": init_trainable(policy, start.params, adapter_key).trained}
        own = start_value(start, reward_model, value_key if len(context.runs) > 1 else first_key).params
        if isinstance(network, ScalarNetwork):
            params["value"] = init_trainable(network, own, value_adapter_key).trained
        elif network == "shared":
            params["value"] = own
        return params

    summary = train_online(
        config,
        method,
        context,
        inputs,
        reward,
        prompts_each=config.batch_size // method.num_generations,
        value=network,
        init_params=init_params,
        frozen=frozen,
        key_figures=("objective/scores", "objective/kl", "val/num_eos_tokens"),
    )
    return {**summary, "episodes": config.iterations * config.batch_size}
