"""A conversation with a model: its messages, streamed answers, and their scores."""

import dataclasses
import itertools
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
    """Statistics of an answer, updated while it is generated."""

    tokens: int = 0
    seconds: float = 0.0  # since the first token
    cut: bool = False  # stopped by the token limit or the context length


class Conversation:
    """Conversation with a policy. A model without a chat template continues the text so far.

    Each answer has its own random key, derived from `key` and the number of earlier answers.
    """

    def __init__(self, policy: Policy, sampling: Sampling, key: jax.Array, stops: list[str]) -> None:
        """Start an empty conversation."""
        self.policy, self.sampling = policy, sampling
        self._key, self._stops = key, stops
        self._answers, self._stream = 0, Stream(policy.network, policy.params)
        self._ended: list[bool] = []  # whether each answer ended with a stop token or stop string
        self.system: str | None = None
        self.messages: Messages = []

    @property
    def is_chat(self) -> bool:
        """True if the model has a chat template."""
        return self.policy.tokenizer.chat_template is not None

    def set_system(self, text: str | None) -> None:
        """Set or remove the system message. Raises RlhfError if the chat template does not support one."""
        if text is not None:
            if not self.is_chat:
                raise RlhfError("this model has no chat template and takes no system message")
            self._encode([{"role": "system", "content": text}, {"role": "user", "content": "?"}])
        self.system = text

    def reset(self) -> None:
        """Clear the conversation except for the system message."""
        self.messages, self._ended = [], []

    def undo(self) -> str:
        """Take back the last message and its answer, and return the message. Raises RlhfError if there is none."""
        if not self.messages:
            raise RlhfError("there is no message to take back")
        *self.messages, message, _ = self.messages
        self._ended = self._ended[:-1]
        return message["content"]

    def with_policy(self, policy: Policy) -> "Conversation":
        """Return the conversation before its last message, with another policy. Raises RlhfError as `undo` does."""
        other = Conversation(policy, self.sampling, self._key, self._stops)
        other.sampling = dataclasses.replace(self.sampling, stop_ids=policy.tokenizer.stop_ids)
        other.messages, other._ended = [*self.messages], [*self._ended]
        other.undo()
        if self.system is not None:
            other.set_system(self.system)
        return other

    def as_row(self) -> dict[str, Messages]:
        """Return the conversation as a row of training data. Raises RlhfError if it is empty."""
        if not self.messages:
            raise RlhfError("there is no conversation yet")
        return {"messages": self._with_system(self.messages)}

    def compile(self) -> None:
        """Compile the programs that a short first message needs, so that its answer starts without delay."""
        messages = [{"role": "user", "content": "Hello"}]
        prompt = self._prompt(messages) if self.is_chat else self.policy.tokenizer.begin([])
        if prompt:
            sampling = dataclasses.replace(within_context(self.policy, prompt, self.sampling), stop_ids=())
            for _ in itertools.islice(self._stream.respond(prompt, self._key, sampling, row=0), 2):
                pass  # the first token compiles the reading of a prompt, and the second the decoding of a token

    def reply(self, text: str, answer: Answer) -> Generator[str, None, None]:
        """Yield the answer to a message piece by piece, updating `answer`.

        All text that was yielded joins the conversation, even if the iterator is closed or interrupted; a message
        interrupted before the first piece is dropped. Raises RlhfError, and drops the message, if the chat template
        rejects it or it does not fit into the context.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._prompt(messages)
        sampling = within_context(self.policy, prompt, self.sampling)
        tokens = self._stream.respond(prompt, self._key, sampling, row=self._answers)
        reply = IncrementalText(self.policy.tokenizer, prompt, self._stops)
        start, last = None, None
        complete = False
        try:
            for last in tokens:
                start = start or time.perf_counter()
                answer.tokens, answer.seconds = answer.tokens + 1, time.perf_counter() - start
                if last not in sampling.stop_ids and (piece := reply.add(last)):
                    yield piece
                if reply.stopped:
                    break
            answer.cut = last not in sampling.stop_ids and not reply.stopped
            complete = True
            if piece := reply.finish():
                yield piece
        finally:
            self._answers += 1
            if complete or reply.text:
                self._ended = [*self._ended, complete and not answer.cut]
                self.messages = [*messages, {"role": "assistant", "content": reply.text}]

    def score(self, judge: RewardModel | Reward) -> float:
        """Score the last answer given the conversation before it. Raises RlhfError if there is no answer.

        A reward model encodes the texts with its own tokenizer and, if it has one, its own chat template. It sees no
        EOS after an answer that was cut off or interrupted. Python functions receive no columns.
        """
        if not self.messages:
            raise RlhfError("there is no answer to score yet")
        before, after = self._with_system(self.messages[:-1]), self.messages[-1:]
        pair = (before, after)
        if isinstance(judge, Reward):
            if not self.is_chat:
                pair = (_plain_text(before), after[0]["content"])
            return float(function_scores(judge, self.policy.tokenizer, pair[0], [pair[1]], {})[0])
        if judge.tokenizer.chat_template is None or not self.is_chat:
            pair = (_plain_text(before), after[0]["content"])
        return float(model_scores(judge, scored_examples(judge, pair[0], [pair[1]], self._ended[-1:], 1), 1)[0])

    def _prompt(self, messages: Messages) -> list[int]:
        if self.is_chat:
            return self._encode(self._with_system(messages))
        return self._encode(_plain_text(messages))

    def _encode(self, prompt: Content) -> list[int]:
        return encode_prompt(prompt, self.policy.tokenizer)

    def _with_system(self, messages: Messages) -> Messages:
        return messages if self.system is None else [{"role": "system", "content": self.system}, *messages]


def _plain_text(messages: Messages) -> str:
    """Join messages into one text: an answer directly follows its message, and the next message starts a new line."""
    parts = [
        ("\n" if i and message["role"] == "user" else "") + message["content"] for i, message in enumerate(messages)
    ]
    return "".join(parts)
