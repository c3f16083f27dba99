"""Your own reward: brief answers, and answers that contain a word of the data.

    rlhf-jax run --config=EXPERIMENT.py --workdir=DIR --config.ppo.reward_model.functions=examples/reward.py:brevity
    rlhf-jax score --reward=examples/reward.py:brevity < rows.jsonl > scored.jsonl

A reward has the signature of TRL's: it takes lists of prompts and completions (texts, or chats with one message) and
returns one number per completion, or None where it does not apply. Other parameters name columns of the data, and
`completion_ids` the tokens of the completions. Several rewards are summed with weights, and can be combined with a
reward model (`RewardConfig`). A changed file counts as a changed config.
"""

from typing import Any


def brevity(completions: list[Any], **columns: list[Any]) -> list[float]:
    """Minus the number of words, in tens."""
    return [-len(text(completion).split()) / 10 for completion in completions]


def keyword(completions: list[Any], word: list[str | None]) -> list[float | None]:
    """1 if the completion contains the row's `word`, 0 if not, and None in rows without a word."""
    return [
        None if wanted is None else float(wanted in text(completion))
        for completion, wanted in zip(completions, word, strict=True)
    ]


def text(completion: Any) -> str:
    """Return the text of a completion, whether it is a text or a chat."""
    return completion if isinstance(completion, str) else completion[0]["content"]
