"""Losses, advantages and metrics against TRL's own trainers, in values and in gradients."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.methods.dpo import ReferenceUpdate, sync_reference
from tests.parity import trl_1_12, trl_1_16, trl_1_16_online, trl_1_16_preferences, write_goldens
from tests.support.against_trl import CHECKS, read

RECORD = {
    "dpo": trl_1_16.record_dpo,
    "sft": trl_1_16.record_sft,
    "reward": trl_1_16.record_reward,
    "centered_reward": trl_1_16.record_centered_reward,
    "ppo": trl_1_12.record,
    "online": trl_1_16_online.record,
    "preferences": trl_1_16_preferences.record,  # a trainer for each of its losses: one seed is enough
}
CASES = [(name, seed) for name in RECORD for seed in ([1] if name == "preferences" else [1, 2])]


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_our_numbers_are_those_of_trl(name, seed):
    for check in CHECKS[name]:
        check(RECORD[name](seed))


def test_the_reference_follows_as_trls_does():
    policy, reference = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    update = ReferenceUpdate(alpha=0.6, every=1)
    ours = sync_reference(update, jnp.asarray(reference), jnp.asarray(policy), jnp.int32(1))
    np.testing.assert_allclose(ours, trl_1_16_preferences.synchronised(policy, reference, 0.6), rtol=1e-6)


def test_ppo_saw_the_settings_that_the_checks_assume():
    given = {}
    for check in CHECKS["ppo"]:
        given.update(getattr(check, "keywords", {}))
    assert given == trl_1_12.SETTINGS


def test_group_methods_saw_the_settings_that_the_checks_assume():
    given = {}
    for check in CHECKS["online"]:
        given.update(getattr(check, "keywords", {}))
    assert given == trl_1_16_online.SETTINGS


def test_goldens_are_what_trl_computes_today(tmp_path):
    write_goldens.write(tmp_path)
    golden = {path.name for path in write_goldens.GOLDENS.iterdir()} - {"curves.json"}  # test_curves.py has that
    assert {path.name for path in tmp_path.iterdir()} == golden
    for path in tmp_path.iterdir():
        versions, arrays = read(path)
        golden_versions, golden_arrays = read(write_goldens.GOLDENS / path.name)
        assert versions == golden_versions, "write the goldens anew: python -m tests.parity.write_goldens"
        assert arrays.keys() == golden_arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_allclose(array, golden_arrays[name], rtol=1e-3, atol=1e-4, err_msg=f"{path.name} {name}")
