"""How someone says that a model is to be sampled: flags of the verbs and arguments of `Run.sample`, in one place."""

import dataclasses
from typing import TypeVar

from rlhf_jax.sampling.choice import Sampling

T = TypeVar("T")


def _option(default: T, kind: type, metavar: str, told: str) -> T:
    return dataclasses.field(default=default, metadata={"type": kind, "metavar": metavar, "help": told})


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """The distribution that is sampled from, and what ends an answer beside the model's own stop tokens.

    A verb has a flag for each field.
    """

    temperature: float = _option(1.0, float, "X", "0 takes the most likely token (default 1)")
    top_k: int | None = _option(None, int, "K", "only the K most likely tokens")
    top_p: float | None = _option(None, float, "P", "only the fewest tokens whose probabilities reach P")
    min_p: float | None = _option(None, float, "P", "only tokens at least P times as likely as the likeliest")
    max_new_tokens: int | None = _option(None, int, "N", "the most tokens of an answer")
    stop: tuple[str, ...] = _option((), str, "TEXT", "ends an answer; may be given again")

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise ValueError("stop = '' is empty, and would end every answer at once: give the text that ends one")
        self.sampling((), 1)

    def sampling(self, stop_ids: tuple[int, ...], max_new_tokens: int) -> Sampling:
        """The distribution over a model's tokens, of which an answer has `max_new_tokens` unless told otherwise."""
        most = max_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        return Sampling(most, self.temperature, stop_ids, self.top_k, self.top_p, self.min_p)
