"""Stop strings: texts that end a response wherever they occur, also across token boundaries.

During sampling on the device, a table tracks the longest stop-string prefix at the end of the response (the automaton
of Aho & Corasick 1975, advanced by all bytes of a token at once). The table only uses bytes that do not depend on the
preceding token. For byte-level tokenizers such as GPT-2's, these are all bytes. Tokenizers that insert spaces between
words can miss stop strings that contain such a space, but never report a false match. `cut` searches the decoded text
afterwards and is exact; a miss of the table only costs the tokens sampled after it.
"""

import bisect
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from tokenizers import decoders

from rlhf_jax.text.incremental import CONTEXT, INCOMPLETE
from rlhf_jax.text.tokenizer import Tokenizer

FOUND = -1
"""State after a token that completes a stop string."""

_UNCERTAIN = 256  # placeholder for a byte that depends on context; matches no stop string


def stop_table(tokenizer: Tokenizer, strings: Sequence[str], vocab_size: int) -> Int[np.ndarray, "Q V"]:
    """Transition table of the automaton: the next state for each state and token.

    A state is the longest suffix of the response that is a proper prefix of a stop string. State 0 is the empty prefix
    and the initial state; FOUND follows a complete stop string. Special tokens have no text and do not change the
    state. vocab_size is the model's, which may exceed the tokenizer's.
    """
    if not strings or not all(strings):
        raise ValueError(f"stop strings = {strings!r} must be one or more non-empty texts")
    patterns = [tuple(text.encode()) for text in strings]
    states = sorted({text[:length] for text in patterns for length in range(len(text))}, key=len)
    number = {state: i for i, state in enumerate(states)}
    found = len(states)  # absorbing state during construction

    def after(state: tuple[int, ...], byte: int) -> int:
        suffix = (*state, byte)
        if any(suffix[-len(text) :] == text for text in patterns):
            return found
        return next(number[end] for start in range(len(suffix) + 1) if (end := suffix[start:]) in number)

    by_byte = np.full((found + 1, 257), found, np.int32)
    by_byte[:found] = 0
    for state, byte in itertools.product(states, sorted({byte for text in patterns for byte in text})):
        by_byte[number[state], byte] = after(state, byte)
    pieces = _pieces(tokenizer, vocab_size)
    lengths = np.array([len(piece) for piece in pieces])
    table = np.repeat(np.arange(found + 1, dtype=np.int32)[:, None], vocab_size, axis=1)
    for i in range(lengths.max()):
        longer = np.flatnonzero(lengths > i)
        bytes_read = np.array([pieces[token][i] for token in longer])
        table[:, longer] = by_byte[table[:, longer], bytes_read]
    return np.where(table == found, FOUND, table)[:found]


def cut(
    tokenizer: Tokenizer, prompt: Sequence[int], response: Sequence[int], strings: Sequence[str]
) -> tuple[int, str]:
    """Truncate a response at the first stop string.

    Returns: the number of tokens up to the one that completes the stop string, and the text before the stop string
    without a partial character. If a token completes several stop strings, the one that starts first counts.
    """
    before = list(prompt[-CONTEXT:])

    def text(count: int) -> str:
        return tokenizer.decode_completion(before, response[:count]).rstrip(INCOMPLETE)

    def stopped(count: int) -> bool:
        return any(stop in text(count) for stop in strings)

    count = bisect.bisect_left(range(len(response)), True, key=stopped) if stopped(len(response)) else len(response)
    kept = text(count)
    return count, kept[: min((start for stop in strings if (start := kept.find(stop)) >= 0), default=len(kept))]


def _pieces(tokenizer: Tokenizer, vocab_size: int) -> list[Sequence[int]]:
    """Bytes that each token adds to a text, with _UNCERTAIN where they depend on the preceding token."""
    backend, ids = tokenizer.backend, range(vocab_size)
    if isinstance(backend.decoder, decoders.ByteLevel):
        written = [backend.id_to_token(token) or "" for token in ids]
        special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}
        return [b"" if token in special else _byte_level(text) for token, text in zip(ids, written, strict=True)]
    # A word, because punctuation may join the text that follows it without a space.
    first = next(token for token in ids if tokenizer.decode([token]).strip().isalnum())
    before = tokenizer.decode([first])
    alone, after = (backend.decode_batch([[*start, token] for token in ids]) for start in ((), (first,)))
    return [_certain(*texts, before) for texts in zip(alone, after, strict=True)]


_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
"""Byte that each character of a byte-level vocabulary represents (GPT-2's bytes_to_unicode)."""


def _byte_level(written: str) -> bytes:
    """Bytes of a token in a byte-level vocabulary; an added token may be stored as plain text."""
    return bytes(_BYTES[character] for character in written) if all(c in _BYTES for c in written) else written.encode()


def _certain(alone: str, after: str, before: str) -> list[int]:
    """Context-independent bytes of a token, from its text alone and after another token with text `before`."""
    added = after.removeprefix(before)
    if INCOMPLETE in alone or not (after.startswith(before) and added.endswith(alone)):
        return [_UNCERTAIN]
    return [*[_UNCERTAIN] * (added != alone), *alone.encode()]
