"""Evaluation of reward models: metrics on held-out pairs during training, and calibration at the end."""

from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from rlhf_jax.core import calibration
from rlhf_jax.data.pipeline import Content
from rlhf_jax.data.ragged import RaggedPairs
from rlhf_jax.loading.context import Context
from rlhf_jax.loading.models import RewardModel
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.runtime.files import write_json
from rlhf_jax.sampling.batches import score_sequences
from rlhf_jax.types import Json, Row

GROUPS, BINS, BARS = 5, 10, 30
"""Number of groups for accuracies, and of bins in the reliability diagram and the histograms."""


class HeldOut(NamedTuple):
    """Held-out pairs, as tokens and as rows."""

    pairs: RaggedPairs
    rows: list[Row]


def evaluate(
    network: ScalarNetwork, params: PyTree, data: HeldOut, context: Context
) -> tuple[dict[str, float], list[Row]]:
    """Compute `eval/accuracy`, `eval/judge_agreement` if the rows have a judge's scores, and some sample rows."""
    chosen, rejected = _scores(network, params, data.pairs, context)
    metrics = {"eval/accuracy": _agreement(chosen - rejected, np.ones(len(chosen)))}
    if "chosen_score" in data.rows[0]:
        judged = np.array([row["chosen_score"] - row["rejected_score"] for row in data.rows])
        metrics["eval/judge_agreement"] = _agreement(chosen - rejected, judged)
    pairs, rows = data
    samples = [
        {
            "seed": context.seed,
            "prompt": _shown(rows[i]["prompt"]),
            "completion": _shown(rows[i][side]),
            "score": float(scores[i]),
            "kl": None,
            "length": int(lengths[i]),
        }
        for i in range(min(4, len(rows)))
        for side, scores, lengths in zip(pairs._fields, (chosen, rejected), _lengths(pairs), strict=True)
    ]
    return metrics, samples


def report(model: RewardModel, data: HeldOut, context: Context) -> dict[str, float]:
    """Write `calibration.json` for the held-out pairs, and return its main numbers for `summary.json`.

    Accuracies with Wilson's interval for all pairs and for groups by the difference of scores (`by_margin`), the label
    margin (`by_label_margin`: the column margin or the difference of a judge's scores, if available) and the difference
    of lengths in tokens, chosen minus rejected (`by_length`). Calibration of the Bradley-Terry probabilities:
    `reliability`, `ece`. Histograms of the scores of chosen and rejected responses.
    """
    chosen, rejected = (
        scores.astype(np.float64) for scores in _scores(model.network, model.params, data.pairs, context)
    )
    margins = chosen - rejected
    correct = calibration.agreement(margins, np.ones(len(margins)))
    lengths = _lengths(data.pairs)
    reliability = calibration.reliability(1 / (1 + np.exp(-margins)), np.ones(len(margins)), bins=BINS)
    found: dict[str, Json] = {
        "all": calibration.accuracy(correct),
        "by_margin": calibration.accuracy_by(np.abs(margins), correct, bins=GROUPS),
        "by_length": calibration.accuracy_by(lengths[0] - lengths[1], correct, bins=GROUPS),
        "reliability": reliability,
        "ece": calibration.expected_calibration_error(reliability),
        "scores": calibration.histograms({"chosen": chosen, "rejected": rejected}, bins=BARS),
    }
    labels = _label_margins(data.rows)
    if labels is not None:
        found["by_label_margin"] = calibration.accuracy_by(np.abs(labels), correct, bins=GROUPS)
    write_json(context.directory / "calibration.json", found)
    overall = found["all"]
    return {
        "accuracy": overall["accuracy"],
        "accuracy_low": overall["low"],
        "accuracy_high": overall["high"],
        "ece": found["ece"],
        "score_mean": float(np.mean([chosen, rejected])),
        "score_std": float(np.std([chosen, rejected])),
    }


def _scores(network: ScalarNetwork, params: PyTree, pairs: RaggedPairs, context: Context) -> list[np.ndarray]:
    """Scores of all chosen responses, and of all rejected ones."""
    return [score_sequences(network, params, side, context.runtime.inference_batch) for side in pairs]


def _lengths(pairs: RaggedPairs) -> list[np.ndarray]:
    return [side.responses.lengths for side in pairs]


def _label_margins(rows: list[Row]) -> np.ndarray | None:
    if all(isinstance(row.get("margin"), (int, float)) for row in rows):
        return np.array([row["margin"] for row in rows], np.float64)
    if all("chosen_score" in row for row in rows):
        return np.array([row["chosen_score"] - row["rejected_score"] for row in rows], np.float64)
    return None


def _shown(content: Content) -> str:
    """Format a text or chat for display, with roles before messages."""
    if isinstance(content, str):
        return content
    return "\n".join(f"{message['role']}: {message['content']}" for message in content)


def _agreement(margins: np.ndarray, other: np.ndarray) -> float:
    """Share of pairs for which two margins have the same sign; ties count half."""
    return float(np.mean(calibration.agreement(margins, other)))
