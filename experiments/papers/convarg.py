"""UKPConvArg1Strict: pairs of arguments that people ranked, and reward models that never saw the topics they judge.

The 32 topics (16 debates, two sides each) are split into 8 folds of 4 topics. For each fold, a reward model is trained
from scratch on the pairs of the other 28 topics and scores the arguments of the 4. The two sides of a debate are in
different folds, as in the cross-topic evaluation of Habernal & Gurevych 2016, which leaves out one topic at a time.
"""

import runpy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.api import load_config
from rlhf_jax.data import fetch
from rlhf_jax.inference.score import score
from rlhf_jax.papers import training
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.files import read_rows, write_rows
from rlhf_jax.types import Row

FOLDS = 8
SMOKE = Path(__file__).parents[1] / "smoke"
EXPERIMENT = runpy.run_path(str(Path(__file__).parents[1] / "movie_reviews" / "quickstart.py"))


def config(*, smoke: bool) -> ConfigDict:
    """Build the experiment of one fold, whose files `run_each` names."""
    found = load_config("preferences:smoke" if smoke else "preferences").unlock()
    for name in ("dpo", "ppo", "evaluate"):
        del found[name]
    found.stages = ("sft", "reward_model")
    found.data.update({"train": "train.jsonl", "eval": "eval.jsonl"})  # of the fold
    found.data.update(
        {"text_prompt_tokens": (1, 1), "max_prompt_tokens": 2, "max_response_tokens": 12 if smoke else 120}
    )
    # Only the tokenizer of this stage is used.
    found.sft.update({"epochs": 0.01, "sample_prompts": 0, "eval_every": 1000})
    found.reward_model.update({"policy": "sft", "eval_every": 1000, "epochs": 1.0})
    found.reward_model.optimizer = EXPERIMENT["adamw"](1e-3, schedule="cosine", warmup_steps=20, weight_decay=0.1)
    small = {"d_model": 16 if smoke else 64, "n_layers": 1}
    found.sft.model = ConfigDict(EXPERIMENT["model"](**small))
    found.reward_model.model = ConfigDict(EXPERIMENT["model"](**small))
    if not smoke:
        found.sft.tokenizer = ConfigDict({"kind": "word", "vocab_size": 4096})
        found.reward_model.batch_size = 64
    return found


def pairs(*, smoke: bool) -> list[Row]:
    """Read all pairs; the smoke variant numbers topics by rows."""
    if not smoke:
        return read_rows(fetch.fetch("convarg") / "pairs.jsonl")
    rows = read_rows(SMOKE / "pairs_train.jsonl")
    return [row | {"topic": f"topic {number % (2 * FOLDS)}"} for number, row in enumerate(rows)]


def folds_of(rows: Sequence[Row]) -> dict[str, int]:
    """Assign the topics of all pairs to folds."""
    return {topic: number % FOLDS for number, topic in enumerate(sorted({row["topic"] for row in rows}))}


def run_each(scale: str, folds: Sequence[int], workdir: Path) -> dict[int, tuple[Run, list[Row]]]:
    """Train a reward model for each fold, and return its run and the pairs of the topics that it did not see."""
    smoke = scale == "smoke"
    rows, found = pairs(smoke=smoke), {}
    fold_of = folds_of(rows)
    for fold in folds:
        # Papers share stages that read the same files.
        directory = fetch.data_dir() / "papers" / "convarg" / scale / f"fold_{fold}"
        directory.mkdir(parents=True, exist_ok=True)
        held_out = [row for row in rows if fold_of[row["topic"]] == fold]
        parts = {"train": [row for row in rows if fold_of[row["topic"]] != fold], "eval": held_out}
        one = config(smoke=smoke)
        for split, part in parts.items():
            file = directory / f"{split}.jsonl"
            write_rows(file, part)
            one.data[split] = str(file)
        run = training.run_each(one, [fold], workdir, shared=one.stages)[fold]
        found[fold] = (run, held_out)
    return found


def scored(run: Run, rows: Sequence[Row]) -> dict[str, float]:
    """Score every argument of some pairs once."""
    texts = sorted({row[side] for row in rows for side in ("chosen", "rejected")})
    table = score(run.load_reward_model("reward_model"), [{"prompt": "", "completion": text} for text in texts])
    return dict(zip(texts, table["score"], strict=True))


def correct(rows: Sequence[Row], score_of: dict[str, float]) -> float:
    """Share of pairs whose chosen argument has the higher score, ties counting half."""
    margins = np.array([score_of[row["chosen"]] - score_of[row["rejected"]] for row in rows])
    return float(np.mean(0.5 * (1 + np.sign(margins))))
