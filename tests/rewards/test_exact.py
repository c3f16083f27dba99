"""The exact reward: 1 for a solution that ends in the known answer, and 0 for any other."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_jax.rewards.exact import exact_answer
from rlhf_jax.rewards.functions import load_function
from rlhf_jax.types import RlhfError

NUMBERS = st.integers(-(10**12), 10**12)


@given(st.text(), NUMBERS, NUMBERS)
def test_only_the_final_number_counts(text, number, other):
    solution = f"{text}\n#### {number:,}\n"
    known = [number, str(number), f"{number:,}", f"so it is {other}\n#### {number}"]
    assert exact_answer([solution] * 4, known) == [1.0] * 4
    assert exact_answer([solution], [other]) == [float(number == other)]
    assert exact_answer([f"{text}\n#### {other}\n#### {number}"], [number]) == [1.0]


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "42",
        "#### ",
        "#### 420",
        "#### 4",
        "#### -42",
        "#### 42 apples",
        "#### 42\n7 + 7 = 14",
        "### 42",
        "#### 4 2",
    ],
)
def test_other_ends_are_wrong(completion):
    assert exact_answer([completion], ["42"]) == [0.0]


def test_chats_prices_and_decimals():
    chat = [{"role": "assistant", "content": "6 * 7 = 42\n#### 42"}]
    assert exact_answer([chat, "#### $42", "####42.0", "#### 0.5"], ["42", "42", "42", ".50"]) == [1.0] * 4


def test_a_config_names_it():
    function = load_function("rlhf_jax.rewards.exact:exact_answer")
    columns = {"answer": ["2", "3"], "other": [0, 0]}
    assert function(["a", "b"], ["#### 2", "#### 2"], columns).tolist() == [1.0, 0.0]
    with pytest.raises(RlhfError, match="needs answer, but only prompts, completions are available"):
        function(["a"], ["#### 2"], {})


def test_an_answer_that_is_no_number_is_named():
    with pytest.raises(RlhfError, match="column answer has 'four': give a number, or a solution that ends in #### N"):
        exact_answer(["#### 4"], ["four"])
