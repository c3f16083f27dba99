"""Methods compared at equal divergence from where they began, not at whatever divergence each happened to end with."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def score_at_kl(kl: ArrayLike, score: ArrayLike, targets: Sequence[float]) -> list[float | None]:
    r"""A run's score where its divergence first reaches each target, interpolated between its checkpoints.

    Between two checkpoints the score is taken to be linear in $\sqrt{KL}$, the distance of Bai et al. 2022
    (arXiv:2204.05862, section 4.3) and Gao et al. 2022 (arXiv:2210.10760), in which runs are straight at their
    beginning.

    Args: kl in nats and score of the checkpoints, in the order of training, the start (KL 0) first. Estimates below 0
    count as 0. Targets in nats, above 0.
    Returns: a score for each target; None where the run never went so far.
    """
    distance = np.sqrt(np.maximum(np.asarray(kl, np.float64), 0))
    score = np.asarray(score, np.float64)
    found: list[float | None] = []
    for target in np.sqrt(np.asarray(targets, np.float64)):
        reached = np.flatnonzero(distance >= target)
        if not len(reached):
            found.append(None)
            continue
        after = int(reached[0])
        if after == 0:
            found.append(float(score[0]))
            continue
        share = (target - distance[after - 1]) / (distance[after] - distance[after - 1])
        found.append(float(score[after - 1] + share * (score[after] - score[after - 1])))
    return found
