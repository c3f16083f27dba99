"""Arithmetic word problems from a seeded generator, with worked solutions and exact answers.

A source `arithmetic:SPLIT,problems=2000,steps=1-3,largest=20` is a table that is generated when it is read; SPLIT is
train, validation or test, and `seed=1` gives other problems. Rows have a `prompt`, the problem; a `completion`, its
calculations and then a line `#### ANSWER`, as in GSM8K (Cobbe et al. 2021, arXiv:2110.14168); and the `answer`.
"""

import dataclasses
import functools
import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, NamedTuple, get_args

from rlhf_jax.config import Count, CountOrZero, Range, check_ranges
from rlhf_jax.types import RlhfError, Row

PREFIX = "arithmetic:"
"""Start of the name of a generated table."""

Split = Literal["train", "validation", "test"]

DRAWS = 100
"""Draws per problem before giving up; about ten suffice unless most of the possible problems are asked for."""

FACTORS = range(2, 10)
"""Numbers to multiply and to divide by."""

NAMES = ("Ada", "Ben", "Carla", "Dan", "Emma", "Felix", "Grace", "Hugo")
THINGS = ("apples", "books", "coins", "marbles", "pens", "shells", "stamps", "stickers")
TEMPLATES = {
    "+": ("{name} buys {number} more.", "{name} finds {number} more.", "{other} gives {name} {number} more."),
    "-": ("{name} gives {number} to {other}.", "{name} loses {number}.", "{name} sells {number}."),
    "*": ("{name} then has {number} times as many.", "With {other} it is {number} times as many."),
    "/": ("{name} keeps one of {number} equal parts.", "{name} fills {number} equal bags and keeps one."),
}


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig:
    """Number of problems of a split, and their difficulty."""

    split: Split
    problems: Count  # number of problems, all different
    steps: tuple[Count, Count]  # fewest and most calculations per problem
    largest: Annotated[int, Range(at_least=4)]  # largest number in a problem or its solution
    seed: CountOrZero = 0

    def __post_init__(self) -> None:
        check_ranges(self)
        least, most = self.steps
        if not least <= most:
            raise ValueError(f"steps = {least}-{most} must be LEAST-MOST")


class Calculation(NamedTuple):
    """One calculation: `left sign number = result`."""

    left: int
    sign: str
    number: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.sign} {self.number} = {self.result}"


def parse(source: str) -> ArithmeticConfig:
    """Parse the name of a generated table. Raises RlhfError, naming the field, if it is malformed or out of range."""
    split, *settings = source.removeprefix(PREFIX).split(",")
    readers: dict[str, Callable[[str], object]] = {"problems": int, "steps": _range, "largest": int, "seed": int}
    values: dict[str, object] = {}
    for name, equals, text in (setting.partition("=") for setting in settings):
        if not equals or name not in readers:
            raise RlhfError(
                f"{source}: {name!r} is not a setting: give {', '.join(f'{known}=...' for known in readers)}"
            )
        try:
            values[name] = readers[name](text)
        except ValueError:
            raise RlhfError(f"{source}: {name} = {text!r} is not an integer, or for steps LEAST-MOST") from None
    if split not in get_args(Split):
        raise RlhfError(f"{source}: there is no split {split!r}: give one of {', '.join(get_args(Split))}")
    if missing := [name for name in readers if name != "seed" and name not in values]:
        raise RlhfError(f"{source} does not set {', '.join(missing)}: write {PREFIX}{split},{missing[0]}=...")
    try:
        return ArithmeticConfig(split=split, **values)  # type: ignore[arg-type]
    except ValueError as error:
        raise RlhfError(f"{source}: {error}") from error


def _range(text: str) -> tuple[int, int]:
    least, dash, most = text.partition("-")
    return int(least), int(most if dash else least)


@functools.lru_cache(maxsize=8)
def generate(config: ArithmeticConfig) -> list[Row]:
    """Generate the rows of a table, the same ones every time.

    No prompt occurs twice, and the splits share no solution: `split_of` assigns each to one split, whatever the seed.
    Raises RlhfError if the difficulty does not allow so many different problems.
    """
    rng, rows = random.Random(f"{config.seed} {config.split}"), {}
    for _ in range(DRAWS * config.problems):
        steps = draw_steps(rng, config)
        prompt, calculations = tell(rng, steps), ", ".join(map(str, steps))
        if split_of(calculations) == config.split:
            answer = str(steps[-1].result)
            rows[prompt] = {"prompt": prompt, "completion": f" {calculations}\n#### {answer}", "answer": answer}
        if len(rows) == config.problems:
            return list(rows.values())
    raise RlhfError(
        f"only {len(rows)} different problems were found for the split {config.split}, instead of {config.problems}: "
        "raise largest or steps, or ask for fewer problems"
    )


def split_of(calculations: str) -> Split:
    """Split of a solution (80 % train, 10 % validation, 10 % test), determined by the SHA-256 of its calculations."""
    bucket = int.from_bytes(hashlib.sha256(calculations.encode()).digest()) % 10
    return "validation" if bucket == 8 else "test" if bucket == 9 else "train"


def draw_steps(rng: random.Random, config: ArithmeticConfig) -> list[Calculation]:
    """Draw the calculations: an operation at random among the possible ones, then its number.

    Every number is between 2 and `largest`, except that results may be 1.
    """
    value, steps = rng.randint(2, config.largest), []
    for _ in range(rng.randint(*config.steps)):
        choices = dict(_choices(value, config.largest))
        sign = rng.choice(list(choices))
        number = rng.choice(choices[sign])
        result = {"+": value + number, "-": value - number, "*": value * number, "/": value // number}[sign]
        steps.append(Calculation(value, sign, number, result))
        value = result
    return steps


def _choices(value: int, largest: int) -> Iterator[tuple[str, range | list[int]]]:
    """Yield the possible operations with their numbers."""
    numbers = {
        "+": range(2, largest - value + 1),
        "-": range(2, value),
        "*": [number for number in FACTORS if value > 1 and value * number <= largest],
        "/": [number for number in FACTORS if value % number == 0],
    }
    return ((sign, found) for sign, found in numbers.items() if found)


def tell(rng: random.Random, steps: list[Calculation]) -> str:
    """Tell the calculations as a story that ends in a question."""
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    sentences = [f"{name} has {steps[0].left} {things}."]
    for step in steps:
        template = rng.choice(TEMPLATES[step.sign])
        sentences.append(template.format(name=name, other=other, number=step.number))
    return " ".join([*sentences, f"How many {things} does {name} have?"])
