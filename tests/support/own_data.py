"""The smoke variant of experiments/preferences.py on a user's own files: pairs of texts, or of chats."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[2]
PREFERENCES = f"--config={ROOT}/experiments/preferences.py:smoke"


def pairs(rows: int, seed: int = 0) -> pd.DataFrame:
    """A prompt and two answers a row, which differ in their last character."""
    rng = np.random.default_rng(seed)
    words = ["the", "film", "is", "good", "bad", "dull", "bright", "and", "never", "slow"]

    def text() -> str:
        return " ".join(rng.choice(words, rng.integers(2, 6)))

    return pd.DataFrame([{"prompt": text(), "chosen": f" {text()}.", "rejected": f" {text()}!"} for _ in range(rows)])


WRITERS = {
    "jsonl": lambda table, path: table.to_json(path, orient="records", lines=True),
    "parquet": lambda table, path: table.to_parquet(path),
    "csv": lambda table, path: table.to_csv(path, index=False),
}


def files(directory: Path, ending: str = "jsonl") -> list[str]:
    """Write train and eval pairs; return the flags that name them."""
    flags = []
    for split, rows in (("train", 64), ("eval", 24)):
        path = directory / f"{split}.{ending}"
        WRITERS[ending](pairs(rows, seed=rows), path)
        flags.append(f"--config.data.{split}={path}")
    return flags


def chats(path: Path, rows: int, seed: int) -> Path:
    """Write pairs of chats."""
    rng = np.random.default_rng(seed)
    words = ["the", "film", "is", "good", "bad", "dull"]

    def text() -> str:
        return " ".join(rng.choice(words, rng.integers(1, 3)))

    def message(role: str) -> dict[str, str]:
        return {"role": role, "content": text()}

    with path.open("w") as file:
        for _ in range(rows):
            row = {"prompt": [message("user")], "chosen": [message("assistant")], "rejected": [message("assistant")]}
            file.write(json.dumps(row) + "\n")
    return path


def chat_arguments(model: str, directory: Path) -> list[str]:
    """Write pairs of chats; return the flags of an experiment that starts from `model` and reads them."""
    data = [
        f"--config.data.{split}={chats(directory / f'{split}.jsonl', rows, rows)}"
        for split, rows in (("train", 40), ("eval", 16))
    ]
    return [
        f"--config={ROOT}/experiments/preferences.py:smoke,init={model}",
        *data,
        "--config.data.max_prompt_tokens=48",
        "--config.data.max_response_tokens=16",
    ]
