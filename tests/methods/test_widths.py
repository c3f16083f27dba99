"""A step on padded rows is the step on wider rows, on rows with padding before the prompt, and on packed rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.layouts import Groups, PackedSize, layouts, packed
from rlhf_jax.data.ragged import Ragged, RaggedPairs, RowWidths, pair_table, token_table
from rlhf_jax.data.rows import limited
from rlhf_jax.methods import dpo, reward
from rlhf_jax.methods.offline import Updates
from rlhf_jax.methods.reward_table import RewardLossConfig
from rlhf_jax.runtime.checkpoints import TrainState
from rlhf_jax.runtime.optimizers import make_optimizer
from rlhf_jax.stages import kto, reward_model, sft
from rlhf_jax.text.tokenizer import TokenizerConfig, train_tokenizer
from tests.support import tiny
from tests.support.programs import assert_close

ROWS = np.arange(8)
K_WISE = RewardLossConfig(name="k_wise")
RANKED = [
    {"prompt": "the film", "completions": [" good", " bad and long", " dull"], "scores": [2.0, 1.0, 0.0]},
    {"prompt": "is", "completions": [" good and long", " bad"], "scores": [1.0, 0.0]},
] * 4


def pairs() -> RaggedPairs:
    return tiny.ragged_pairs(8)


def tokens():
    demonstrations = tiny.demonstrations(8)
    ends = np.cumsum(demonstrations.mask.sum(axis=1))
    return token_table(
        *(Ragged(array[demonstrations.mask], ends) for array in (demonstrations.tokens, demonstrations.loss_mask))
    )


def labelled() -> kto.Labelled:
    return kto.Labelled(pairs().chosen, ROWS % 3 == 0)


def comparisons():
    tokenizer = train_tokenizer(TokenizerConfig("word", tiny.VOCAB), ["the film is good and long", "bad dull"])
    config = limited(max_prompt_tokens=8, max_response_tokens=8)
    return reward.make_table(K_WISE, RANKED, tokenizer, config)


def k_wise_step(updates):
    return reward_model.make_step(updates, K_WISE)


LAST = dataclasses.replace(tiny.REWARD, pooling="last")
CASES = {
    "sft": (tiny.POLICY, sft.make_step, tokens),
    "dpo": (tiny.POLICY, dpo.make_step, lambda: pair_table(pairs())),
    "kto": (tiny.POLICY, kto.make_step, lambda: kto.make_table(kto.KTO, labelled())),
    "reward model, mean": (tiny.REWARD, reward_model.make_step, lambda: pair_table(pairs())),
    "reward model, last": (LAST, reward_model.make_step, lambda: pair_table(pairs())),
    "reward model, k-wise": (tiny.REWARD, k_wise_step, comparisons),
}
QUICK = ("dpo", "reward model, mean")
"""Cases of the quick tier; the others have their layouts."""
QUICK_CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.nightly) for name in CASES]


def packed_batch(batch, groups, width):
    given = layouts(batch, groups, width)
    size = PackedSize(*np.max([layout.size for layout in given], axis=0).tolist())
    return packed(batch, given, size, width)


def step_of(network, make_step, optimizer=tiny.OPTIMIZER):
    """A step from the same start: gradient norm, metrics and new parameters, for a batch."""
    name = "policy" if network is tiny.POLICY else "reward"
    params = {name: tiny.policy_params() if network is tiny.POLICY else tiny.reward_params()}
    state = TrainState(jnp.int32(0), params, make_optimizer(optimizer, 3).init(params))
    frozen = {"reference": tiny.policy_params(2), "beta": jnp.float32(0.3)}
    step = jax.jit(make_step(Updates(network, optimizer, 3, ())))

    def run(batch):
        new, metrics, _ = step(state, frozen, batch, jax.random.key(0))
        return jax.device_get((new.params, metrics))

    return run


@pytest.mark.parametrize("name", QUICK_CASES)
def test_the_width_of_a_batch_changes_no_gradient_and_no_metric_but_the_share_of_tokens(name):
    network, make_step, make_table = CASES[name]
    table, run = make_table(), step_of(network, make_step)
    needed = table.needed(ROWS)
    narrow, wide = (
        run(table.padded(ROWS, RowWidths(needed.sequence + more, needed.response + more))) for more in (0, 5)
    )
    shares = [result[1].pop("token_share") for result in (narrow, wide)]
    np.testing.assert_allclose(shares[0] * needed.sequence, shares[1] * (needed.sequence + 5), rtol=1e-6)
    assert_close(narrow, wide)
    assert narrow[1]["grad_norm"] > 1e-3


def test_padding_before_the_prompt_changes_nothing():
    run = step_of(tiny.POLICY, dpo.make_step)
    assert_close(run(pair_table(pairs()).all()), run(tiny.preferences(8)))


@pytest.mark.parametrize("micro_batch", [None, pytest.param(4, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("name", QUICK_CASES)
def test_packing_changes_no_gradient_and_no_metric_but_the_share_of_tokens(name, micro_batch):
    network, make_step, make_table = CASES[name]
    table = make_table()
    run = step_of(network, make_step, dataclasses.replace(tiny.OPTIMIZER, micro_batch=micro_batch))
    batch = table.padded(ROWS, table.needed(ROWS))
    width = 2 * table.longest
    given = packed_batch(batch, Groups(devices=1, micro_batches=8 // (micro_batch or 8)), width)
    parts = [part.packing.sequence for part in jax.tree.leaves(given, is_leaf=has_packing) if has_packing(part)]
    assert all(np.any((rows >= 0) & (rows != rows[..., :1])) for rows in parts)  # sequences share rows
    padded, joined = run(batch), run(given)
    share, _ = joined[1].pop("token_share"), padded[1].pop("token_share")
    trained = parts[: 1 if name == "kto" else None]  # not the mismatched responses
    np.testing.assert_allclose(share, np.mean([rows >= 0 for rows in trained]), rtol=1e-6)
    assert_close(padded, joined)
    assert padded[1]["grad_norm"] > 1e-3


def has_packing(x):
    return getattr(x, "packing", None) is not None
