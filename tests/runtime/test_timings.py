"""Times of earlier runs, found again for a stage with the same cost."""

from rlhf_jax.runtime import timings
from rlhf_jax.runtime.timings import FILE, Timing, add_timing, cost_key, read_timings

SECTION = {
    "kind": "dpo",
    "batch_size": 64,
    "beta": 0.1,
    "epochs": 0.5,
    "optimizer": {"learning_rate": 1e-3, "b1": None},
}


def key(section, common=None, inputs=()):
    return cost_key(section, common or {"data": {"limit": None}, "rows": ["hash"]}, inputs)


def test_coefficients_do_not_change_the_cost_and_sizes_do():
    same = SECTION | {"beta": 0.3, "optimizer": {"learning_rate": 1e-4, "b1": None}}
    assert key(same) == key(SECTION)
    others = [
        key(SECTION | {"batch_size": 32}),
        key(SECTION | {"epochs": 1.0}),
        key(SECTION, {"data": {"limit": 8}, "rows": ["hash"]}),
        key(SECTION, inputs=["sft"]),
        key(SECTION),
    ]
    assert len(set(others)) == 5


def test_timings_are_kept_the_newest_last(tmp_path, monkeypatch):
    monkeypatch.setattr(timings, "MOST", 4)
    directory = tmp_path / "cache"
    assert read_timings(directory) == {} == read_timings(None)
    for number in range(5):
        add_timing(directory, f"key {number}", Timing(float(number), None, 1))
    add_timing(directory, "key 1", Timing(7.0, 3.0, 2))
    found = read_timings(directory)
    assert len(found) == 4 and "key 0" not in found
    assert list(found)[-1] == "key 1" and found["key 1"] == Timing(7.0, 3.0, 2)


def test_no_cache_and_a_damaged_file_mean_no_estimate(tmp_path):
    add_timing(None, "key", Timing(1.0, None, 1))
    (tmp_path / FILE).write_text("{")
    assert read_timings(tmp_path) == {}
    (tmp_path / FILE).write_text('{"key": {"seconds": 3}}')
    assert read_timings(tmp_path) == {}
    add_timing(tmp_path, "key", Timing(1.0, None, 1))
    assert read_timings(tmp_path) == {"key": Timing(1.0, None, 1)}
