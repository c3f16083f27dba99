"""kto: train a policy on single responses labelled good or bad (Ethayarajh et al. 2024, arXiv:2402.01306).

Following prospect theory, the loss compares each response with a reference point, the KL divergence of the policy from
the reference. As in the paper and in TRL, the KL estimate pairs each response with another prompt of the batch.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from rlhf_jax.config import AtLeastTwo, CountOrZero, ModelSource, NonNegative, Positive, StageName, check_ranges
from rlhf_jax.core import masking
from rlhf_jax.core.logprobs import sequence_logprobs
from rlhf_jax.core.metrics import Metric, values
from rlhf_jax.core.sequences import mask_read
from rlhf_jax.core.unpaired_losses import apo_zero_unpaired_loss, kto_baseline, kto_loss
from rlhf_jax.data import formats, pipeline
from rlhf_jax.data.batching import Buckets
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.data.ragged import Ragged, RaggedSequences, RowWidths, Table, sequence_table, widest
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.data_report import report_answers
from rlhf_jax.loading.models import NO_CHANGES, Tuning, refuse_float16
from rlhf_jax.loading.samples import policy_samples
from rlhf_jax.loading.tables import evaluation_rows, load_preferences
from rlhf_jax.loading.trainable import full_params, init_trainable, load_initial_policy
from rlhf_jax.methods.offline import OfflineConfig, OfflineMethod, Updates, train_offline
from rlhf_jax.methods.per_run import IN_UPDATES, beta_of_run, of_run
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.loop import Rows
from rlhf_jax.runtime.programs import Step
from rlhf_jax.sampling.batches import map_table
from rlhf_jax.sampling.compiled import compiled
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import RlhfError, Sequences, UnpairedBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnpairedLossConfig:
    """Loss (`kto`, or `apo_zero_unpaired` without a reference point) and weights of good and bad responses.

    TRL recommends, after eq. 8 of the paper, that desirable_weight x good responses be 1 to 4/3 times
    undesirable_weight x bad responses. The stage's summary reports both counts.
    """

    # Loss: kto (eq. 7 of Ethayarajh et al. 2024, arXiv:2402.01306), or apo_zero_unpaired, without a reference point.
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable_weight: Positive = 1.0  # weight of a good response's loss
    undesirable_weight: Positive = 1.0  # weight of a bad response's loss

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def estimates_kl(self) -> bool:
        """True if the loss compares responses with an estimate of the KL divergence."""
        return self.loss == "kto"


KTO = UnpairedLossConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTOConfig(OfflineConfig):
    """Initial policy (also the reference), responses and beta."""

    kind: Literal["kto"]
    policy: ModelSource  # policy to start from, and the reference
    # Stage whose pairs are split into good and bad responses; None: the experiment's data.
    preferences: StageName | None
    beta: Positive  # how fast gains and losses saturate
    batch_size: AtLeastTwo  # responses in an update; each is also paired with another prompt, to estimate KL
    sample_prompts: CountOrZero  # evaluation prompts continued at every evaluation
    loss: UnpairedLossConfig = KTO
    tuning: Tuning = NO_CHANGES
    sample_temperature: NonNegative = 1.0  # temperature of continuations at evaluations; 0 is greedy

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_float16(self.tuning, adapter=self.tuning.lora is not None)


def run(config: KTOConfig, context: Context) -> dict[str, Any]:
    """Train on the training responses; evaluate the loss and implicit rewards on held-out ones."""
    reference = load_initial_policy(config.policy, config.tuning, context)
    network, tokenizer = reference.network, reference.tokenizer
    rows, all_held_out = load_unpaired(context, config.preferences)
    held_out = evaluation_rows(all_held_out, config.eval_rows)
    data, eval_data = (labelled(table, tokenizer, context.data) for table in (rows, held_out))
    eval_prompts = pipeline.prompts(pipeline.load_rows(context.data, "eval"), tokenizer, context.data)
    report_answers(context, tokenizer, {"train": rows, "eval": all_held_out}, config.preferences)
    frozen, betas = (
        {"reference": reference.params, "beta": jnp.float32(config.beta)},
        context.number_of_runs("beta", config.beta),
    )

    def start(updates: Updates[PolicyNetwork], run: int) -> TrainState:
        return updates.init({"policy": init_trainable(network, reference.params, context.key("init", run)).trained})

    def evaluation(trained: PyTree, run: int) -> tuple[dict[str, float], Rows]:
        policy = reference._replace(params=full_params(network, trained["policy"], frozen, "reference"))
        models = (policy.params, reference.params)
        metrics = evaluate(
            config.loss, network, models, eval_data, betas[run], context.runtime.inference_batch, config.widths
        )
        return metrics, policy_samples(policy, eval_prompts, config.sample_prompts, context, config.sample_temperature)

    method = OfflineMethod(
        step=lambda updates: make_step(updates, config.loss),
        start=start,
        frozen=frozen,
        evaluate=evaluation,
        key_figures=("loss", "rewards/margins", "kl", "token_share"),
    )
    figures = train_offline(config, context, network, make_table(config.loss, data), method, runs=context.runs)
    return {
        "desirable_rows": int(data.label.sum()),
        "undesirable_rows": int((~data.label).sum()),
        "eval_rows": len(held_out),
        **figures,
    }


class Labelled(NamedTuple):
    """Prompts with one response each, labelled desirable (True) or undesirable."""

    sequences: RaggedSequences
    label: Bool[np.ndarray, "N"]


def labelled(rows: list[dict[str, Any]], tokenizer: Tokenizer, data: DataConfig) -> Labelled:
    """Tokenise unpaired rows."""
    return Labelled(pipeline.unpaired(rows, tokenizer, data), np.array([row["label"] for row in rows], bool))


def make_table(config: UnpairedLossConfig, data: Labelled) -> Table[UnpairedBatch[np.ndarray]]:
    """Make a table of labelled responses, with the mismatched ones that the loss's KL estimate needs."""
    sequences, label = data
    prompts = numbered(sequences.prompts)

    def mismatched(rows: np.ndarray) -> np.ndarray:
        return rows[mismatched_rows(prompts[rows])]

    def needed(rows: np.ndarray) -> RowWidths:
        own = sequences.needed(rows, rows)
        return widest([own, sequences.needed(rows, mismatched(rows))]) if config.estimates_kl else own

    def padded(rows: np.ndarray, widths: RowWidths) -> UnpairedBatch[np.ndarray]:
        others = sequences.padded(rows, mismatched(rows), widths) if config.estimates_kl else None
        return UnpairedBatch(sequences.padded(rows, rows, widths), others, label[rows])

    longest = sequences.prompts.lengths.max() + sequences.responses.lengths.max()
    return Table(sequences.lengths, needed, padded, int(longest))


