"""Reward-model losses on batches: the rows that each loss reads, their tokens, and the loss of a batch."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from rlhf_jax.core import masking, reward_losses
from rlhf_jax.core.sequences import mask_read
from rlhf_jax.data import formats, pipeline
from rlhf_jax.data.pipeline import Content, DataConfig
from rlhf_jax.data.ragged import RowWidths, Table, pair_table
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.tables import PREFERENCES, load_preferences
from rlhf_jax.methods.reward_table import LOSS_OPTIONS, Result, RewardLossConfig
from rlhf_jax.models.policy import both_responses
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import A, ComparisonBatch, Json, LabelledPairs, PreferenceBatch, RlhfError, Row

Batch = PreferenceBatch[A] | LabelledPairs[A] | ComparisonBatch[A]


def load_rows(config: RewardLossConfig, context: Context, stage: str | None) -> tuple[list[Row], list[Row]]:
    """Load training rows for the loss, and held-out pairs, from a stage or the experiment's own data."""
    if config.spec.pairwise:
        return load_preferences(context, stage)
    if stage is not None:
        directory = context.workdir.find(stage)
        sources = [str(directory / name) for name in PREFERENCES]
        rows = [formats.read_table(source) for source in sources]
    else:
        sources = [context.data.source(split) for split in ("train", "eval")]
        rows = [pipeline.load_rows(context.data, split) for split in ("train", "eval")]
    if "completions" in rows[0][0]:
        train, held_out = (formats.ranked_rows(table, source) for table, source in zip(rows, sources, strict=True))
        return train, [pair for row in held_out for pair in pairs_from_ranking(row)]
    if config.spec.ranked:
        raise RlhfError(
            f"config.{context.name}.loss.name = {config.name!r} needs rankings, but {sources[0]} has none: give rows "
            "with prompt and completions (best first), or use loss.name = 'k_wise'"
        )
    return load_preferences(context, stage)


def pairs_from_ranking(row: Row) -> list[Row]:
    """Split a ranked row into pairs with their scores, dropping ties."""
    ranked = list(zip(row["completions"], row["scores"], strict=True))
    return [
        {
            "prompt": row["prompt"],
            "chosen": chosen,
            "rejected": rejected,
            "chosen_score": high,
            "rejected_score": low,
        }
        for (chosen, high), (rejected, low) in itertools.combinations(ranked, 2)
        if high > low
    ]


def make_table(
    config: RewardLossConfig, rows: list[Row], tokenizer: Tokenizer, data: DataConfig
) -> Table[Batch[np.ndarray]]:
    """Tokenise all training rows. Raises RlhfError naming a row without the columns that the loss reads."""
    spec = config.spec
    if not spec.pairwise:
        return _comparisons(config, rows, tokenizer, data)
    pairs = pair_table(pipeline.preferences(rows, tokenizer, data))
    if spec.column is None:
        return pairs
    margin, votes = np.zeros(len(rows), np.float32), np.tile(np.array([1, 0], np.float32), (len(rows), 1))
    formats.require_columns(rows, [spec.column], "the preferences")
    for place, row in enumerate(rows):
        if spec.column == "margin":
            margin[place] = _numbers([row["margin"]], place, "margin", -np.inf, np.inf)[0]
        else:
            labels = _numbers(row["labels"], place, "labels", 0, 1)
            votes[place] = sum(labels), len(labels) - sum(labels)
    return pairs.to(lambda batch, which: LabelledPairs(batch, margin[which], votes[which]))


def loss(
    config: RewardLossConfig,
    network: ScalarNetwork,
    params: PyTree,
    batch: Batch,
    *,
    dropout_keys: Key[Array, "B"] | None,
    axes: tuple[str, ...],
) -> Result:
    """Compute the loss and metrics of a batch, in one forward pass over all responses."""
    available = {name: getattr(config, name) for name in LOSS_OPTIONS} | {"axes": axes}
    if isinstance(batch, ComparisonBatch):
        scores = _all_scores(network, params, batch, dropout_keys)
        available |= {"scores": scores, "wins": batch.wins, "mask": jnp.any(batch.responses.response_mask, axis=2)}
        uncentred = reward_losses.k_wise_centering(scores, batch.wins, axes=axes)
    else:
        chosen, rejected = _pair_scores(network, params, _pairs(batch), dropout_keys)
        available |= {"chosen_scores": chosen, "rejected_scores": rejected}
        if isinstance(batch, LabelledPairs):
            available |= {"margins": batch.margin, "votes": batch.votes}
        uncentred = reward_losses.centering(chosen, rejected, axes=axes)
    value, metrics = config.spec.function(**{name: available[name] for name in config.spec.reads})
    if not config.center_rewards_coefficient:
        return value, metrics
    return value + config.center_rewards_coefficient * uncentred.value, metrics | {"centering": uncentred}


def weight(config: RewardLossConfig, batch: Batch, axes: tuple[str, ...]) -> Array:
    """Number of items that the loss averages over: pairs, raters' labels, or prompts with at least one pair."""
    if isinstance(batch, ComparisonBatch):
        return masking.count(jnp.any(batch.wins, axis=(1, 2)), axes)
    if isinstance(batch, LabelledPairs) and "votes" in config.spec.reads:
        return masking.total(batch.votes, axes)
    return masking.rows(_pairs(batch).chosen.tokens, axes)


