"""dpo: tunes a policy on preferences without a reward model (Rafailov et al. 2023, arXiv:2305.18290)."""

import dataclasses
import functools
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from rlhf_jax.config import Count, CountOrZero, ModelSource, NonNegative, Positive, StageName, check_ranges
from rlhf_jax.data import pipeline
from rlhf_jax.data.lengths import answer_pairs
from rlhf_jax.loading.context import Context, steps_for
from rlhf_jax.loading.data_report import report_answers
from rlhf_jax.loading.models import NO_CHANGES, Tuning, refuse_float16
from rlhf_jax.loading.samples import policy_samples
from rlhf_jax.loading.tables import load_preferences
from rlhf_jax.loading.trainable import begin_policy, full_params, init_trainable, over_seeds
from rlhf_jax.methods.dpo import SIGMOID, ReferencedBatch, ReferenceUpdate, evaluate, make_step, pair_logps_all
from rlhf_jax.methods.preference_table import PreferenceLossConfig, check_micro_batch
from rlhf_jax.methods.reference_cache import precomputed_ref_logps
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.loop import Evaluation, LoopConfig, Task, train
from rlhf_jax.runtime.optimizers import OptimizerConfig, make_optimizer


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
    sample_temperature: NonNegative = 1.0  # temperature of continuations at evaluations; 0 is greedy
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
    eval_reference = None
    if config.cached_reference:
        logps = functools.partial(precomputed_ref_logps, config.loss, network, reference.params)
        known, eval_reference = (logps(pairs, context.runtime.inference_batch) for pairs in (data, eval_data))
        data = ReferencedBatch(data, known)
    elif config.loss.needs_reference and config.reference_update is None:
        logps = functools.partial(pair_logps_all, config.loss, network, reference.params)
        eval_reference = logps(eval_data, context.runtime.inference_batch)
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
        logps, known = functools.partial(pair_logps_all, config.loss, network), eval_reference
        if config.reference_update:
            following = full_params(network, trained["reference"], frozen, "reference")
            known = logps(following, eval_data, context.runtime.inference_batch)
        own = logps(policy.params, eval_data, context.runtime.inference_batch)
        metrics = evaluate(config.loss, own, known, eval_data, config.beta)
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
