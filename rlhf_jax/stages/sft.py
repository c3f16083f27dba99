"""sft: train a language model (and a tokenizer, from scratch) on demonstrations by maximum likelihood."""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree

from rlhf_jax.config import CountOrZero, NonNegative, StageName
from rlhf_jax.core import masking
from rlhf_jax.core.logprobs import cross_entropy
from rlhf_jax.core.metrics import Metric, masked_mean
from rlhf_jax.core.sequences import mask_read
from rlhf_jax.data import pipeline
from rlhf_jax.data.batching import Buckets, Fit
from rlhf_jax.data.ragged import Table
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.data_report import report_answers
from rlhf_jax.loading.models import Policy, Pretrained, refuse_float16
from rlhf_jax.loading.samples import policy_samples
from rlhf_jax.loading.stage_models import save_policy_spec
from rlhf_jax.loading.tables import evaluation_rows, load_demonstrations
from rlhf_jax.loading.trainable import full_params, init_trainable, trainable
from rlhf_jax.methods.offline import OfflineConfig, OfflineMethod, Updates, train_offline
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.loop import Rows
from rlhf_jax.runtime.programs import Step
from rlhf_jax.sampling.batches import sequence_sums
from rlhf_jax.text.tokenizer import TokenizerConfig, train_tokenizer
from rlhf_jax.types import TokenBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(OfflineConfig):
    """Model and tokenizer, from scratch or from a checkpoint."""

    kind: Literal["sft"]
    tokenizer: TokenizerConfig | None  # tokenizer to train; None: the checkpoint's
    model: ModelConfig | Pretrained  # shape of a model from scratch, or the model to start from
    sample_prompts: CountOrZero  # evaluation prompts continued at every evaluation
    sample_temperature: NonNegative = 1.0  # temperature of continuations at evaluations; 0 is greedy
    # Stage whose samples, or chosen responses, are the demonstrations; None: the experiment's data.
    demonstrations: StageName | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_float16(self.model, adapter=isinstance(self.model, Pretrained) and self.model.lora is not None)
        if (self.tokenizer is None) != isinstance(self.model, Pretrained):
            raise ValueError("tokenizer is required for a model from scratch, and must be None with model.init")


def run(config: SFTConfig, context: Context) -> dict[str, Any]:
    """Train on the training rows; evaluate the loss and sample on held-out rows."""
    rows, all_held_out = load_demonstrations(context, config.demonstrations)
    held_out = evaluation_rows(all_held_out, config.eval_rows)
    start = make_policy(config, rows, context)
    tuning = config.model if isinstance(config.model, Pretrained) else None
    network, tokenizer = trainable(start.network, tuning), start.tokenizer
    trained, base = init_trainable(network, start.params, context.key("adapter"))
    start = start._replace(network=network, params=base)  # without an adapter, the first weights are not kept
    seeds = range(context.seed, context.seed + 1)
    origin = context.base(tuning.init, tuning) if tuning else None
    save_policy_spec(context.directory, start, seeds, base=origin)

    data = pipeline.demonstrations(rows, tokenizer, context.data)
    eval_data = pipeline.demonstrations(held_out, tokenizer, context.data)
    eval_fit = Buckets.best(eval_data.lengths, config.widths).fit
    eval_prompts = pipeline.prompts(held_out, tokenizer, context.data)
    report_answers(context, tokenizer, {"train": rows, "eval": all_held_out}, config.demonstrations)
    frozen = {"base": base}

    def evaluation(trained: PyTree, run: int) -> tuple[dict[str, float], Rows]:
        del run
        policy = start._replace(params=full_params(network, trained["policy"], frozen, "base"))
        metrics = evaluate(network, policy.params, eval_data, context.runtime.inference_batch, eval_fit)
        return metrics, policy_samples(policy, eval_prompts, config.sample_prompts, context, config.sample_temperature)

    method = OfflineMethod(
        step=make_step,
        start=lambda updates, run: updates.init({"policy": trained}),
        frozen=frozen,
        evaluate=evaluation,
        key_figures=("loss", "eval/loss", "token_share"),
    )
    figures = train_offline(config, context, network, data, method, runs=[0])
    return {"rows": len(rows), **figures, "vocab_size": network.vocab_size}


def make_policy(config: SFTConfig, rows: list[dict[str, Any]], context: Context) -> Policy:
    """Initialise the policy."""
    if isinstance(config.model, Pretrained):
        return context.policy(config.model.init, config.model)
    assert config.tokenizer is not None
    tokenizer = train_tokenizer(config.tokenizer, pipeline.training_texts(rows))
    network = PolicyNetwork(config.model, tokenizer.vocab_size, tokenizer.suppressed)
    return Policy(network, network.init(context.key("init")), tokenizer)


def make_step(updates: Updates[PolicyNetwork]) -> Step:
    """Make the step: one update on a TokenBatch."""
    network, axes = updates.network, updates.axes

    def step(
        state: TrainState, frozen: PyTree, batch: TokenBatch, run_key: jax.Array
    ) -> tuple[TrainState, dict[str, Array], tuple]:
        def loss_fn(params: PyTree, rows: TokenBatch, keys: Key[Array, "B"] | None) -> tuple[Array, dict[str, Metric]]:
            return sft_loss(network, full_params(network, params["policy"], frozen, "base"), rows, keys, axes)

        def trained_tokens(rows: TokenBatch) -> Array:
            return masking.count(rows.loss_mask[:, 1:], axes)

        state, logged = updates.update(state, batch, run_key, loss_fn, weight=trained_tokens)
        counts = {
            "num_tokens": masking.count(batch.loss_mask, axes),
            "token_share": masking.share(mask_read(batch), axes),
        }
        return state, logged | counts, ()

    return step


def sft_loss(
    network: PolicyNetwork,
    params: PyTree,
    batch: TokenBatch,
    keys: Key[Array, "B"] | None,
    axes: tuple[str, ...],
) -> tuple[jax.Array, dict[str, Metric]]:
    """Cross-entropy of the trained tokens, in nats per token, with `entropy` and `mean_token_accuracy`.

    Args: keys of an adapter's dropout, one per row; None disables it.
    """
    stats, trained = network.sequence_stats(params, batch, dropout_keys=keys), batch.loss_mask[:, 1:]
    return cross_entropy(stats.logprobs, trained, axes), {
        "entropy": masked_mean(stats.entropy, trained, axes),
        "mean_token_accuracy": masked_mean(stats.correct.astype(stats.entropy.dtype), trained, axes),
    }


def evaluate(
    network: PolicyNetwork, params: PyTree, data: Table[TokenBatch[np.ndarray]], batch_size: int, fit: Fit
) -> dict[str, float]:
    """`eval/loss` and `eval/mean_token_accuracy` over all trained tokens of a split."""
    sums = sequence_sums(network, params, data, batch_size, fit)
    count = int(sums.tokens.sum())
    return {
        "eval/loss": float(np.sum(sums.nll, dtype=np.float64)) / count,
        "eval/mean_token_accuracy": int(sums.correct.sum()) / count,
    }
