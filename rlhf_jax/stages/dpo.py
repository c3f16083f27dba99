"""dpo: tunes a policy on preferences without a reward model (Rafailov et al. 2023, arXiv:2305.18290)."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from rlhf_jax.config import Count, CountOrZero, ModelSource, NonNegative, Positive, StageName, check_ranges
from rlhf_jax.core import masking
from rlhf_jax.core.metrics import Metric, values
from rlhf_jax.data import pipeline
from rlhf_jax.data.lengths import answer_pairs
from rlhf_jax.loading.context import Context, steps_for
from rlhf_jax.loading.data_report import report_answers
from rlhf_jax.loading.models import NO_CHANGES, Tuning, refuse_float16
from rlhf_jax.loading.samples import policy_samples
from rlhf_jax.loading.tables import load_preferences
from rlhf_jax.loading.trainable import begin_policy, dropout_keys, full_params, init_trainable, over_seeds
from rlhf_jax.methods.preference import (
    PairStats,
    PreferenceLossConfig,
    check_micro_batch,
    join,
    pair_stats,
    preference_loss,
    tokens_per_pair,
)
from rlhf_jax.methods.reference import (
    ReferencedBatch,
    ReferenceUpdate,
    precomputed_ref_logps,
    stats_all,
    sync_reference,
)
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.loop import Evaluation, LoopConfig, Task, train
from rlhf_jax.runtime.optimizers import OptimizerConfig, gradients, learning_rate, make_optimizer, update
from rlhf_jax.runtime.programs import Step
from rlhf_jax.runtime.rounding import update_key
from rlhf_jax.types import PreferenceBatch

SIGMOID = PreferenceLossConfig()
Batch = PreferenceBatch | ReferencedBatch


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """The policy that is start and reference, the pairs, and beta, the strength of the pull to the reference."""

    kind: Literal["dpo"]
    policy: ModelSource  # policy to start from, and the reference
    preferences: StageName | None  # stage that made the preferences; None: the experiment's data
    beta: Positive  # strength of the pull to the reference
    optimizer: OptimizerConfig
    batch_size: Count  # pairs in an update
    epochs: Positive  # passes over the pairs
    sample_prompts: CountOrZero  # evaluation prompts continued at every evaluation
    eval_every: Count  # steps between evaluations
    loop: LoopConfig
    tuning: Tuning = NO_CHANGES
    loss: PreferenceLossConfig = SIGMOID
    # Move the reference towards the policy (TR-DPO); None: a fixed reference.
    reference_update: ReferenceUpdate | None = None
    sample_temperature: NonNegative = 1.0  # temperature of these continuations; 0 is greedy
    cached_reference: bool = False  # compute the reference's log-probabilities once, and keep them on disk

    def __post_init__(self) -> None:
        refuse_float16(self.tuning, adapter=self.tuning.lora is not None)
        check_ranges(self)
        check_micro_batch(self.loss, self.optimizer.micro_batch)
        for name in ("reference_update", "cached_reference"):
            if getattr(self, name) and not self.loss.needs_reference:
                raise ValueError(f"{name} is not read by {', '.join(self.loss.losses)}, which have no reference")
        if self.reference_update and self.cached_reference:
            raise ValueError("cached_reference keeps what a reference says, which reference_update changes: drop one")


def run(config: DPOConfig, context: Context) -> dict[str, Any]:
    """Trains `context.seeds` policies at once, each on its own order of the pairs; evaluates on the held-out pairs."""
    reference, lora = begin_policy(config.policy, config.tuning, context), config.tuning.lora
    network, tokenizer = reference.network, reference.tokenizer
    rows, held_out = load_preferences(context, config.preferences)
    data, eval_data = (pipeline.preferences(table, tokenizer, context.data) for table in (rows, held_out))
    eval_prompts = pipeline.prompts(pipeline.load_rows(context.data, "eval"), tokenizer, context.data)
    report_answers(context, tokenizer, {"train": answer_pairs(rows), "eval": answer_pairs(held_out)})
    eval_theirs = None
    if config.cached_reference:
        of_reference = functools.partial(precomputed_ref_logps, config.loss, network, reference.params)
        theirs, eval_theirs = (of_reference(pairs, context.runtime.inference_batch) for pairs in (data, eval_data))
        data = ReferencedBatch(*data, theirs.chosen, theirs.rejected)
    elif config.loss.needs_reference and config.reference_update is None:
        eval_theirs = stats_all(config.loss, network, reference.params, eval_data, context.runtime.inference_batch)
    steps = steps_for(config.epochs, len(rows), config.batch_size, config.loop.steps_per_call)

    def start(key: PRNGKeyArray) -> TrainState:
        params = {"policy": init_trainable(network, reference.params, key).trained}
        opt_state = make_optimizer(config.optimizer, steps).init(params)
        following = {"reference": params["policy"]} if config.reference_update else {}
        return TrainState(jnp.int32(0), params | following, opt_state)

    placement = context.placement(context.seeds)
    runs = over_seeds(context, start, lambda seed: pipeline.shuffled_batches(data, config.batch_size, seed))
    frozen = {"beta": jnp.float32(config.beta)}
    if lora or (config.loss.needs_reference and not (config.cached_reference or config.reference_update)):
        frozen["reference"] = reference.params

    def evaluation(trained: PyTree) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        policy = reference._replace(params=full_params(network, trained["policy"], frozen, "reference"))
        of_pairs = functools.partial(stats_all, config.loss, network)
        rows = context.runtime.inference_batch
        theirs = eval_theirs
        if config.reference_update:
            theirs = of_pairs(full_params(network, trained["reference"], frozen, "reference"), eval_data, rows)
        metrics = evaluate(config.loss, of_pairs(policy.params, eval_data, rows), theirs, eval_data, config.beta)
        return metrics, policy_samples(policy, eval_prompts, config.sample_prompts, context, config.sample_temperature)

    task = Task(
        step=make_step(network, config.optimizer, steps, placement.axes, config.loss, config.reference_update),
        state=runs.state,
        frozen=frozen,
        batch_at=runs.batch_at,
        run_key=runs.run_key,
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
    reference_update: ReferenceUpdate | None = None,
) -> Step:
    """One update on a PreferenceBatch. `frozen` holds beta and the reference, which is an adapter's base.

    A reference that follows stands in the state's parameters instead, as another adapter of the same base where the
    policy is one; what a reference says of a ReferencedBatch stands in the batch. Beta is data, so that runs which
    differ in it alone share one compiled program.
    """
    optimizer, schedule = make_optimizer(config, steps), learning_rate(config, steps)

    def step(state: TrainState, frozen: dict[str, Any], batch: Batch, run_key: jax.Array) -> tuple:
        def of_reference(rows: Batch, pairs: PreferenceBatch) -> PairStats | None:
            if not loss_config.needs_reference:
                return None
            if isinstance(rows, ReferencedBatch):
                return PairStats(rows.ref_chosen, rows.ref_rejected)
            if reference_update:
                params = full_params(network, state.params["reference"], frozen, "reference")
            else:
                params = frozen["reference"]
            return pair_stats(loss_config, network, params, pairs)

        def loss_fn(params: PyTree, given: tuple) -> tuple[jax.Array, dict[str, Metric]]:
            rows, keys = given
            pairs = PreferenceBatch(*rows[:6])
            policy = full_params(network, params["policy"], frozen, "reference")
            both = join(pair_stats(loss_config, network, policy, pairs, keys), of_reference(rows, pairs), pairs)
            return preference_loss(loss_config, both, beta=frozen["beta"], axes=axes, tokens_per_pair=per_pair)

        per_pair = tokens_per_pair(batch.chosen_mask, axes)
        keys = dropout_keys(network, run_key, state.step, len(batch.prompt), axes)
        trained = {"policy": state.params["policy"]}
        loss, metrics, grads = gradients(
            config, loss_fn, trained, (batch, keys), lambda given: masking.rows(given[0].prompt, axes), axes
        )
        key = update_key(run_key, state.step)
        params, opt_state, norms = update(optimizer, grads, trained, state.opt_state, axes, key=key)
        if reference_update:
            reference = sync_reference(reference_update, state.params["reference"], params["policy"], state.step + 1)
            params = {**params, "reference": reference}
        logged = values(metrics) | {
            "loss": loss,
            **norms,
            "learning_rate": schedule(state.step),
            "num_tokens": masking.count(batch.chosen_mask, axes) + masking.count(batch.rejected_mask, axes),
        }
        return TrainState(state.step + 1, params, opt_state), logged, ()

    return step


def evaluate(
    config: PreferenceLossConfig, own: PairStats, reference: PairStats | None, data: PreferenceBatch, beta: float
) -> dict[str, float]:
    """Loss and implicit rewards on all held-out pairs at once, under `eval/`."""
    own, reference, data = jax.tree.map(jnp.asarray, (own, reference, data))
    loss, metrics = preference_loss(config, join(own, reference, data), beta=beta, axes=())
    return {"eval/loss": float(loss)} | {f"eval/{name}": float(value) for name, value in values(metrics).items()}
