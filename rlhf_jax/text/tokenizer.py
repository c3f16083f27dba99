"""Tokenizers trained on the experiment's own text, and the one interface through which the rest sees any tokenizer."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from rlhf_jax.types import RlhfError

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL_TOKENS = [PAD, BOS, EOS, UNKNOWN]
TOKENIZER_FILE = "tokenizer.json"

Kind = Literal["word", "byte_bpe"]


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """A tokenizer to be trained: `word` (lower-cased words and punctuation) or `byte_bpe` (any text, no unknowns)."""

    kind: Kind
    vocab_size: int

    def __post_init__(self) -> None:
        least = len(SPECIAL_TOKENS) + {"word": 1, "byte_bpe": 256}[self.kind]
        if self.vocab_size < least:
            raise ValueError(f"vocab_size = {self.vocab_size} must be at least {least} for the kind {self.kind!r}")


class Tokenizer:
    """Encodes text to ids and decodes ids to text; special tokens never come from text."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wraps a tokenizer that knows the four special tokens. Their names within a text are text."""
        self.backend = backend
        self.backend.encode_special_tokens = True
        self.pad_id, self.bos_id, self.eos_id, self.unknown_id = map(self._special_id, SPECIAL_TOKENS)
        self.vocab_size = backend.get_vocab_size()

    @property
    def suppressed(self) -> tuple[int, ...]:
        """Ids that a policy never emits."""
        return (self.pad_id, self.bos_id, self.unknown_id)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Ids of many texts, in parallel."""
        return [encoding.ids for encoding in self.backend.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens leave nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def decode_completion(self, prompt: Iterable[int], response: Iterable[int]) -> str:
        """Text that a response adds to its prompt's, with the space that joins them where there is one."""
        prompt = list(prompt)
        before, whole = self.decode(prompt), self.decode([*prompt, *response])
        return whole[len(before) :] if whole.startswith(before) else self.decode(response)

    def save(self, directory: Path) -> None:
        """Writes tokenizer.json into a directory, which it makes; the file is whole or not there."""
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / ".tokenizer.tmp"
        self.backend.save(str(temporary))
        temporary.replace(directory / TOKENIZER_FILE)

    def _special_id(self, token: str) -> int:
        found = self.backend.token_to_id(token)
        if found is None:
            raise RlhfError(f"the tokenizer has no token {token}: train it with rlhf_jax, or add {SPECIAL_TOKENS}")
        return found


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that `save` left in a directory. Raises RlhfError where there is none or it does not parse."""
    path = directory / TOKENIZER_FILE
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except RlhfError as error:
        raise RlhfError(f"{path}: {error}") from error
    except Exception as error:  # tokenizers raises bare Exception
        raise RlhfError(f"{path} is not a readable tokenizer.json: {error}") from error


def train_word_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """The most frequent lower-cased words and punctuation marks; the rest is unknown.

    Decoding puts a space between tokens, except before marks that close and after those that open, so that any sequence
    of known tokens, decoded, encodes to itself again.
    """
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    words = Regex(r"[\p{L}\p{N}_]+(?:'\p{L}+)*|[^\s\p{L}\p{N}_]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, "removed", invert=True)
    closing = [decoders.Replace(f" {mark}", mark) for mark in ".,!?;:)]}%"]
    opening = [decoders.Replace(f"{mark} ", mark) for mark in "([{$"]
    spaced = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.decoder = decoders.Sequence([spaced, decoders.Fuse(), *closing, *opening])
    trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_byte_bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Byte-pair encoding over bytes (as GPT-2's): every text has an encoding."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


TRAINERS: dict[Kind, Callable[[Iterable[str], int], tokenizers.Tokenizer]] = {
    "word": train_word_tokenizer,
    "byte_bpe": train_byte_bpe_tokenizer,
}


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """A tokenizer trained on texts, which must be the training split's."""
    return Tokenizer(TRAINERS[config.kind](texts, config.vocab_size))
