"""reward_model: learns a score from preferences, by the Bradley-Terry likelihood."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from rlhf_jax.config import ModelSource, StageName
from rlhf_jax.core import masking
from rlhf_jax.core.reward_losses import bradley_terry_loss
from rlhf_jax.data import pipeline
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.policy import both_responses
from rlhf_jax.models.scalars import Pooling, ScalarNetwork
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.loop import Evaluation, LoopConfig, Task, train
from rlhf_jax.runtime.optimizers import OptimizerConfig, gradients, learning_rate, make_optimizer, update
from rlhf_jax.runtime.programs import Step
from rlhf_jax.sampling.batches import score_all
from rlhf_jax.stages.context import Context, steps_for
from rlhf_jax.stages.models import Pretrained, RewardModel, as_reward_model, save_reward_spec
from rlhf_jax.stages.preferences import load_preferences
from rlhf_jax.stages.training import adapted_scalar, begin, dropout_keys, whole
from rlhf_jax.types import PreferenceBatch


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
    """The reward model: of its own shape and from scratch, or from a checkpoint or a stage of its own."""

    kind: Literal["reward_model"]
    policy: ModelSource | None  # whose tokenizer one from scratch reads
    preferences: StageName | None  # None: the experiment's own data
    model: ModelConfig | Pretrained  # of a language model, the body is taken
    pooling: Pooling
    optimizer: OptimizerConfig
    batch_size: int
    epochs: float
    eval_every: int  # steps
    loop: LoopConfig

    def __post_init__(self) -> None:
        if (self.policy is None) != isinstance(self.model, Pretrained):
            raise ValueError("policy names whose tokenizer a model from scratch reads; it is None with model.init")


def run(config: RewardModelConfig, context: Context) -> dict[str, Any]:
    """Trains on the training pairs; evaluates on the held-out pairs."""
    start = make_reward_model(config, context)
    tuning = config.model if isinstance(config.model, Pretrained) else None
    network = adapted_scalar(start.network, tuning.lora if tuning else None)
    trained, base = begin(network, start.params, context.key())
    save_reward_spec(
        context.directory, start._replace(network=network), base=tuning.init if tuning and tuning.lora else None
    )
    rows, held_out = load_preferences(context, config.preferences)
    data, eval_data = (pipeline.preferences(table, start.tokenizer, context.data) for table in (rows, held_out))
    batches = pipeline.shuffled_batches(data, config.batch_size, context.seed)
    steps = steps_for(config.epochs, len(rows), config.batch_size, config.loop.steps_per_call)

    placement = context.placement()
    params, frozen = {"reward": trained}, {"base": base}

    def evaluation(trained: PyTree) -> tuple[dict[str, float], list[dict[str, Any]]]:
        return evaluate(network, whole(network, trained["reward"], frozen, "base"), eval_data, held_out, context)

    task = Task(
        step=make_step(network, config.optimizer, steps, placement.axes),
        state=TrainState(jnp.int32(0), params, make_optimizer(config.optimizer, steps).init(params)),
        frozen=frozen,
        batch_at=batches.__getitem__,
        run_key=context.key(),
        total_steps=steps,
        key_figures=("loss", "accuracy", "eval/accuracy"),
        evaluation=Evaluation(config.eval_every, evaluation),
        describe=lambda step, samples: [],
    )
    train(task, config.loop, placement, context.seed, context.directory, context.bar)
    return {"train_pairs": len(rows), "eval_pairs": len(held_out), "steps": steps}


def make_reward_model(config: RewardModelConfig, context: Context) -> RewardModel:
    """The reward model before the first step."""
    if not isinstance(config.model, Pretrained):
        assert config.policy is not None
        policy = context.policy(config.policy)
        network = ScalarNetwork(config.model, policy.network.vocab_size, config.pooling)
        return RewardModel(network, network.init(context.key()), policy.tokenizer)
    found = context.model(config.model.init, config.model)
    start = found if isinstance(found, RewardModel) else as_reward_model(found, context.key())
    return start._replace(network=dataclasses.replace(start.network, pooling=config.pooling))


def make_step(network: ScalarNetwork, config: OptimizerConfig, steps: int, axes: tuple[str, ...]) -> Step:
    """One update on a PreferenceBatch."""
    optimizer, schedule = make_optimizer(config, steps), learning_rate(config, steps)

    def step(state: TrainState, frozen: Any, batch: PreferenceBatch, run_key: jax.Array) -> tuple:
        keys = dropout_keys(network, run_key, state.step, len(batch.prompt), axes)

        def loss_fn(params: PyTree, given: tuple) -> tuple[jax.Array, dict[str, jax.Array]]:
            rows, keys = given
            if keys is not None:  # another mask for each of the two
                keys = jax.vmap(jax.random.split, out_axes=1)(keys).reshape(-1)
            reward = whole(network, params["reward"], frozen, "base")
            scores = network.scores(reward, both_responses(rows), dropout_keys=keys)
            chosen, rejected = jnp.split(scores, 2)
            return bradley_terry_loss(chosen, rejected, axes=axes)

        loss, metrics, grads = gradients(
            config, loss_fn, state.params, (batch, keys), lambda given: masking.rows(given[0].prompt, axes), axes
        )
        params, opt_state, grad_norm = update(optimizer, grads, state.params, state.opt_state, axes)
        metrics |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state.step),
            "num_tokens": masking.count(batch.chosen_mask, axes) + masking.count(batch.rejected_mask, axes),
        }
        return TrainState(state.step + 1, params, opt_state), metrics, ()

    return step


def evaluate(
    network: ScalarNetwork,
    params: PyTree,
    data: PreferenceBatch,
    rows: list[dict[str, Any]],
    context: Context,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """`eval/accuracy` against the labels, `eval/judge_agreement` where there are a judge's scores, and some samples."""
    chosen, rejected = np.split(
        score_all(network, params, jax.tree.map(np.asarray, both_responses(data)), context.runtime.inference_batch), 2
    )
    metrics = {"eval/accuracy": _agreement(chosen - rejected, np.ones(len(chosen)))}
    if "chosen_score" in rows[0]:
        judged = np.array([row["chosen_score"] - row["rejected_score"] for row in rows])
        metrics["eval/judge_agreement"] = _agreement(chosen - rejected, judged)
    samples = [
        {
            "seed": context.seed,
            "prompt": _shown(rows[i]["prompt"]),
            "completion": _shown(rows[i][side]),
            "score": float(scores[i]),
            "kl": None,
            "length": int(mask[i].sum()),
        }
        for i in range(min(4, len(rows)))
        for side, scores, mask in (("chosen", chosen, data.chosen_mask), ("rejected", rejected, data.rejected_mask))
    ]
    return metrics, samples


def _shown(content: Any) -> str:
    """A text as it is, a chat with the roles before what they say."""
    if isinstance(content, str):
        return content
    return "\n".join(f"{message['role']}: {message['content']}" for message in content)


def _agreement(margins: np.ndarray, other: np.ndarray) -> float:
    """Share of pairs that two margins order alike; a tie in either counts half."""
    return float(np.mean(0.5 * (1 + np.sign(margins) * np.sign(other))))
