"""online_dpo: preference optimisation on pairs of the policy's own samples, labelled during training.

Guo et al. 2024 (OAIF, arXiv:2402.04792): sample two responses to each prompt, choose the one with the higher score, and
update the policy with a preference loss. The annotator is a reward model, as in TRL's OnlineDPOTrainer, or a judge; in
the paper it is a language model. Any loss of the `dpo` stage can be used.

The iteration is in `methods/policy_gradient.py`, its pairs and loss in `methods/online_pairs.py`.
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
from rlhf_jax.rewards.gold_judges import load_judge
from rlhf_jax.rewards.http_judge import HTTPJudge, HTTPJudgeConfig
from rlhf_jax.rewards.judging import make_http_judge, pair_scorer
from rlhf_jax.rewards.sources import Reward, RewardSource, find_reward
from rlhf_jax.rewards.tfidf import TfidfJudge


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(OnlineConfig):
    """The annotator (reward model or judge) and the loss, whose log-probabilities are at temperature 1."""

    kind: Literal["online_dpo"]
    reward_model: RewardSource | None  # reward that chooses between two responses; None: the judge
    beta: Positive  # strength of the regularisation towards the reference
    loss: PreferenceLossConfig = SIGMOID
    # Gold stage or judge over HTTP that labels pairs; None: the reward model.
    judge: StageName | HTTPJudgeConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.judge is None) == (self.reward_model is None):
            raise ValueError(
                f"judge = {self.judge!r} and reward_model = {self.reward_model!r}: exactly one of them labels "
                "pairs, and the other is None"
            )
        check_micro_batch(self.loss, self.optimizer.micro_batch)


def build_method(config: OnlineDPOConfig) -> OnlineMethod[ReferencedBatch]:
    """Make the method from a config: two responses per prompt, which form a pair."""
    return OnlineMethod(
        learner=PairLearner(config.loss, config.beta),
        kl_coef=config.beta,
        kl_estimator=ESTIMATORS["k1"],
        shaping=Shaping(missing_eos_penalty=config.missing_eos_penalty),
        num_generations=2,
    )


def find_annotator(config: OnlineDPOConfig, context: Context) -> RewardModel | Reward | TfidfJudge | HTTPJudge:
    """Load the reward or judge that labels pairs."""
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
        build_method(config),
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
