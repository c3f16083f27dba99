"""The text of a response whose tokens come one at a time."""

from collections.abc import Sequence

from rlhf_jax.text.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"  # what decoders write for bytes that are no character, or not yet
CONTEXT = 16
"""Tokens of the prompt that a tokenizer might need to know whether a space comes first."""


class IncrementalText:
    """Text as far as it is certain: no half of a character, and nothing that a stop string may yet begin with.

    Attributes:
        text: all that has been given out.
        stopped: whether a stop string has been found; the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        """Begins a response to a prompt's tokens, which a stop string ends wherever it is found."""
        self._tokenizer, self._prompt, self._stops = tokenizer, list(prompt[-CONTEXT:]), [*stops]
        self._ids: list[int] = []
        self.text, self.stopped = "", False

    def add(self, token: int) -> str:
        """What one more token makes certain, perhaps nothing."""
        self._ids.append(token)
        return self._give(self._so_far(), held=True)

    def finish(self) -> str:
        """What is left when no token follows. Half of a character is left out."""
        return self._give(self._so_far(), held=False)

    def _so_far(self) -> str:
        return self._tokenizer.decode_completion(self._prompt, self._ids).rstrip(INCOMPLETE)

    def _give(self, text: str, *, held: bool) -> str:
        if self.stopped:
            return ""
        found = [place for place in map(text.find, self._stops) if place >= 0]
        if found:
            self.stopped, text = True, text[: min(found)]
        elif held:
            text = text[: len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)]
        more = text[len(self.text) :]
        self.text += more
        return more


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text that a stop string begins with."""
    return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)
