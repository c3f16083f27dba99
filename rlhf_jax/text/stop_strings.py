"""Stop strings: texts that end a response wherever they are found, also from the middle of a token to that of another.

While tokens are drawn, on the device, a table says after each how far into a stop string the response has come (the
automaton of Aho & Corasick 1975, of whose steps a token takes as many as it has bytes). It knows a token's bytes where
they do not depend on the token before it: all of them, where the tokenizer's are bytes (as GPT-2's); where it puts
spaces between words, a stop string that a space comes into is not found by it. What it finds is there. What ends a
response in the end is `cut`, which reads the text, and only costs more where the table has let a response go on.
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
"""The state after a token that completes a stop string."""

_UNCERTAIN = 256  # in the place of a byte: what no stop string has


def stop_table(tokenizer: Tokenizer, strings: Sequence[str], vocab_size: int) -> Int[np.ndarray, "Q V"]:
    """The state after each token in each state: the longest end of the response that a stop string begins with.

    State 0, nothing of any, is the first; FOUND is the state after a whole one. Special tokens have no text, and change
    no state. vocab_size is the model's, which may have more rows than the tokenizer has tokens.
    """
    if not strings or not all(strings):
        raise ValueError(f"stop strings = {strings!r} must be texts, of which there is one at least, and none empty")
    whole = [tuple(text.encode()) for text in strings]
    states = sorted({text[:length] for text in whole for length in range(len(text))}, key=len)
    number = {state: place for place, state in enumerate(states)}
    found = len(states)  # for as long as the table is made: nothing leaves it

    def after(state: tuple[int, ...], byte: int) -> int:
        read = (*state, byte)
        if any(read[-len(text) :] == text for text in whole):
            return found
        return next(number[end] for start in range(len(read) + 1) if (end := read[start:]) in number)

    by_byte = np.full((found + 1, 257), found, np.int32)
    by_byte[:found] = 0
    for state, byte in itertools.product(states, sorted({byte for text in whole for byte in text})):
        by_byte[number[state], byte] = after(state, byte)
    pieces = _pieces(tokenizer, vocab_size)
    lengths = np.array([len(piece) for piece in pieces])
    table = np.repeat(np.arange(found + 1, dtype=np.int32)[:, None], vocab_size, axis=1)
    for place in range(lengths.max()):
        longer = np.flatnonzero(lengths > place)
        read = np.array([pieces[token][place] for token in longer])
        table[:, longer] = by_byte[table[:, longer], read]
    return np.where(table == found, FOUND, table)[:found]


def cut(
    tokenizer: Tokenizer, prompt: Sequence[int], response: Sequence[int], strings: Sequence[str]
) -> tuple[int, str]:
    """The tokens up to that which completes a stop string, and the text before it, without half of a character.

    Of several stop strings that one token completes, the first to begin counts. Returns how many tokens are left.
    """
    before = list(prompt[-CONTEXT:])

    def text(count: int) -> str:
        return tokenizer.decode_completion(before, response[:count]).rstrip(INCOMPLETE)

    def stopped(count: int) -> bool:
        return any(stop in text(count) for stop in strings)

    count = bisect.bisect_left(range(len(response)), True, key=stopped) if stopped(len(response)) else len(response)
    kept = text(count)
    return count, kept[: min((place for stop in strings if (place := kept.find(stop)) >= 0), default=len(kept))]


def _pieces(tokenizer: Tokenizer, vocab_size: int) -> list[Sequence[int]]:
    """What each token adds to a text, in bytes, as far as it is certain."""
    backend, ids = tokenizer.backend, range(vocab_size)
    if isinstance(backend.decoder, decoders.ByteLevel):
        written = [backend.id_to_token(token) or "" for token in ids]
        special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}
        return [b"" if token in special else _byte_level(text) for token, text in zip(ids, written, strict=True)]
    first = next(
        token for token in ids if tokenizer.decode([token]).strip().isalnum()
    )  # no mark that binds what follows
    before = tokenizer.decode([first])
    alone, after = (backend.decode_batch([[*start, token] for token in ids]) for start in ((), (first,)))
    return [_certain(one, other, before) for one, other in zip(alone, after, strict=True)]


_THEMSELVES = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _THEMSELVES]
_BYTES = {chr(byte): byte for byte in _THEMSELVES} | {chr(256 + place): byte for place, byte in enumerate(_OTHERS)}
"""What each character of a byte-level vocabulary stands for."""


def _byte_level(written: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary; an added token may be written as it is."""
    return bytes(_BYTES[character] for character in written) if all(c in _BYTES for c in written) else written.encode()


def _certain(alone: str, after: str, before: str) -> list[int]:
    """The bytes of a token's text, given alone and after another's: a space before it depends on the other."""
    added = after.removeprefix(before)
    if INCOMPLETE in alone or not (after.startswith(before) and added.endswith(alone)):
        return [_UNCERTAIN]
    return [*[_UNCERTAIN] * (added != alone), *alone.encode()]
