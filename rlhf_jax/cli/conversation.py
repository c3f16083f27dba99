"""A conversation with a model: what has been said, what it is asked next, and how a reward model likes its answer."""

import dataclasses
import time
from collections.abc import Generator

import jax

from rlhf_jax.data.pipeline import Content
from rlhf_jax.inference.encoding import encode_prompt, within_context
from rlhf_jax.inference.score import function_scores, model_scores, scored_examples
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.rewards.sources import Reward
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.stream import Stream
from rlhf_jax.text.incremental import IncrementalText
from rlhf_jax.text.tokenizer import Messages
from rlhf_jax.types import RlhfError


@dataclasses.dataclass
class Answer:
    """What became of an answer, as far as it has come."""

    tokens: int = 0
    seconds: float = 0.0  # since the first token
    cut: bool = False  # whether it went on until there was no room


class Conversation:
    """The messages so far. A model without a chat template is not talked to: it continues the text so far.

    Each answer has its own random numbers, made from the key and the number of answers before it.
    """

    def __init__(self, policy: Policy, sampling: Sampling, key: jax.Array, stops: list[str]) -> None:
        """Begins with nothing said."""
        self.policy, self.sampling = policy, sampling
        self._key, self._stops = key, stops
        self._answers, self._stream = 0, Stream(policy.network, policy.params)
        self._ended = True  # the last answer, by a stop token or a stop string
        self.system: str | None = None
        self.messages: Messages = []

    @property
    def is_chat(self) -> bool:
        """Whether the model has a chat template."""
        return self.policy.tokenizer.chat_template is not None

    def set_system(self, text: str | None) -> None:
        """Says, before all else, what the assistant is. Raises RlhfError where the template has no place for that."""
        if text is not None:
            if not self.is_chat:
                raise RlhfError("this model has no chat template, and so no place for a system message")
            self._encode([{"role": "system", "content": text}, {"role": "user", "content": "?"}])
        self.system = text

    def reset(self) -> None:
        """Forgets what was said, but for the system message."""
        self.messages = []

    def reply(self, text: str, answer: Answer) -> Generator[str, None, None]:
        """The answer to a message, in pieces, as they come; `answer` tells how it goes.

        Whatever was given out is part of the conversation, also when the iterator is closed or interrupted; a message
        that was interrupted before that is forgotten. Raises RlhfError, and forgets the message, where the template
        refuses it or the model has no room for it.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._prompt(asked)
        sampling = within_context(self.policy, prompt, self.sampling)
        tokens = self._stream.respond(prompt, self._key, sampling, row=self._answers)
        said = IncrementalText(self.policy.tokenizer, prompt, self._stops)
        start, last = None, None
        complete = False
        try:
            for last in tokens:
                start = start or time.perf_counter()
                answer.tokens, answer.seconds = answer.tokens + 1, time.perf_counter() - start
                if last not in sampling.stop_ids and (piece := said.add(last)):
                    yield piece
                if said.stopped:
                    break
            answer.cut = last not in sampling.stop_ids and not said.stopped
            complete = True
            if piece := said.finish():
                yield piece
        finally:
            self._answers += 1
            self._ended = complete and not answer.cut
            if complete or said.text:
                self.messages = [*asked, {"role": "assistant", "content": said.text}]

    def score(self, judge: RewardModel | Reward) -> float:
        """A reward's score of the last answer, in what was said before it. Raises RlhfError where there is none.

        A reward model reads the texts by its own tokenizer and, if it has one, its own chat template; an answer that
        was cut off or interrupted has no end for it. Python functions are given no columns.
        """
        if not self.messages:
            raise RlhfError("nothing has been said that could be scored")
        before, after = self._with_system(self.messages[:-1]), self.messages[-1:]
        pair = (before, after)
        if isinstance(judge, Reward):
            if not self.is_chat:
                pair = (_continued(before), after[0]["content"])
            return float(function_scores(judge, self.policy.tokenizer, pair[0], [pair[1]], {})[0])
        if judge.tokenizer.chat_template is None or not self.is_chat:
            pair = (_continued(before), after[0]["content"])
        return float(model_scores(judge, scored_examples(judge, pair[0], [pair[1]], [self._ended], 1), 1)[0])

    def _prompt(self, messages: Messages) -> list[int]:
        if self.is_chat:
            return self._encode(self._with_system(messages))
        return self._encode(_continued(messages))

    def _encode(self, prompt: Content) -> list[int]:
        return encode_prompt(prompt, self.policy.tokenizer)

    def _with_system(self, messages: Messages) -> Messages:
        return messages if self.system is None else [{"role": "system", "content": self.system}, *messages]


def _continued(messages: Messages) -> str:
    """One text: an answer goes on where its message ends, and the next message begins a line."""
    parts = [
        ("\n" if place and message["role"] == "user" else "") + message["content"]
        for place, message in enumerate(messages)
    ]
    return "".join(parts)
