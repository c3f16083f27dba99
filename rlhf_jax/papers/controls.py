"""Rewards for negative controls, named `rlhf_jax.papers.controls:NAME` in a config."""

import hashlib
from collections.abc import Sequence


def random_score(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """Score a response by a hash of its text, uniform on [0, 1), which knows nothing of its quality."""
    digests = (
        hashlib.sha256(f"{prompt}\n{completion}".encode()).digest()
        for prompt, completion in zip(prompts, completions, strict=True)
    )
    return [int.from_bytes(digest[:8], "big") / 2**64 for digest in digests]
