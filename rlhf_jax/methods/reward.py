"""The reward-model losses that a config may name: one table of specs, the data that they read, and their options.

To add a loss, write a function in `core.reward_losses` and a row in `LOSSES`; an option of its own is a field of
`RewardLossConfig`. A function names what it reads by its parameters: inputs of `INPUTS`, and options of the config.
A user's own, `file.py:name`, is a loss of pairs, which returns one number per pair.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from rlhf_jax import user_code
from rlhf_jax.config import FunctionSource, NonNegative, Range, check_ranges
from rlhf_jax.core import masking, reward_losses
from rlhf_jax.core.metrics import Metric
from rlhf_jax.data import formats, pipeline
from rlhf_jax.data.padding import pad_left, pad_right
from rlhf_jax.data.pipeline import Content, DataConfig
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.tables import PREFERENCES, load_preferences
from rlhf_jax.models.policy import both_responses
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import A, ComparisonBatch, Json, LabelledPairs, PreferenceBatch, RlhfError, Rollout, Row

Batch = PreferenceBatch[A] | LabelledPairs[A] | ComparisonBatch[A]
Result = tuple[Float[Array, ""], dict[str, Metric]]

INPUTS = {
    "chosen_scores": "score of the chosen response",
    "rejected_scores": "score of the rejected response",
    "margins": "the column margin of a pair",
    "votes": "float32[B, 2]: numbers of raters for the chosen and the rejected response, from the column labels",
    "scores": "float32[B, K]: scores of up to K responses to a prompt",
    "wins": "bool[B, K, K]: wins[b, i, j] if response i is preferred to response j",
    "mask": "bool[B, K]: responses that exist, a prefix",
    "axes": "names of the device axes that rows are split over",
}
"""Inputs of the losses, float32[B] unless noted: one entry per pair, or per prompt with all its responses."""


@dataclasses.dataclass(frozen=True)
class RewardLossSpec:
    """A reward-model loss: its function, and what cannot be read off its signature."""

    function: Callable[..., Result]
    ranked: bool = False  # needs each prompt's responses in a strict order, best first
    also_reads: tuple[str, ...] = ()  # inputs and options that the signature does not name

    @functools.cached_property
    def reads(self) -> frozenset[str]:
        """Names of the inputs and options that the function takes."""
        named = inspect.signature(self.function).parameters
        return frozenset((*INPUTS, *OPTIONS)).intersection((*named, *self.also_reads))

    @property
    def pairwise(self) -> bool:
        """True if a row is a pair, False if it is a prompt with all its responses."""
        return "scores" not in self.reads

    @property
    def column(self) -> str | None:
        """Column that the loss reads besides the responses of a pair."""
        return "margin" if "margins" in self.reads else "labels" if "votes" in self.reads else None


def _bradley_terry(
    chosen_scores: Array, rejected_scores: Array, *, label_smoothing: float, axes: tuple[str, ...]
) -> Result:
    """Bradley-Terry loss, with smoothed labels if asked for."""
    if label_smoothing:
        return reward_losses.smoothed_bradley_terry_loss(
            chosen_scores, rejected_scores, label_smoothing=label_smoothing, axes=axes
        )
    return reward_losses.bradley_terry_loss(chosen_scores, rejected_scores, axes=axes)


LOSSES: dict[str, RewardLossSpec] = {
    "bradley_terry": RewardLossSpec(_bradley_terry),
    "margin": RewardLossSpec(reward_losses.margin_loss),
    "raters": RewardLossSpec(reward_losses.raters_loss),
    "k_wise": RewardLossSpec(reward_losses.k_wise_loss),
    "plackett_luce": RewardLossSpec(reward_losses.plackett_luce_loss, ranked=True),
}

if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[tuple(LOSSES)]


def spec_of(name: str) -> RewardLossSpec:
    """Look up a loss by its name in `LOSSES`, or load a user's own. Raises RlhfError unless its signature is valid."""
    if name in LOSSES:
        return LOSSES[name]
    what, arguments = "reward-model loss", ("chosen_scores", "rejected_scores")
    function = user_code.load(name, what)
    options = user_code.options_of(function, name, what, arguments=arguments, options=("margins", *OPTIONS))

    def mean_loss(chosen_scores: Array, rejected_scores: Array, *, axes: tuple[str, ...], **others: Array) -> Result:
        each = function(chosen_scores, rejected_scores, **others)
        if jnp.shape(each) != chosen_scores.shape:
            raise RlhfError(f"{what} {name} returned the shape {jnp.shape(each)}: return one number per pair")
        return masking.mean(each, axes), reward_losses.bradley_terry_loss(chosen_scores, rejected_scores, axes=axes)[1]

    return RewardLossSpec(mean_loss, also_reads=options)


