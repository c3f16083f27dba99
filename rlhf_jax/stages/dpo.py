"""dpo: tunes a policy on preferences without a reward model (Rafailov et al. 2023, arXiv:2305.18290)."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rlhf_jax.config import ModelSource, StageName
from rlhf_jax.core import masking
from rlhf_jax.core.preference_losses import dpo_loss
from rlhf_jax.data import pipeline
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.loop import Evaluation, LoopConfig, Task, train
from rlhf_jax.runtime.optimizers import OptimizerConfig, gradients, learning_rate, make_optimizer, update
from rlhf_jax.runtime.programs import Step
from rlhf_jax.sampling.batches import pair_logprobs_all
from rlhf_jax.stages.context import Context, steps_for
from rlhf_jax.stages.models import AS_IT_IS, Tuning, save_policy_spec
from rlhf_jax.stages.preferences import load_preferences
from rlhf_jax.stages.samples import policy_samples
from rlhf_jax.stages.training import adapted_network, begin, dropout_keys, whole
from rlhf_jax.types import PreferenceBatch


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """The policy that is start and reference, the pairs, and beta, the strength of the pull to the reference."""

    kind: Literal["dpo"]
    policy: ModelSource
    preferences: StageName | None  # None: the experiment's own data
    beta: float
    optimizer: OptimizerConfig
    batch_size: int
    epochs: float
    sample_prompts: int  # evaluation prompts continued at every evaluation
    eval_every: int  # steps
    loop: LoopConfig
    tuning: Tuning = AS_IT_IS


def run(config: DPOConfig, context: Context) -> dict[str, Any]:
    """Trains on the training pairs; evaluates loss and accuracy on the held-out pairs."""
    reference = context.policy(config.policy, config.tuning)
    lora, tokenizer = config.tuning.lora, reference.tokenizer
    network = adapted_network(reference.network, lora)
    reference = reference._replace(network=network)
    seeds = range(context.seed, context.seed + 1)
    save_policy_spec(context.directory, reference, seeds, base=config.policy if lora else None)
    rows, held_out = load_preferences(context, config.preferences)
    data, eval_data = (pipeline.preferences(table, tokenizer, context.data) for table in (rows, held_out))
    eval_prompts = pipeline.prompts(pipeline.load_rows(context.data, "eval"), tokenizer, context.data)
    batches = pipeline.shuffled_batches(data, config.batch_size, context.seed)
    steps = steps_for(config.epochs, len(rows), config.batch_size, config.loop.steps_per_call)

    placement = context.placement()
    params = {"policy": begin(network, reference.params, context.key()).trained}
    frozen = {"reference": reference.params, "beta": jnp.float32(config.beta)}

    def evaluation(trained: PyTree) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        policy = reference._replace(params=whole(network, trained["policy"], frozen, "reference"))
        rows = context.runtime.inference_batch
        metrics = evaluate(network, policy.params, reference.params, eval_data, config.beta, rows)
        return metrics, policy_samples(policy, eval_prompts, config.sample_prompts, context)

    task = Task(
        step=make_step(network, config.optimizer, steps, placement.axes),
        state=TrainState(jnp.int32(0), params, make_optimizer(config.optimizer, steps).init(params)),
        frozen=frozen,
        batch_at=batches.__getitem__,
        run_key=context.key(),
        total_steps=steps,
        key_figures=("loss", "rewards/accuracies", "rewards/margins"),
        evaluation=Evaluation(config.eval_every, evaluation),
        describe=lambda step, samples: [],
    )
    train(task, config.loop, placement, context.seed, context.directory, context.bar)
    return {"train_pairs": len(rows), "eval_pairs": len(held_out), "steps": steps}


@functools.lru_cache
def make_step(network: PolicyNetwork, config: OptimizerConfig, steps: int, axes: tuple[str, ...]) -> Step:
    """One update on a PreferenceBatch. `frozen` holds the reference, which is an adapter's base, and beta.

    Beta is data, so that runs which differ in it alone share one compiled program.
    """
    optimizer, schedule = make_optimizer(config, steps), learning_rate(config, steps)

    def step(state: TrainState, frozen: dict[str, Any], batch: PreferenceBatch, run_key: jax.Array) -> tuple:
        def loss_fn(params: PyTree, given: tuple) -> tuple[jax.Array, dict[str, jax.Array]]:
            rows, keys = given
            reference = network.pair_logprobs(frozen["reference"], rows)
            policy = whole(network, params["policy"], frozen, "reference")
            own = network.pair_logprobs(policy, rows, dropout_keys=keys)
            return dpo_loss(*own, *reference, beta=frozen["beta"], axes=axes)

        keys = dropout_keys(network, run_key, state.step, len(batch.prompt), axes)
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
    network: PolicyNetwork, params: PyTree, ref_params: PyTree, data: PreferenceBatch, beta: float, batch_size: int
) -> dict[str, float]:
    """Loss and implicit rewards on held-out pairs, under `eval/`."""
    own = pair_logprobs_all(network, params, data, batch_size)
    reference = pair_logprobs_all(network, ref_params, data, batch_size)
    loss, metrics = dpo_loss(*map(jnp.asarray, own + reference), beta=beta, axes=())
    return {"eval/loss": float(loss)} | {f"eval/{name}": float(value) for name, value in metrics.items()}
