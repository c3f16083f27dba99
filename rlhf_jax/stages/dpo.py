"""dpo: tunes a policy on preferences without a reward model (Rafailov et al. 2023, arXiv:2305.18290)."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rlhf_jax.config import ModelSource, StageName
from rlhf_jax.core import masking
from rlhf_jax.data import pipeline
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.loop import Evaluation, LoopConfig, Task, train
from rlhf_jax.runtime.optimizers import OptimizerConfig, gradients, learning_rate, make_optimizer, update
from rlhf_jax.runtime.programs import Step
from rlhf_jax.sampling.batches import map_batches
from rlhf_jax.stages.context import Context, steps_for
from rlhf_jax.stages.models import AS_IT_IS, Tuning, save_policy_spec
from rlhf_jax.stages.preference_loss import (
    PairStats,
    PreferenceLossConfig,
    check_micro_batch,
    join,
    pair_stats,
    preference_loss,
    tokens_per_pair,
)
from rlhf_jax.stages.preferences import load_preferences
from rlhf_jax.stages.samples import policy_samples
from rlhf_jax.stages.training import adapted_network, begin, dropout_keys, whole
from rlhf_jax.types import PreferenceBatch

SIGMOID = PreferenceLossConfig()


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
    loss: PreferenceLossConfig = SIGMOID

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"beta = {self.beta} must be above 0")
        check_micro_batch(self.loss, self.optimizer.micro_batch)


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
    frozen = {"beta": jnp.float32(config.beta)}
    needs_reference = config.loss.needs_reference
    if lora or needs_reference:
        frozen["reference"] = reference.params

    def evaluation(trained: PyTree) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        policy = reference._replace(params=whole(network, trained["policy"], frozen, "reference"))
        rows = context.runtime.inference_batch
        own = stats_all(config.loss, network, policy.params, eval_data, rows)
        theirs = stats_all(config.loss, network, reference.params, eval_data, rows) if needs_reference else None
        metrics = evaluate(config.loss, own, theirs, eval_data, config.beta)
        return metrics, policy_samples(policy, eval_prompts, config.sample_prompts, context)

    task = Task(
        step=make_step(network, config.optimizer, steps, placement.axes, config.loss),
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
def make_step(
    network: PolicyNetwork,
    config: OptimizerConfig,
    steps: int,
    axes: tuple[str, ...],
    loss_config: PreferenceLossConfig = SIGMOID,
) -> Step:
    """One update on a PreferenceBatch. `frozen` holds beta and the reference, which is an adapter's base.

    Losses that need no reference read it as an adapter's base only.

    Beta is data, so that runs which differ in it alone share one compiled program.
    """
    optimizer, schedule = make_optimizer(config, steps), learning_rate(config, steps)

    def step(state: TrainState, frozen: dict[str, Any], batch: PreferenceBatch, run_key: jax.Array) -> tuple:
        def loss_fn(params: PyTree, given: tuple) -> tuple[jax.Array, dict[str, jax.Array]]:
            rows, keys = given
            reference = None
            if loss_config.needs_reference:
                reference = pair_stats(loss_config, network, frozen["reference"], rows)
            policy = whole(network, params["policy"], frozen, "reference")
            own = pair_stats(loss_config, network, policy, rows, keys)
            pairs = join(own, reference, rows)
            return preference_loss(loss_config, pairs, beta=frozen["beta"], axes=axes, tokens_per_pair=per_pair)

        per_pair = tokens_per_pair(batch, axes)
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
    config: PreferenceLossConfig, own: PairStats, reference: PairStats | None, data: PreferenceBatch, beta: float
) -> dict[str, float]:
    """Loss and implicit rewards on all held-out pairs at once, under `eval/`."""
    own, reference, data = jax.tree.map(jnp.asarray, (own, reference, data))
    loss, metrics = preference_loss(config, join(own, reference, data), beta=beta, axes=())
    return {"eval/loss": float(loss)} | {f"eval/{name}": float(value) for name, value in metrics.items()}


def stats_all(
    config: PreferenceLossConfig, network: PolicyNetwork, params: PyTree, data: PreferenceBatch, batch_size: int
) -> PairStats:
    """`pair_stats` of any number of pairs, in NumPy."""
    return map_batches(lambda batch: _stats(config, network, params, batch), data, batch_size)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _stats(config, network, params, batch):
    return pair_stats(config, network, params, batch)
