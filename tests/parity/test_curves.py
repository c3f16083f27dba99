"""Whole runs of our stages beside those of TRL's trainers: loss and gradient norm of every step, and the final weights.

The mean difference between our run and TRL's must be at most three times, and the greatest at most ten times, those
between TRL's run and TRL's runs with the rows of each batch in another order, which differ by rounding alone. A single
step decides the greatest, and another processor rounds otherwise.
"""

import numpy as np
import pytest

from tests.parity import trl_curves, trl_curves_online, trl_curves_ppo
from tests.support import curves, curves_online
from tests.support.against_trl import read
from tests.support.curves import Curve, World

OF_MEAN, OF_GREATEST, ORDERS = 3, 10, 5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return trl_curves.make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", curves.SECTIONS)
def test_a_run_is_trls(name, world, tmp_path):
    order = curves.order()
    theirs = trl_curves.run(name, world, order)
    again = [trl_curves.run(name, world, reordered(name, order, seed)) for seed in range(ORDERS)]
    ours = curves.run(name, world, tmp_path)
    assert_close(ours, theirs, again, further=rounding(name, theirs))
    assert_golden(name, theirs)
    assert theirs.loss[-5:].mean() < 0.8 * theirs.loss[:5].mean()
    assert (theirs.grad_norm > curves.OPTIMIZER["max_grad_norm"]).any()  # clipping is part of the run


@pytest.mark.parametrize("name", curves_online.SECTIONS)
def test_a_run_on_given_rollouts_is_trls(name, world, tmp_path):
    theirs, *again = given_rollouts(name, world, 1 + ORDERS)
    assert_close(curves_online.run(name, world, tmp_path, trim_padding=True), theirs, again)
    assert_golden(name, theirs)


def given_rollouts(name: str, world: World, count: int) -> list[Curve]:
    """TRL's runs, the first with the rows as they are and the others with those of each iteration in another order."""
    if name != "ppo":
        return [trl_curves_online.run(name, world, seed) for seed in range(count)]
    order = np.tile(np.arange(curves.BATCH), (curves_online.ITERATIONS, 1))
    return trl_curves_ppo.run(world, [order, *(reordered(name, order, seed) for seed in range(1, count))])


def reordered(name: str, order: np.ndarray, seed: int) -> np.ndarray:
    """The rows of each batch in another order.

    KTO's batches are rotated, as each prompt is also paired with the response of the row before.
    """
    rng = np.random.default_rng(seed)
    if name == "kto":
        return np.stack([np.roll(rows, rng.integers(1, len(rows))) for rows in order])
    return rng.permuted(order, axis=1)


def rounding(name: str, run: Curve) -> np.ndarray:
    """Standard deviation of what decay rounds differently in the two: zero for runs without weight decay.

    torch multiplies the weights by 1 - rate * weight_decay and rounds twice in doing so; optax adds the decay to the
    update. Each rounding of each step is uniform within half a spacing of float32.
    """
    weights = flat(run.weights)
    return np.spacing(np.abs(weights)) * np.sqrt(2 * curves.STEPS / 12) * (name == "sft_decayed")


def assert_close(ours: Curve, theirs: Curve, again: list[Curve], *, further: np.ndarray | float = 0.0) -> None:
    for part in Curve._fields:
        # Of a normal variable, in standard deviations: the mean magnitude is 0.8, the greatest of a thousand 3.3.
        more = further if part == "weights" else np.zeros(1)
        own = [difference(one, theirs, part) for one in again]
        found = difference(ours, theirs, part)
        greatest = max(one.max() for one in own) + 3.3 * np.max(more)
        mean = max(one.mean() for one in own) + 0.8 * np.mean(more)
        figures = f"{part}: {found.max():.2e}, {found.mean():.2e}; TRL itself {greatest:.2e}, {mean:.2e}"
        print(figures)
        assert 0 < greatest < 1e-3, figures
        assert found.max() <= OF_GREATEST * greatest, figures
        assert found.mean() <= OF_MEAN * mean, figures


def difference(one: Curve, other: Curve, part: str) -> np.ndarray:
    a, b = getattr(one, part), getattr(other, part)
    if part == "weights":
        assert a.keys() == b.keys()
        a, b = flat(a), flat(b)
    return np.abs(a - b)


def flat(weights: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([weights[path].reshape(-1) for path in sorted(weights)])


def assert_golden(name: str, theirs: Curve) -> None:
    """The golden file, which tests without torch read, is up to date with the installed TRL."""
    _, golden = read(curves.GOLDEN)
    for part in ("loss", "grad_norm"):
        first = getattr(theirs, part)[: curves.FIRST]
        np.testing.assert_allclose(golden[f"{name}/{part}"], first, rtol=1e-4, atol=1e-6, err_msg=part)
