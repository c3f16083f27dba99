"""Reward functions: found by their names, called as TRL calls them, and held to what they return."""

import numpy as np
import pytest

from rlhf_jax.rewards.functions import load_function, weighted_sum
from rlhf_jax.types import RlhfError
from rlhf_jax.user_code import file_hash

FILE = """
import dataclasses

@dataclasses.dataclass
class Seen:
    names: list

def length(completions, **kwargs):
    return [len(text) for text in completions]

def right(prompts, completions, answer):
    return [float(a in c) for a, c in zip(answer, completions)]

def seen(prompts, completions, **kwargs):
    return [Seen(sorted(kwargs)).names == ["answer", "difficulty"]] * len(prompts)

def positional_only(completions, /, prompts=None, **kwargs):
    return [0.0]

def raises(completions, **kwargs):
    return [1 / 0 for _ in completions]

def sometimes(completions, **kwargs):
    return [None if "?" in text else float("nan") if "!" in text else 1 for text in completions]

def short(completions, **kwargs):
    return [1.0]

def infinite(completions, **kwargs):
    return [float("inf")] * len(completions)

def beyond(completions, **kwargs):
    return [1e300] * len(completions)

def beyond_all(completions, **kwargs):
    return [10**400] * len(completions)

def several(completions, **kwargs):
    import numpy
    return [numpy.ones(2)] * len(completions)

def words(completions, **kwargs):
    return ["1"] * len(completions)

def number(completions, **kwargs):
    return 1.0

async def later(completions, **kwargs):
    return [1.0] * len(completions)

NOTHING = 3
"""
PROMPTS, COMPLETIONS = ["a", "b"], ["one", "two!"]
COLUMNS = {"answer": ["on", "x"], "difficulty": [1, 2]}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("functions") / "mine.py"
    path.write_text(FILE)
    return path


def call(file, name):
    return load_function(f"{file}:{name}")(PROMPTS, COMPLETIONS, COLUMNS)


def test_functions_are_given_what_they_take(file):
    np.testing.assert_array_equal(call(file, "length"), [3, 4])
    np.testing.assert_array_equal(call(file, "right"), [1, 0])
    np.testing.assert_array_equal(call(file, "seen"), [1, 1])
    np.testing.assert_array_equal(call(file, "sometimes"), [1, np.nan])


def test_functions_of_modules():
    found = load_function("rlhf_jax.core.statistics:standard_error")
    assert found.function([1.0, 3.0]) == 1.0
    assert len(file_hash("rlhf_jax.core.statistics:standard_error")) == 64


def test_a_changed_file_is_another_function(tmp_path):
    path = tmp_path / "mine.py"
    found = []
    for value in (1, 2):
        path.write_text(f"def f(completions): return [{value}] * len(completions)")
        found.append((file_hash(f"{path}:f"), load_function(f"{path}:f")([], ["x"], {})[0]))
    assert found[0][0] != found[1][0] and (found[0][1], found[1][1]) == (1, 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"mine.py:raises raised ZeroDivisionError: division by zero \(.*mine.py, line 21\)"),
        ("short", "mine.py:short returned 1 rewards for 2 completions"),
        ("infinite", "mine.py:infinite returned inf for completion 1 of 2"),
        ("beyond", r"returned 1e\+300 for completion 1 of 2"),
        ("beyond_all", "returned 10+ for completion 1 of 2"),
        ("several", r"returned array\(\[1., 1.\]\) for completion 1 of 2"),
        ("words", "returned '1' for completion 1 of 2"),
        ("number", "returned a float: return a list"),
        ("later", "is asynchronous"),
        ("NOTHING", "has no function 'NOTHING'"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_what_goes_wrong_in_a_function_is_one_message_that_names_it(file, name, message):
    with pytest.raises(RlhfError, match=message):
        call(file, name)


def test_a_column_that_is_not_there_is_named(file):
    with pytest.raises(RlhfError, match=r"right needs answer, but only prompts, completions, difficulty"):
        load_function(f"{file}:right")(PROMPTS, COMPLETIONS, {"difficulty": [1, 2]})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.py:f", "nowhere.py:f cannot be loaded: FileNotFoundError"),
        ("no_such_module:f", "cannot be loaded: ModuleNotFoundError"),
        ("f", "names no reward function: write package.module:function"),
        ("mine.py:", "names no reward function"),
    ],
)
def test_functions_that_are_not_there(source, message):
    with pytest.raises(RlhfError, match=message):
        load_function(source)
    with pytest.raises(RlhfError):
        file_hash(source)


def test_a_file_that_does_not_load_is_named_and_read_again(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_the_kind")
    for _ in range(2):
        with pytest.raises(RlhfError, match=r"broken.py:f cannot be loaded: ModuleNotFoundError"):
            load_function(f"{path}:f")


def test_weights_add_up_what_applies():
    rewards = np.array([[1.0, 10.0], [np.nan, 10.0], [2.0, np.nan]])
    np.testing.assert_allclose(weighted_sum(rewards, (2.0, 0.5), ("f", "g"), "abc", "xyz"), [7, 5, 4])
    with pytest.raises(RlhfError, match="no reward applies to the completion 'two!' of the prompt 'b': f, g returned"):
        weighted_sum(np.array([[1.0, 2.0], [np.nan, np.nan]]), (1.0, 1.0), ("f", "g"), PROMPTS, COMPLETIONS)


def test_a_sum_beyond_float32_is_refused():
    with pytest.raises(RlhfError, match=r"weights = \(1e\+30,\) is too large: reduce the weights"):
        weighted_sum(np.array([[1e20]]), (1e30,), ["f"], ["p"], ["c"])
