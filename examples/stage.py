"""Your own kind of stage: keep the preference pairs whose labels a reward model confirms.

Pairs are often mislabelled if the chosen response does not score clearly higher than the rejected one. This stage
scores both responses and keeps the pairs whose margin is at least `margin`. In a config:

    "confirmed": {"kind": "examples/stage.py:Confirm", "preferences": None, "reward_model": "reward_model"},
    "dpo": {..., "preferences": "confirmed"},

`rlhf-jax fields examples/stage.py:Confirm` lists its fields. A changed file counts as a changed config.
"""

import dataclasses
from typing import Any

from rlhf_jax.config import ModelSource, NonNegative, StageName
from rlhf_jax.inference.score import score
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.tables import PREFERENCES, load_preferences
from rlhf_jax.runtime.files import write_rows
from rlhf_jax.stages.kinds import Kind
from rlhf_jax.types import RlhfError


@dataclasses.dataclass(frozen=True)
class ConfirmConfig:
    """Pairs, a reward model, and the smallest margin that confirms a label."""

    kind: str
    preferences: StageName | None  # stage that made the pairs; None: the experiment's data
    reward_model: ModelSource  # reward model that scores both responses
    margin: NonNegative = 0.0  # least margin: score of the chosen response minus score of the rejected one


def run(config: ConfirmConfig, context: Context) -> dict[str, Any]:
    """Write the confirmed pairs as the files that stages read as `preferences`, with their margins."""
    reward_model = context.reward_model(config.reward_model)
    summary: dict[str, Any] = {}
    for file, rows in zip(PREFERENCES, load_preferences(context, config.preferences), strict=True):
        chosen, rejected = (
            score(reward_model, [{"prompt": row["prompt"], "completion": row[side]} for row in rows])["score"]
            for side in ("chosen", "rejected")
        )
        margins = (chosen - rejected).tolist()
        kept = [row | {"margin": margin} for row, margin in zip(rows, margins, strict=True) if margin >= config.margin]
        if not kept:
            raise RlhfError(f"config.{context.name}.margin = {config.margin} leaves no pair for {file}: lower it")
        write_rows(context.directory / file, kept)
        summary[file] = {"read": len(rows), "kept": len(kept)}
    share = summary[PREFERENCES.train]["kept"] / summary[PREFERENCES.train]["read"]
    context.bar.update(1, 1, {"kept": share})
    return {**summary, "kept": share}


Confirm = Kind(config=ConfirmConfig, run=run, summary="Keep the preference pairs whose labels a reward model confirms")