def numbered(prompts: Ragged) -> Int[np.ndarray, "N"]:
    """Number the prompts, equal ones alike."""
    numbers: dict[bytes, int] = {}
    rows = np.split(prompts.values, prompts.ends[:-1])
    return np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in rows])


@functools.lru_cache
def make_step(updates: Updates[PolicyNetwork], loss_config: UnpairedLossConfig = KTO) -> Step:
    """Make the step: one update on an UnpairedBatch.

    `frozen` holds beta and the reference, which is also an adapter's base. The reference point is that of the whole
    batch, even if the batch is read in micro-batches.
    """
    network, axes = updates.network, updates.axes

    def step(
        state: TrainState, frozen: dict[str, PyTree], batch: UnpairedBatch, run_key: jax.Array
    ) -> tuple[TrainState, dict[str, Array], tuple]:
        baseline, beta = None, beta_of_run(frozen)
        if loss_config.estimates_kl != (batch.mismatched is not None):
            raise ValueError(f"{loss_config.loss} and the batch disagree on mismatched responses: use make_table")
        if batch.mismatched is not None:
            policy = full_params(network, state.params["policy"], frozen, "reference")

            def both(rows: Sequences) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
                return response_logprobs(network, policy, rows), response_logprobs(network, frozen["reference"], rows)

            own, reference = updates.by_slices(both, batch.mismatched)
            baseline = kto_baseline(own, reference, axes)

        def loss_fn(
            params: PyTree, rows: UnpairedBatch, keys: Key[Array, "B"] | None
        ) -> tuple[Float[Array, ""], dict[str, Metric]]:
            reference = response_logprobs(network, frozen["reference"], rows.sequences)
            policy = full_params(network, params["policy"], frozen, "reference")
            own = response_logprobs(network, policy, rows.sequences, keys)
            return unpaired_loss(loss_config, own, reference, rows.label, baseline, beta=beta, axes=axes)

        state, logged = of_run(updates, frozen, IN_UPDATES).update(
            state, batch._replace(mismatched=None), run_key, loss_fn, weight=lambda rows: masking.rows(rows.label, axes)
        )
        num_tokens = masking.count(batch.sequences.response_mask, axes)
        return (
            state,
            logged | {"num_tokens": num_tokens, "token_share": masking.share(mask_read(batch.sequences), axes)},
            (),
        )

    return step