def token_counts(batch: Batch, axes: tuple[str, ...]) -> dict[str, Array]:
    """Number of response tokens of a batch, and the share of positions that are tokens."""
    rows = batch.responses if isinstance(batch, ComparisonBatch) else both_responses(_pairs(batch))
    return {"num_tokens": masking.count(rows.response_mask, axes), "token_share": masking.share(mask_read(rows), axes)}


def _pairs(batch: PreferenceBatch | LabelledPairs) -> PreferenceBatch:
    return batch.pairs if isinstance(batch, LabelledPairs) else batch


def _pair_scores(
    network: ScalarNetwork, params: PyTree, pairs: PreferenceBatch, dropout_keys: Key[Array, "B"] | None
) -> tuple[Array, Array]:
    if dropout_keys is not None:  # separate masks for chosen and rejected
        dropout_keys = jax.vmap(jax.random.split, out_axes=1)(dropout_keys).reshape(-1)
    chosen, rejected = jnp.split(network.scores(params, both_responses(pairs), dropout_keys=dropout_keys), 2)
    return chosen, rejected


def _all_scores(
    network: ScalarNetwork, params: PyTree, batch: ComparisonBatch, dropout_keys: Key[Array, "B"] | None
) -> Float[Array, "B K"]:
    """Score K responses to every prompt, in one forward pass of B * K rows."""
    rows, count = batch.responses.tokens.shape[:2]
    if dropout_keys is not None:
        dropout_keys = jax.vmap(lambda key: jax.random.split(key, count))(dropout_keys).reshape(-1)
    padded = batch.responses._replace(packing=None)
    responses = jax.tree.map(lambda leaf: leaf.reshape(rows * count, *leaf.shape[2:]), padded)
    responses = responses._replace(packing=batch.responses.packing)
    return network.scores(params, responses, dropout_keys=dropout_keys).reshape(rows, count)


# ---- tables --------------------------------------------------------------------------------------------------------


def _comparisons(
    config: RewardLossConfig, rows: list[Row], tokenizer: Tokenizer, data: DataConfig
) -> Table[ComparisonBatch[np.ndarray]]:
    groups = _ranked(rows) if "completions" in rows[0] else _grouped(rows)
    prompts = [prompt for prompt, completions, _ in groups for _ in completions]
    written = [completion for _, completions, _ in groups for completion in completions]
    sequences = pipeline.ragged(pipeline.tokenise(prompts, written, tokenizer, data))
    counts = np.array([len(completions) for _, completions, _ in groups])
    most, first = counts.max(), np.cumsum(counts) - counts
    all_wins = np.zeros((len(groups), most, most), bool)
    for place, (_, _, wins) in enumerate(groups):
        count = len(wins)
        if config.spec.ranked and not np.array_equal(wins, np.triu(np.ones((count, count), bool), 1)):
            raise RlhfError(
                f"row {place + 1} of the rankings has ties, which loss.name = {config.name!r} does not support: "
                "break them, or use loss.name = 'k_wise'"
            )
        all_wins[place, :count, :count] = wins

    def numbers(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the responses [B * K], the first one in the place of missing ones, and which of them exist."""
        places = np.arange(most)
        exists = places < counts[rows, None]
        return (first[rows, None] + np.where(exists, places, 0)).reshape(-1), exists

    def needed(rows: np.ndarray) -> RowWidths:
        which, _ = numbers(rows)
        return sequences.needed(which, which)

    def padded(rows: np.ndarray, widths: RowWidths) -> ComparisonBatch[np.ndarray]:
        which, exists = numbers(rows)
        flat = sequences.padded(which, which, widths)
        flat.mask[~exists.reshape(-1)] = flat.response_mask[~exists.reshape(-1)] = False
        responses = jax.tree.map(lambda leaf: leaf.reshape(len(rows), most, *leaf.shape[1:]), flat)
        return ComparisonBatch(responses, all_wins[rows])

    lengths = np.array([each.max() for each in np.split(sequences.lengths, first[1:])])
    return Table(lengths, needed, padded, int(lengths.max()))


def _ranked(rows: Sequence[Row]) -> list[tuple[Content, list[Content], np.ndarray]]:
    return [(row["prompt"], row["completions"], np.greater.outer(row["scores"], row["scores"])) for row in rows]


def _grouped(rows: Sequence[Row]) -> list[tuple[Content, list[Content], np.ndarray]]:
    """Group pairs by prompt, in the order of first occurrence."""
    found: dict[str, tuple[Content, list[Content], list[tuple[int, int]]]] = {}
    for row in rows:
        prompt, completions, pairs = found.setdefault(repr(row["prompt"]), (row["prompt"], [], []))
        for completion in (row["chosen"], row["rejected"]):
            if completion not in completions:
                completions.append(completion)
        pairs.append((completions.index(row["chosen"]), completions.index(row["rejected"])))
    groups = []
    for prompt, completions, pairs in found.values():
        wins = np.zeros((len(completions), len(completions)), bool)
        for better, worse in pairs:
            wins[better, worse] = better != worse
        groups.append((prompt, completions, wins))
    return groups


def _numbers(values: Json, place: int, column: str, low: float, high: float) -> list[float]:
    values = list(values) if isinstance(values, (list, tuple, np.ndarray)) else []
    if not values or not all(isinstance(x, (int, float)) and np.isfinite(x) and low <= x <= high for x in values):
        wanted = "a number" if column == "margin" else "a list of the raters' labels, each between 0 and 1"
        raise RlhfError(f"row {place + 1} of the preferences, column {column}, is not {wanted}: correct the row")
    return [float(x) for x in values]
