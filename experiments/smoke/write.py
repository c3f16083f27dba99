"""Write the data of the experiments' smoke variants: synthetic sentences about films, with ratings and preferences.

    python experiments/smoke/write.py

`reviews_*.jsonl` have the columns `text`, `rating` (-4 to 4), `label` (1 where the rating is positive) and `stars` (1
to 10); `pairs_*.jsonl` have `prompt`, `chosen` and `rejected`. A sentence's rating is the mean of the ratings of its
adjectives plus noise. The data contain no text by other authors, so they are under this repository's licence.
"""

import json
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SUBJECTS = ("the film", "this movie", "the plot", "the cast", "the ending", "the music", "her role", "the director")
ADVERBS = ("", "", "", "rather ", "very ", "often ", "quite ")
LINKS = (" and ", " but ", ", yet ", " because ", " while ", "; ")
ADJECTIVES = {
    "wonderful": 4,
    "moving": 3,
    "funny": 3,
    "bright": 2,
    "charming": 2,
    "warm": 1,
    "long": 0,
    "quiet": 0,
    "strange": -1,
    "slow": -1,
    "flat": -2,
    "dull": -2,
    "clumsy": -3,
    "awful": -4,
}
"""Adjectives and their ratings."""

REVIEWS = {"train": 640, "eval": 200, "test": 200}
PAIRS = {"train": 64, "eval": 24}


def main(directory: Path = HERE) -> None:
    """Write all files below `directory`; the same bytes every time."""
    rng = random.Random(0)
    for split, count in REVIEWS.items():
        write(directory / f"reviews_{split}.jsonl", [review(rng) for _ in range(count)])
    for split, count in PAIRS.items():
        write(directory / f"pairs_{split}.jsonl", [pair(rng) for _ in range(count)])


def review(rng: random.Random) -> dict[str, Any]:
    """Draw a review of two clauses with its rating."""
    (first, one), (second, other) = clause(rng), clause(rng)
    rating = round(min(max((one + other) / 2 + rng.gauss(0.0, 0.5), -4.0), 4.0), 2)
    text = f"{rng.choice(SUBJECTS)}{first}{rng.choice(LINKS)}{rng.choice(SUBJECTS)}{second}."
    return {"text": text, "rating": rating, "label": int(rating > 0), "stars": round(5.5 + rating * 4.5 / 4)}


def pair(rng: random.Random) -> dict[str, str]:
    """Draw a prompt and two completions with different ratings."""
    better, worse = clause(rng), clause(rng)
    while better[1] == worse[1]:
        worse = clause(rng)
    better, worse = sorted((better, worse), key=lambda drawn: -drawn[1])
    return {"prompt": rng.choice(SUBJECTS), "chosen": f"{better[0]}.", "rejected": f"{worse[0]}."}


def clause(rng: random.Random) -> tuple[str, int]:
    """Draw the rest of a clause and its rating."""
    adjective = rng.choice(list(ADJECTIVES))
    return f" is {rng.choice(ADVERBS)}{adjective}", ADJECTIVES[adjective]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
