"""Sampling options shared by the command-line flags and the arguments of `sample` and `Run.sample`."""

import dataclasses
from typing import TypeVar

from rlhf_jax.sampling.choice import Sampling

T = TypeVar("T")


def _option(default: T, kind: type, metavar: str, description: str) -> T:
    return dataclasses.field(default=default, metadata={"type": kind, "metavar": metavar, "help": description})


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Sampling distribution and stop strings; each field is a command-line flag."""

    temperature: float = _option(1.0, float, "X", "0 is greedy decoding (default 1)")
    top_k: int | None = _option(None, int, "K", "sample from the K most likely tokens")
    top_p: float | None = _option(None, float, "P", "sample from the smallest set of tokens with total probability P")
    min_p: float | None = _option(None, float, "P", "sample from tokens at least P times as likely as the likeliest")
    max_new_tokens: int | None = _option(None, int, "N", "maximum number of tokens of an answer")
    stop: tuple[str, ...] = _option((), str, "TEXT", "stop string that ends an answer; may be repeated")

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise ValueError("stop = '' is empty and would end every answer at once: give a non-empty string")
        self.sampling((), 1)

    def sampling(self, stop_ids: tuple[int, ...], max_new_tokens: int) -> Sampling:
        """Build the `Sampling` for a model's stop tokens; max_new_tokens is the default of the option."""
        most = max_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        return Sampling(most, self.temperature, stop_ids, self.top_k, self.top_p, self.min_p)
