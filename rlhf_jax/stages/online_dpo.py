"""online_dpo: preference optimisation on the policy's own pairs, which are labelled as they are sampled.

Guo et al. 2024 (OAIF, arXiv:2402.04792): two responses are sampled to each prompt, the one with the higher score is
chosen over the other, and a preference loss takes a step. The annotator is a reward model, as in TRL's
OnlineDPOTrainer, or a judge, as in the paper a language model. Any loss of the `dpo` stage can be taken.

The iteration is that of `methods/policy_gradient.py`, with the pairs of `methods/online_pairs.py`.
"""

import dataclasses
from typing import Any, Literal

from jaxtyping import PRNGKeyArray

from rlhf_jax.config import Positive, StageName
from rlhf_jax.core.kl import ESTIMATORS
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.models import RewardModel
from rlhf_jax.loading.trainable import init_trainable
from rlhf_jax.methods.dpo import SIGMOID, ReferencedBatch
from rlhf_jax.methods.online import HostReward, place_reward, read_inputs, train_online
from rlhf_jax.methods.online_config import OnlineConfig
from rlhf_jax.methods.online_pairs import PairLearner
from rlhf_jax.methods.policy_method import OnlineMethod
from rlhf_jax.methods.policy_parts import Params, Shaping
from rlhf_jax.methods.preference_table import PreferenceLossConfig, check_micro_batch
from rlhf_jax.rewards.http_judge import HTTPJudge, HTTPJudgeConfig
from rlhf_jax.rewards.judging import load_judge, make_http_judge, pair_scorer
from rlhf_jax.rewards.sources import Reward, RewardSource, find_reward
from rlhf_jax.rewards.tfidf import TfidfJudge


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(OnlineConfig):
    """The reward model or else the judge, and the loss. Losses read the policy as it is, whatever the temperature."""

    kind: Literal["online_dpo"]
    reward_model: RewardSource | None  # reward that chooses between two responses; None: the judge
    beta: Positive  # strength of the regularisation towards the reference
    loss: PreferenceLossConfig = SIGMOID
    # Gold stage, or judge over HTTP, that chooses; None: the reward model.
    judge: StageName | HTTPJudgeConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.judge is None) == (self.reward_model is None):
            raise ValueError(
                f"judge = {self.judge!r} and reward_model = {self.reward_model!r}: exactly one of them chooses, "
                "and the other is None"
            )
        check_micro_batch(self.loss, self.optimizer.micro_batch)


def method_of(config: OnlineDPOConfig) -> OnlineMethod[ReferencedBatch]:
    """Resolve a config into a method: groups of two responses, of which pairs are made."""
    return OnlineMethod(
        learner=PairLearner(config.loss, config.beta),
        kl_coef=config.beta,
        kl_estimator=ESTIMATORS["k1"],
        shaping=Shaping(missing_eos_penalty=config.missing_eos_penalty),
        num_generations=2,
    )


def find_annotator(config: OnlineDPOConfig, context: Context) -> RewardModel | Reward | TfidfJudge | HTTPJudge:
    """Find what chooses between two responses."""
    if config.reward_model is not None:
        return find_reward(context, config.reward_model)
    if isinstance(config.judge, HTTPJudgeConfig):
        return make_http_judge(config.judge)
    return load_judge(context, str(config.judge))


def run(config: OnlineDPOConfig, context: Context) -> dict[str, Any]:
    """Train `context.seeds` policies at once, each with its own prompts, samples and initial key."""
    inputs, annotator = read_inputs(config, context), find_annotator(config, context)
    if isinstance(annotator, (TfidfJudge, HTTPJudge)):
        reward = HostReward(pair_scorer(annotator, inputs.reference.tokenizer))
    else:
        reward = place_reward(annotator, inputs, context)

    def init_params(key: PRNGKeyArray) -> Params:
        return {"policy": init_trainable(inputs.reference.network, inputs.reference.params, key).trained}

    summary = train_online(
        config,
        method_of(config),
        context,
        inputs,
        reward,
        prompts_each=config.batch_size,
        value=None,
        init_params=init_params,
        frozen={},
        key_figures=("objective/scores", "objective/kl", "rewards/accuracies"),
    )
    pairs = config.iterations * config.batch_size
    return {**summary, "pairs": pairs, **(annotator.summary() if isinstance(annotator, HTTPJudge) else {})}