@dataclasses.dataclass(frozen=True)
class RewardLossConfig:
    """Loss of a reward model, with label smoothing and centring.

    `margin` reads a column `margin`; `raters` a column `labels` (one entry per rater: 1 prefers chosen, 0 rejected, 0.5
    neither); `k_wise` ranked rows, or pairs, which are grouped by prompt; `plackett_luce` ranked rows.
    """

    # Loss; `margin`, `raters`, `k_wise` and `plackett_luce` need special columns. Your own: 'mine.py:my_loss'.
    name: LossName | FunctionSource = "bradley_terry"
    label_smoothing: Annotated[float, Range(at_least=0, below=0.5)] = 0.0  # assumed share of flipped labels
    # Weight of centring: the squared sum of a pair's scores (eq. 2 of Eisenstein et al. 2023, arXiv:2312.09244).
    center_rewards_coefficient: NonNegative = 0.0

    def __post_init__(self) -> None:
        check_ranges(self)
        for option in OPTIONS:
            if getattr(self, option) and option not in self.spec.reads:
                readers = [name for name, spec in LOSSES.items() if option in spec.reads]
                raise ValueError(
                    f"{option} = {getattr(self, option)} is not read by name = {self.name!r}: set it to 0, or use one "
                    f"of {', '.join(readers)}"
                )

    @property
    def spec(self) -> RewardLossSpec:
        """The chosen loss."""
        return spec_of(self.name)


OPTIONS = tuple(
    field.name
    for field in dataclasses.fields(RewardLossConfig)
    if field.name not in ("name", "center_rewards_coefficient")
)
"""Options that losses read by name."""

BRADLEY_TERRY = RewardLossConfig()


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
        return train, [pair for row in held_out for pair in pairs_of(row)]
    if config.spec.ranked:
        raise RlhfError(
            f"config.{context.name}.loss.name = {config.name!r} needs rankings, but {sources[0]} has none: give rows "
            "with prompt and completions (best first), or use loss.name = 'k_wise'"
        )
    return load_preferences(context, stage)


def pairs_of(row: Row) -> list[Row]:
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


def make_batch(config: RewardLossConfig, rows: list[Row], tokenizer: Tokenizer, data: DataConfig) -> Batch[np.ndarray]:
    """Tokenise and pad all training rows. Raises RlhfError naming a row without the columns that the loss reads."""
    spec = config.spec
    if not spec.pairwise:
        return _comparisons(config, rows, tokenizer, data)
    pairs = pipeline.preferences(rows, tokenizer, data)
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
    return LabelledPairs(pairs, margin, votes)


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
    available = {name: getattr(config, name) for name in OPTIONS} | {"axes": axes}
    if isinstance(batch, ComparisonBatch):
        scores = _all_scores(network, params, batch, dropout_keys)
        available |= {"scores": scores, "wins": batch.wins, "mask": jnp.any(batch.response_mask, axis=2)}
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
    return masking.rows(_pairs(batch).prompt, axes)


def tokens(batch: Batch, axes: tuple[str, ...]) -> Array:
    """Number of response tokens of a batch."""
    if isinstance(batch, ComparisonBatch):
        return masking.count(batch.response_mask, axes)
    pairs = _pairs(batch)
    return masking.count(pairs.chosen_mask, axes) + masking.count(pairs.rejected_mask, axes)


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
    rows, count = batch.responses.shape[:2]
    if dropout_keys is not None:
        dropout_keys = jax.vmap(lambda key: jax.random.split(key, count))(dropout_keys).reshape(-1)
    rollout = Rollout(
        jnp.repeat(batch.prompt, count, axis=0),
        jnp.repeat(batch.prompt_mask, count, axis=0),
        batch.responses.reshape(rows * count, -1),
        batch.response_mask.reshape(rows * count, -1),
    )
    return network.scores(params, rollout, dropout_keys=dropout_keys).reshape(rows, count)


# ---- tables --------------------------------------------------------------------------------------------------------


def _comparisons(
    config: RewardLossConfig, rows: list[Row], tokenizer: Tokenizer, data: DataConfig
) -> ComparisonBatch[np.ndarray]:
    groups = _ranked(rows) if "completions" in rows[0] else _grouped(rows)
    asked = [prompt for prompt, completions, _ in groups for _ in completions]
    written = [completion for _, completions, _ in groups for completion in completions]
    examples = iter(pipeline.tokenise(asked, written, tokenizer, data))
    most = max(len(completions) for _, completions, _ in groups)
    shape = (len(groups), most, data.max_response_tokens)
    batch = ComparisonBatch(
        np.zeros((len(groups), data.max_prompt_tokens), np.int32),
        np.zeros((len(groups), data.max_prompt_tokens), bool),
        np.zeros(shape, np.int32),
        np.zeros(shape, bool),
        np.zeros((len(groups), most, most), bool),
    )
    for place, (_, completions, wins) in enumerate(groups):
        count = len(completions)
        if config.spec.ranked and not np.array_equal(wins, np.triu(np.ones((count, count), bool), 1)):
            raise RlhfError(
                f"row {place + 1} of the rankings has ties, which loss.name = {config.name!r} does not support: "
                "break them, or use loss.name = 'k_wise'"
            )
        own = list(itertools.islice(examples, count))
        batch.prompt[place], batch.prompt_mask[place] = pad_left([own[0].prompt], data.max_prompt_tokens)
        responses = pad_right([example.response for example in own], data.max_response_tokens)
        batch.responses[place, :count], batch.response_mask[place, :count] = responses
        batch.wins[place, :count, :count] = wins
    return batch


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
