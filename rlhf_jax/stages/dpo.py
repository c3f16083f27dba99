"""dpo: fine-tune a policy on preferences without a reward model (Rafailov et al. 2023, arXiv:2305.18290)."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from rlhf_jax.config import CountOrZero, ModelSource, NonNegative, Positive, StageName
from rlhf_jax.data import pipeline
from rlhf_jax.data.batching import Buckets
from rlhf_jax.data.ragged import pair_table
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.data_report import report_answers
from rlhf_jax.loading.models import NO_CHANGES, Tuning, refuse_float16
from rlhf_jax.loading.samples import policy_samples
from rlhf_jax.loading.tables import evaluation_rows, load_preferences
from rlhf_jax.loading.trainable import full_params, init_trainable, load_initial_policy
from rlhf_jax.methods.dpo import SIGMOID, ReferencedBatch, ReferenceUpdate, evaluate, make_step, pair_logps_all
from rlhf_jax.methods.offline import OfflineConfig, OfflineMethod, Updates, train_offline
from rlhf_jax.methods.preference_table import PreferenceLossConfig, check_micro_batch
from rlhf_jax.methods.reference_cache import precomputed_ref_logps
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.loop import Rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig(OfflineConfig):
    """The policy, which is also the reference, the pairs, beta and the loss."""

    kind: Literal["dpo"]
    policy: ModelSource  # policy to start from, and the reference
    preferences: StageName | None  # stage that made the preferences; None: the experiment's data
    beta: Positive  # strength of the regularisation towards the reference
    sample_prompts: CountOrZero  # evaluation prompts continued at every evaluation
    tuning: Tuning = NO_CHANGES
    loss: PreferenceLossConfig = SIGMOID
    # Move the reference towards the policy (TR-DPO); None: a fixed reference.
    reference_update: ReferenceUpdate | None = None
    sample_temperature: NonNegative = 1.0  # temperature of continuations at evaluations; 0 is greedy
    cached_reference: bool = False  # compute the reference's log-probabilities once and cache them on disk

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_float16(self.tuning, adapter=self.tuning.lora is not None)
        check_micro_batch(self.loss, self.optimizer.micro_batch)
        for name in ("reference_update", "cached_reference"):
            if getattr(self, name) and not self.loss.needs_reference:
                raise ValueError(
                    f"{name} has no effect with {', '.join(self.loss.losses)}, which have no reference: leave it out"
                )
        if self.reference_update and self.cached_reference:
            raise ValueError("cached_reference needs a fixed reference, which reference_update changes: drop one")


def run(config: DPOConfig, context: Context) -> dict[str, Any]:
    """Train `context.seeds` policies at once, each with its own order of the pairs; evaluate on held-out pairs."""
    reference = load_initial_policy(config.policy, config.tuning, context)
    network, tokenizer = reference.network, reference.tokenizer
    rows, all_held_out = load_preferences(context, config.preferences)
    held_out = evaluation_rows(all_held_out, config.eval_rows)
    pairs, eval_pairs = (pipeline.preferences(table, tokenizer, context.data) for table in (rows, held_out))
    eval_fit = Buckets.best(pair_table(eval_pairs).lengths, config.widths).fit
    eval_prompts = pipeline.prompts(pipeline.load_rows(context.data, "eval"), tokenizer, context.data)
    report_answers(context, tokenizer, {"train": rows, "eval": all_held_out}, config.preferences)
    eval_reference, data = None, pair_table(pairs)
    context.bar.now("computing log-probabilities of the reference")
    if config.cached_reference:
        logps = functools.partial(precomputed_ref_logps, config.loss, network, reference.params)
        known, eval_reference = (logps(each, context.runtime.inference_batch) for each in (pairs, eval_pairs))
        data = data.to(lambda batch, which: ReferencedBatch(batch, pipeline.take(known, which)))
    elif config.loss.needs_reference and config.reference_update is None:
        logps = functools.partial(pair_logps_all, config.loss, network, reference.params)
        eval_reference = logps(eval_pairs, context.runtime.inference_batch, eval_fit)
    frozen, betas = {"beta": jnp.float32(config.beta)}, context.number_of_runs("beta", config.beta)
    live = config.loss.needs_reference and not (config.cached_reference or config.reference_update)
    if live or config.tuning.lora:
        frozen["reference"] = reference.params

    def start(updates: Updates[PolicyNetwork], run: int) -> TrainState:
        trained = init_trainable(network, reference.params, context.key("init", run)).trained
        follower = {"reference": jax.tree.map(jnp.copy, trained)} if config.reference_update else {}
        return updates.init({"policy": trained}, **follower)

    def evaluation(trained: PyTree, run: int) -> tuple[dict[str, float], Rows]:
        policy = reference._replace(params=full_params(network, trained["policy"], frozen, "reference"))
        logps, known = functools.partial(pair_logps_all, config.loss, network), eval_reference
        if config.reference_update:
            following = full_params(network, trained["reference"], frozen, "reference")
            known = logps(following, eval_pairs, context.runtime.inference_batch, eval_fit)
        own = logps(policy.params, eval_pairs, context.runtime.inference_batch, eval_fit)
        metrics = evaluate(config.loss, own, known, eval_pairs, betas[run])
        return metrics, policy_samples(policy, eval_prompts, config.sample_prompts, context, config.sample_temperature)

    method = OfflineMethod(
        step=lambda updates: make_step(updates, config.loss, config.reference_update),
        start=start,
        frozen=frozen,
        evaluate=evaluation,
        key_figures=("loss", "rewards/accuracies", "rewards/margins", "token_share"),
    )
    figures = train_offline(config, context, network, data, method, runs=context.runs)
    return {"train_pairs": len(rows), "eval_pairs": len(held_out), **figures}
