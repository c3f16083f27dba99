"""Tables of rankings."""

import pytest

from rlhf_jax.data.formats import kind_of, ranked_rows
from rlhf_jax.types import RlhfError


def test_rankings_stand_in_the_order_of_their_scores():
    rows = [
        {"prompt": "p", "completions": ["a", "b", "c"], "scores": [0, 2.5, 1], "id": 7},
        {"prompt": "q", "completions": ["best", "worst"]},
    ]
    assert kind_of(rows) == "ranked"
    assert kind_of([rows[0] | {"completion": "b"}]) == "prompt_completion"  # as Best-of-N writes its rows
    assert ranked_rows(rows, "t") == [
        {"prompt": "p", "completions": ["b", "c", "a"], "scores": [2.5, 1.0, 0.0], "id": 7},
        {"prompt": "q", "completions": ["best", "worst"], "scores": [1.0, 0.0]},
    ]


def test_rankings_of_chats():
    def said(text):
        return [{"role": "assistant", "content": text}]

    row = {"prompt": [{"role": "user", "content": "p"}], "completions": [said("a"), said("b")], "scores": [1, 2]}
    assert ranked_rows([row], "t")[0]["completions"] == [said("b"), said("a")]
    with pytest.raises(RlhfError, match=r"t, row 1, column completions\[1\] is of type str"):
        ranked_rows([row | {"completions": [said("a"), "b"]}], "t")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completions": ["a"]}, "row 1, column completions must be a list of at least two"),
        ({"completions": "ab"}, "row 1, column completions must be a list of at least two"),
        ({"completions": ["a", None]}, r"row 1, column completions\[1\] is null"),
        ({"scores": [1]}, "row 1, column scores does not give a number for each of 2"),
        ({"scores": [1, "2"]}, "row 1, column scores does not give a number"),
        ({"scores": [1, float("nan")]}, "row 1, column scores does not give a number"),
    ],
    ids=["one", "text", "null", "too few", "text score", "nan"],
)
def test_rankings_that_cannot_be_are_named(changes, message):
    with pytest.raises(RlhfError, match=message):
        ranked_rows([{"prompt": "p", "completions": ["a", "b"], "scores": [1, 2]} | changes], "t")
