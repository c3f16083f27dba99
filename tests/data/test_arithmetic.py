"""Generated word problems: solutions that are right, stories that tell them, and splits that share no problem."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data import formats
from rlhf_jax.data.arithmetic import ArithmeticConfig, generate, split_of
from rlhf_jax.types import RlhfError

SPLITS = ("train", "validation", "test")
CALCULATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@st.composite
def configs(draw):
    least = draw(st.integers(1, 4))
    return ArithmeticConfig(
        split=draw(st.sampled_from(SPLITS)),
        problems=draw(st.integers(1, 8)),
        steps=(least, draw(st.integers(least, 5))),
        largest=draw(st.one_of(st.integers(10, 30), st.integers(1000, 2000))),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


def solve(story: str) -> int:
    """Solve a problem by the words of its sentences."""
    first, *sentences, question = re.split(r"(?<=\.) ", story)
    ((name, value),) = re.findall(r"^(\w+) has (\d+) ", first)
    assert re.fullmatch(rf"How many \w+ does {name} have\?", question)
    value = int(value)
    for sentence in sentences:
        (number,) = map(int, re.findall(r"\d+", sentence))
        if "times as many" in sentence:
            value *= number
        elif "equal" in sentence:
            assert value % number == 0
            value //= number
        elif re.search(rf"buys|finds|gives {name}", sentence):
            value += number
        else:
            assert re.match(rf"{name} (gives|loses|sells) ", sentence)
            value -= number
    return value


@given(configs())
@settings(deadline=None, max_examples=40)
def test_every_solution_is_right_and_is_that_of_its_story(config):
    rows = generate(config)
    assert len({row["prompt"] for row in rows}) == config.problems
    for row in rows:
        calculations, last = row["completion"].split("\n")
        found = [CALCULATION.findall(each)[0] for each in calculations.removeprefix(" ").split(", ")]
        assert calculations == " " + ", ".join(f"{left} {sign} {number} = {end}" for left, sign, number, end in found)
        assert config.steps[0] <= len(found) <= config.steps[1]
        for left, sign, number, result in found:
            assert int(result) * (int(number) if sign == "/" else 1) == (
                int(left) if sign == "/" else eval(f"{left} {sign} {number}")
            )
            assert 2 <= int(number) <= config.largest and 1 <= int(result) <= config.largest
        assert [left for left, *_ in found[1:]] == [result for *_, result in found[:-1]]
        assert last == f"#### {row['answer']}" and found[-1][-1] == row["answer"]
        assert re.findall(r"\d+", row["prompt"]) == [found[0][0], *(number for _, _, number, _ in found)]
        assert solve(row["prompt"]) == int(row["answer"])
        assert split_of(calculations[1:]) == config.split


def test_splits_share_no_calculations_even_with_other_seeds():
    drawn = {}
    for seed, split in enumerate(SPLITS):
        rows = generate(ArithmeticConfig(split=split, problems=300, steps=(1, 2), largest=20, seed=seed))
        drawn[split] = {row["completion"] for row in rows}
    assert len(drawn["train"]) > 200
    assert not drawn["train"] & drawn["test"] and not drawn["train"] & drawn["validation"]
    assert not drawn["test"] & drawn["validation"]


def test_the_shares_of_the_splits():
    counts = dict.fromkeys(SPLITS, 0)
    for left in range(100):
        for number in range(100):
            counts[split_of(f"{left} + {number} = {left + number}")] += 1
    assert [round(counts[split] / 10_000, 2) for split in SPLITS] == [0.8, 0.1, 0.1]


def test_a_table_is_the_same_every_time_and_depends_on_its_settings():
    source = "arithmetic:train,problems=3,steps=2-3,largest=50"
    rows = formats.read_table(source)
    assert rows[0] == {
        "prompt": "Ada has 34 pens. Ada keeps one of 2 equal parts. With Emma it is 2 times as many. Ada keeps one of "
        "2 equal parts. How many pens does Ada have?",
        "completion": " 34 / 2 = 17, 17 * 2 = 34, 34 / 2 = 17\n#### 17",
        "answer": "17",
    }
    generate.cache_clear()
    assert formats.read_table(source) == rows
    assert formats.read_table(source.replace("problems=3", "problems=9"))[:3] == rows
    others = [
        f"{source},seed=1",
        source.replace("train", "test"),
        source.replace("2-3", "2"),
        source.replace("50", "51"),
    ]
    hashes = {formats.file_hash(each) for each in (source, *others)}
    assert len(hashes) == 5 and all(len(sha256) == 64 for sha256 in hashes)
    assert formats.kind_of(rows) == "prompt_completion"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("arithmetic:train", "does not set problems, steps, largest: write arithmetic:train,problems=..."),
        ("arithmetic:eval,problems=9,steps=1,largest=9", "no split 'eval': give one of train, validation, test"),
        ("arithmetic:test,problem=9,steps=1,largest=9", "'problem' is not a setting: give problems=..., steps=..."),
        ("arithmetic:test,problems,steps=1,largest=9", "'problems' is not a setting"),
        ("arithmetic:test,problems=x,steps=1,largest=9", "problems = 'x' is not an integer"),
        ("arithmetic:test,problems=9,steps=3-1,largest=9", "steps = 3-1 must be LEAST-MOST"),
        ("arithmetic:test,problems=0,steps=1,largest=9", "problems = 0 must be at least 1"),
        ("arithmetic:test,problems=9,steps=0,largest=9", "steps = (0, 0) must be at least 1 in every element"),
        ("arithmetic:test,problems=9,steps=1,largest=3", "largest = 3 must be at least 4"),
        (
            "arithmetic:validation,problems=50,steps=1,largest=4",
            "only 0 different problems were found for the split validation, instead of 50",
        ),
    ],
)
def test_a_malformed_source_is_named(source, message):
    with pytest.raises(RlhfError, match=re.escape(message)):
        formats.read_table(source)
