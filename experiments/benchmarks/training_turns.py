"""Rounds of the two sides of the training benchmark: each trains in a process of its own, and they take turns.

Both sides import this module, so that it needs neither JAX nor torch.
"""

import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-6
"""Small, so that the lengths of sampled responses do not change during the benchmark."""

BETA, KL_COEF = 0.1, 0.05


@dataclasses.dataclass(frozen=True)
class Work:
    """Work that both sides do: the same weights, tokenizer and rows."""

    kind: str
    policy: str  # directory of the language model
    reward_model: str  # directory of the reward model
    train: str  # JSON lines of pairs, as our stages read them
    eval: str  # some of these pairs
    ids: str  # JSON lines of the training pairs as token ids, with the text of each prompt
    batch: int
    group: int  # responses per prompt, for GRPO
    prompt: int  # maximum tokens of a prompt
    response: int  # maximum tokens of a response
    steps: int  # per round; a round is an epoch
    rounds: int  # timed rounds, after one for warm-up
    threads: int


class Finished(Exception):
    """Raised after the last round, to leave the training loop."""


class Turns:
    """Count the steps of one side, report each round to the driver, and then wait for the side's next turn."""

    def __init__(self, work: Work, after_round: Callable[[], dict[str, Any]] = dict) -> None:
        """Start the clock of the first round. Whatever else is printed goes to stderr from now on.

        Args: after_round measures further figures for the report of a round.
        """
        self._start, self._cpu_start = time.perf_counter(), time.process_time()
        self._done, self._first_step = 0, 0.0
        self._work, self._after_round = work, after_round
        self._channel = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def step(self) -> None:
        """Count a step. Raises Finished after the last one."""
        self._done += 1
        if self._done == 1:
            self._first_step = time.perf_counter() - self._start
        if self._done % self._work.steps == 0:
            taken = {
                "seconds": time.perf_counter() - self._start,
                "cpu_seconds": time.process_time() - self._cpu_start,
                "first_step_seconds": self._first_step,
            }
            self.report(**taken, **self._after_round())
            if not sys.stdin.readline():
                raise SystemExit("the driver of the benchmark has ended")
            if self._done == self._work.steps * (self._work.rounds + 1):
                raise Finished
            self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def per_round(self, counts: list[float]) -> list[float]:
        """Sum counts of each step over the steps of each round."""
        steps = self._work.steps
        return [sum(counts[i : i + steps]) for i in range(0, len(counts), steps)]

    def report(self, **figures: Any) -> None:
        """Send figures to the driver, with the peak memory of this process."""
        print(json.dumps({**figures, "peak_bytes": peak_memory()}), file=self._channel, flush=True)


def read_work() -> Work:
    """Read the work from the file that the command line names."""
    return Work(**json.loads(Path(sys.argv[1]).read_text()))


def peak_memory() -> int:
    """Peak resident memory of this process in bytes; unlike getrusage's, it excludes the process that forked it."""
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Score completions for GRPO on either side: the share of letters."""
    del prompts, columns
    return [sum(map(str.isalpha, text)) / max(len(text), 1) for text in completions]
