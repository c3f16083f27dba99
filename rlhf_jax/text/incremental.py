"""Incremental decoding: the text of a response whose tokens arrive one at a time."""

from collections.abc import Sequence

from rlhf_jax.text.tokenizer import Tokenizer

INCOMPLETE = "\ufffd"  # decoders write it for invalid or incomplete UTF-8
CONTEXT = 16
"""Number of prompt tokens to decode with the response; they decide whether it starts with a space."""


class IncrementalText:
    """Decoded text that later tokens cannot change: no partial character and no possible start of a stop string.

    Attributes:
        text: all text returned so far.
        stopped: whether a stop string has been found; the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        """Start a response to a prompt's tokens; stops are strings that end it."""
        self._tokenizer, self._prompt, self._stops = tokenizer, list(prompt[-CONTEXT:]), [*stops]
        self._ids: list[int] = []
        self.text, self.stopped = "", False

    def add(self, token: int) -> str:
        """Add a token and return the new text that has become final, possibly empty."""
        self._ids.append(token)
        return self._advance(self._decode(), hold_back=True)

    def finish(self) -> str:
        """Return the remaining text when no token follows, without a partial character."""
        return self._advance(self._decode(), hold_back=False)

    def _decode(self) -> str:
        return self._tokenizer.decode_completion(self._prompt, self._ids).rstrip(INCOMPLETE)

    def _advance(self, text: str, *, hold_back: bool) -> str:
        if self.stopped:
            return ""
        starts = [start for start in map(text.find, self._stops) if start >= 0]
        if starts:
            self.stopped, text = True, text[: min(starts)]
        elif hold_back:
            text = text[: len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)]
        more = text[len(self.text) :]
        self.text += more
        return more


def token_texts(tokenizer: Tokenizer, prompt: Sequence[int], response: Sequence[int]) -> list[str]:
    """Return the text that each token of a response adds; they make up the completion.

    A character of several tokens belongs to the last of them, and a special token without text has its name.
    """
    texts: list[str] = []
    before, pending = list(prompt[-CONTEXT:]), []
    for position, token in enumerate(response):
        pending.append(token)
        text = tokenizer.decode_completion(before, pending)
        if text.endswith(INCOMPLETE) and position + 1 < len(response):
            texts.append("")
            continue
        texts.append(text or tokenizer.backend.id_to_token(token) or "")
        before, pending = [*before, *pending][-CONTEXT:], []
    return texts


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of a stop string that is a suffix of the text."""
    return next((length for length in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:length])), 0)
