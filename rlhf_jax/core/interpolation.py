"""Interpolation of a run's score at given KL divergences, to compare methods at equal divergence."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def score_at_kl(kl: ArrayLike, score: ArrayLike, targets: Sequence[float]) -> list[float | None]:
    r"""Score of a run where its divergence first reaches each target, interpolated between checkpoints.

    The score is interpolated linearly in $\sqrt{KL}$, the distance of Bai et al. 2022 (arXiv:2204.05862, section 4.3)
    and Gao et al. 2022 (arXiv:2210.10760), in which scores initially grow linearly.

    Args: kl (nats) and score of the checkpoints in the order of training, starting with the initial policy (KL 0).
    Negative estimates count as 0. Targets are in nats, above 0.
    Returns: a score for each target; None if the run never reached it.
    """
    distance = np.sqrt(np.maximum(np.asarray(kl, np.float64), 0))
    score = np.asarray(score, np.float64)
    scores: list[float | None] = []
    for target in np.sqrt(np.asarray(targets, np.float64)):
        reached = np.flatnonzero(distance >= target)
        if not len(reached):
            scores.append(None)
            continue
        after = int(reached[0])
        if after == 0:
            scores.append(float(score[0]))
            continue
        share = (target - distance[after - 1]) / (distance[after] - distance[after - 1])
        scores.append(float(score[after - 1] + share * (score[after] - score[after - 1])))
    return scores
