"""A reference that follows the policy, and one whose log-probabilities are kept on disk."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import config as configs
from rlhf_jax.data import pipeline
from rlhf_jax.loading.models import NO_CHANGES
from rlhf_jax.loading.pretrained import load_checkpoint
from rlhf_jax.methods import reference_cache
from rlhf_jax.methods.dpo import PairLogps, ReferenceUpdate, pair_logps, sync_reference
from rlhf_jax.methods.preference_table import PreferenceLossConfig
from rlhf_jax.runtime.checkpoints import load_params
from rlhf_jax.stages.dpo import DPOConfig
from rlhf_jax.text.tokenizer import load_tokenizer
from rlhf_jax.types import RlhfError
from tests.support import disk, experiments, tiny, tokenizer_files
from tests.support.programs import assert_close

SIGMOID = PreferenceLossConfig()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "reference_logprobs"


def test_a_soft_update_goes_a_share_of_the_way_where_one_is_due():
    soft = ReferenceUpdate(alpha=0.25, every=3)
    theirs, own = {"w": jnp.asarray([0.0, 4.0])}, {"w": jnp.asarray([8.0, 4.0])}
    for step, expected in ((2, [0.0, 4.0]), (3, [2.0, 4.0]), (4, [0.0, 4.0]), (6, [2.0, 4.0])):
        np.testing.assert_allclose(sync_reference(soft, theirs, own, jnp.int32(step))["w"], expected)
    half, other = (jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree) for tree in (theirs, own))
    assert sync_reference(soft, half, other, jnp.int32(3))["w"].dtype == jnp.bfloat16


def counted(monkeypatch) -> list[int]:
    """Record the number of pairs that each call computes."""
    counts, pair_logps_all = [], reference_cache.pair_logps_all

    def counting(config, network, params, data, batch_size):
        counts.append(len(data.chosen))
        return pair_logps_all(config, network, params, data, batch_size)

    monkeypatch.setattr(reference_cache, "pair_logps_all", counting)
    return counts


def test_what_is_kept_is_what_the_network_says_and_is_computed_once(cache, monkeypatch):
    config, pairs, params = PreferenceLossConfig(ld_alpha=0.3), tiny.ragged_pairs(7), tiny.policy_params()
    counts = counted(monkeypatch)
    first, again = (reference_cache.precomputed_ref_logps(config, tiny.POLICY, params, pairs, 3) for _ in range(2))
    assert counts == [7]
    assert_close(first, again, tolerance=0)
    expected = jax.jit(lambda params, pairs: pair_logps(config, tiny.POLICY, params, pairs))
    expected = expected(params, tiny.preferences(7))
    assert_close(first, expected)
    assert [path.suffix for path in cache.iterdir()] == [".npy"]  # nothing half-written beside it


def test_another_model_other_data_or_another_template_is_computed_anew(cache, tmp_path):
    pairs, params = tiny.ragged_pairs(4), tiny.policy_params()
    other_params = {**params, "embedding": params["embedding"].at[0, 0].add(1e-6)}
    other_network = dataclasses.replace(
        tiny.POLICY, config=dataclasses.replace(tiny.POLICY.config, compute_dtype="bfloat16")
    )
    moved = pairs._replace(chosen=pairs.rejected)
    places = {
        reference_cache.cache_path(SIGMOID, tiny.POLICY, params, pairs),
        reference_cache.cache_path(SIGMOID, tiny.POLICY, other_params, pairs),
        reference_cache.cache_path(SIGMOID, other_network, params, pairs),
        reference_cache.cache_path(SIGMOID, tiny.POLICY, params, moved),
        reference_cache.cache_path(PreferenceLossConfig(ld_alpha=0.5), tiny.POLICY, params, pairs),
    }
    chat = [{"role": "user", "content": "is it good?"}]
    answers = [[{"role": "assistant", "content": content}] for content in ("it is", "is it?")]
    rows = [{"prompt": chat, "chosen": answers[0], "rejected": answers[1]}]
    data = experiments.data_config(tmp_path / "unread")
    for template in (tokenizer_files.CHATML, tokenizer_files.CHATML.replace(r"\n", r"\n\n")):
        tokenizer = load_tokenizer(tokenizer_files.chatml(tmp_path / str(len(places)), template))
        places.add(
            reference_cache.cache_path(SIGMOID, tiny.POLICY, params, pipeline.preferences(rows, tokenizer, data))
        )
    assert len(places) == 7
    assert {place.parent for place in places} == {cache}
    # What changes no log-probability is no other file.
    beta = PreferenceLossConfig(losses=("ipo",))
    assert reference_cache.cache_path(beta, tiny.POLICY, params, pairs) in places


def test_a_disk_that_is_full_is_one_message_and_leaves_nothing(cache, monkeypatch):
    computed = PairLogps(*np.zeros((4, 99), np.float32))
    monkeypatch.setattr(
        reference_cache, "pair_logps_all", lambda *_: computed
    )  # or the compiler would write files of its own
    params, pairs = tiny.policy_params(), tiny.ragged_pairs(7)  # compiled programs are files, too
    with disk.largest_file(100), pytest.raises(RlhfError, match=r"reference_logprobs.* cannot be written"):
        reference_cache.precomputed_ref_logps(SIGMOID, tiny.POLICY, params, pairs, 3)
    assert disk.left_in(cache) == []


def test_a_file_that_is_broken_is_one_message(cache, monkeypatch):
    monkeypatch.setattr(reference_cache, "pair_logps_all", lambda *_: PairLogps(*np.zeros((4, 7))))
    arguments = SIGMOID, tiny.POLICY, tiny.policy_params(), tiny.ragged_pairs(7)
    reference_cache.precomputed_ref_logps(*arguments, 3)
    next(cache.iterdir()).write_bytes(b"half")
    with pytest.raises(RlhfError, match=r"cannot be written or read .* remove it"):
        reference_cache.precomputed_ref_logps(*arguments, 3)


@pytest.mark.nightly
def test_a_run_with_a_kept_reference_is_the_run_with_a_live_one(cache, tmp_path, monkeypatch):
    model, _ = experiments.models(tmp_path)
    counts = counted(monkeypatch)
    stages = {
        "live": experiments.dpo_section(model),
        "kept": experiments.dpo_section(model, cached_reference=True),
        "again": experiments.dpo_section(model, cached_reference=True, beta=0.1),
        "follows": experiments.dpo_section(model, reference_update={"alpha": 1.0, "every": 4}),
    }
    done = experiments.run(tmp_path / "run", experiments.preference_rows(tmp_path / "pairs.jsonl"), stages)
    metrics = {name: experiments.rows(done.find(name) / "metrics.jsonl") for name in stages}
    assert counts == [24]  # once, for two stages, training and evaluation: the rows are the same
    for live, kept in zip(metrics["live"], metrics["kept"], strict=True):
        for name in ("loss", "rewards/chosen", "rewards/margins", "grad_norm", "eval/loss", "eval/rewards/margins"):
            assert (name in live) == (name in kept)
            np.testing.assert_allclose(live.get(name, 0), kept.get(name, 0), rtol=1e-3, atol=1e-5, err_msg=name)
    losses = {name: [row["loss"] for row in rows] for name, rows in metrics.items()}
    assert len(losses["live"]) == 12
    assert abs(losses["live"][-1] - np.log(2)) > 1e-2
    for name in ("live", "kept", "again", "follows"):
        np.testing.assert_allclose(losses[name][0], np.log(2), rtol=1e-5)
    # After every fourth step the policy is its own reference, and has left it a step later.
    same = np.abs(np.array(losses["follows"]) - np.log(2)) < 1e-5
    np.testing.assert_array_equal(same, np.arange(12) % 4 == 0)
    np.testing.assert_allclose(metrics["follows"][-1]["eval/loss"], np.log(2), rtol=1e-5)  # it has just been updated
    assert abs(metrics["live"][-1]["eval/loss"] - np.log(2)) > 1e-2

    checkpoint, like = done.find("follows") / "checkpoints", load_checkpoint(model, NO_CHANGES).params
    policy, theirs = (load_params(checkpoint, name, like, step=None) for name in ("policy", "reference"))
    assert_close(policy, theirs, tolerance=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cached_reference": True, "reference_update": {"alpha": 0.5, "every": 2}}, "which reference_update changes"),
        ({"cached_reference": True, "loss": {"losses": ["simpo"]}}, "cached_reference has no effect with simpo"),
        (
            {"reference_update": {"alpha": 0.5, "every": 2}, "loss": {"losses": ["sft"]}},
            "reference_update has no effect",
        ),
        ({"reference_update": {"alpha": 0.0, "every": 2}}, "alpha = 0.0 must be above 0"),
        ({"reference_update": {"alpha": 1.0, "every": 0}}, "every = 0 must be at least 1"),
    ],
    ids=["both", "unread", "unread update", "alpha", "every"],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(RlhfError, match=message):
        configs.build(DPOConfig, experiments.dpo_section("sft", **changes), "config.dpo")