def mismatched_rows(prompts: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B"]:
    """For the KL estimate, choose the row whose response each row's prompt is paired with.

    Rows are sorted by prompt and rotated by the size of the largest group with equal prompts. No row is then paired
    with a response to its own prompt, unless more than half of the rows share a prompt, and then as few as possible.
    If all prompts differ, row i gets row i - 1 cyclically, as in TRL.

    Args: prompts are the numbers of the rows' prompts.
    """
    _, first, inverse, counts = np.unique(prompts, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first[inverse], kind="stable")
    others = np.empty(len(prompts), order.dtype)
    others[order] = np.roll(order, counts.max())
    return others


def response_logprobs(
    network: PolicyNetwork, params: PyTree, sequences: Sequences, dropout_keys: Key[Array, "B"] | None = None
) -> Float[Array, "B"]:
    """Log-probabilities of responses in nats."""
    stats = network.response_stats(params, sequences, temperature=1.0, dropout_keys=dropout_keys)
    return sequence_logprobs(stats.logprobs, sequences.response_mask)


_compiled_logprobs = compiled(0)(response_logprobs)


def unpaired_loss(
    config: UnpairedLossConfig,
    own: Float[Array, "B"],
    reference: Float[Array, "B"],
    label: Array,
    baseline: Float[Array, ""] | None,
    *,
    beta: float | Float[Array, ""],
    axes: tuple[str, ...],
) -> tuple[Float[Array, ""], dict[str, Metric]]:
    """Compute the configured loss and its metrics; baseline is None for a loss without a reference point."""
    weights = {"desirable_weight": config.desirable_weight, "undesirable_weight": config.undesirable_weight}
    if baseline is None:
        return apo_zero_unpaired_loss(own, reference, label, beta=beta, axes=axes, **weights)
    return kto_loss(own, reference, label, baseline=baseline, beta=beta, axes=axes, **weights)


def evaluate(
    config: UnpairedLossConfig,
    network: PolicyNetwork,
    params: tuple[PyTree, PyTree],
    data: Labelled,
    beta: float,
    batch_size: int,
    widths: int,
) -> dict[str, float]:
    """Compute the loss and implicit rewards on all held-out rows, as `eval/*`.

    Args: params of policy and reference; widths is the most widths that batches are padded to.
    """

    def logprobs(sequences: RaggedSequences) -> list[jax.Array]:
        table = sequence_table(sequences)
        fit = Buckets.best(table.lengths, widths).fit
        return [
            jnp.asarray(map_table(functools.partial(_compiled_logprobs, network, model), table, batch_size, fit))
            for model in params
        ]

    own, reference = logprobs(data.sequences)
    baseline = None
    if config.estimates_kl:
        prompts, responses = data.sequences.prompts, data.sequences.responses
        others = responses.take(mismatched_rows(numbered(prompts)))
        of_policy, of_reference = logprobs(RaggedSequences(prompts, others))
        baseline = kto_baseline(of_policy, of_reference, ())
    label = jnp.asarray(data.label)
    loss, metrics = unpaired_loss(config, own, reference, label, baseline, beta=beta, axes=())
    return {"eval/loss": float(loss)} | {f"eval/{name}": float(value) for name, value in values(metrics).items()}


def load_unpaired(context: Context, stage: str | None) -> tuple[list[dict], list[dict]]:
    """Load training and held-out rows (prompt, completion, label), from pairs or from unpaired data.

    Raises RlhfError if the rows are of another kind or all have the same label.
    """
    if stage is not None or "chosen" in pipeline.load_rows(context.data, "train")[0]:
        tables = tuple(map(unpair, load_preferences(context, stage)))
        places = (f"stage {stage}",) * 2
    else:
        tables = tuple(pipeline.load_rows(context.data, split) for split in ("train", "eval"))
        places = tuple(context.data.source(split) for split in ("train", "eval"))
    for rows, place in zip(tables, places, strict=True):
        formats.require_columns(rows, ["prompt", "completion", "label"], place)
        require_both_labels(rows, place)
    return tables[0], tables[1]


def require_both_labels(rows: list[dict[str, Any]], source: str) -> None:
    """Raise RlhfError if all rows have the same label."""
    if len({row["label"] for row in rows}) < 2:
        raise RlhfError(
            f"{source}: all {len(rows)} rows have the label {str(rows[0]['label']).lower()}, but KTO needs both good "
            "and bad completions"
        )


def unpair(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Split pairs into unpaired rows: chosen responses labelled good, rejected responses labelled bad."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs
        for side in ("chosen", "rejected")
    ]
