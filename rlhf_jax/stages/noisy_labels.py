"""noisy_labels: keep some of the pairs of an earlier stage, and exchange chosen and rejected in a share of them.

Two stages with the same seed draw the same order of pairs and the same uniform number per pair: the pairs of the
smaller stage are among those of the larger, and the labels flipped at a lower share are among those flipped at a higher
one. Sizes of data and levels of noise are thus compared on the same pairs.
"""

import dataclasses
from typing import Annotated, Any, Literal

import jax
import numpy as np

from rlhf_jax.config import Count, Range, StageName, check_ranges
from rlhf_jax.core.keys import derive
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.tables import PREFERENCES, load_preferences
from rlhf_jax.runtime.files import write_rows
from rlhf_jax.types import RlhfError, Row


@dataclasses.dataclass(frozen=True)
class NoisyLabelsConfig:
    """The stage whose pairs are read, how many of them are kept, and the share of flipped labels."""

    kind: Literal["noisy_labels"]
    preferences: StageName  # stage that wrote the pairs
    pairs: Count | None  # training pairs to keep, drawn at random; None: all
    flipped: Annotated[float, Range(at_least=0, at_most=0.5)]  # share of training labels to flip; 0.5: random labels

    def __post_init__(self) -> None:
        check_ranges(self)


def run(config: NoisyLabelsConfig, context: Context) -> dict[str, Any]:
    """Write `preferences.jsonl`, with a column `flipped`, and the held-out pairs as they are.

    Raises RlhfError if there are fewer pairs than `pairs`.
    """
    train, held_out = load_preferences(context, config.preferences)
    count = len(train) if config.pairs is None else config.pairs
    if count > len(train):
        raise RlhfError(
            f"config.{context.name}.pairs = {count}, but {config.preferences} has {len(train)} training pairs"
        )
    # The stage's name is not part of the key.
    key = derive(jax.random.key(context.seed), "noisy labels")
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    order, chances = rng.permutation(len(train)), rng.random(len(train))
    rows = [flip(train[i]) if chances[i] < config.flipped else train[i] | {"flipped": False} for i in order[:count]]
    write_rows(context.directory / PREFERENCES.train, rows)
    write_rows(context.directory / PREFERENCES.eval, held_out)
    share = float(np.mean([row["flipped"] for row in rows]))
    context.bar.update(1, 1, {"pairs": count, "flipped": share})
    return {"train_pairs": count, "eval_pairs": len(held_out), "flipped_share": share}


def flip(row: Row) -> Row:
    """Exchange the chosen and the rejected response of a pair, with their scores."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    other |= {f"{name}_score": f"{its}_score" for name, its in other.items()}
    return {name: row[other[name]] if name in other else value for name, value in row.items()} | {"flipped": True}
