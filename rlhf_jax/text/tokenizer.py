"""The tokenizer interface, and tokenizers trained on an experiment's own text."""

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from rlhf_jax.config import Count
from rlhf_jax.types import RlhfError

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL_TOKENS = [PAD, BOS, EOS, UNKNOWN]
TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"

NO_TEMPLATE = (
    "a tokenizer trained by rlhf_jax has no chat template, which chat messages need: give texts (column text, or "
    "prompt and completion), or start from a checkpoint whose tokenizer has a template"
)

Algorithm = Literal["word", "byte_bpe"]
Messages: TypeAlias = list[dict[str, Any]]
"""A conversation: messages with `role`, `content` and any other keys that the template reads."""


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer to train: `word` (lower-cased words and punctuation) or `byte_bpe` (any text, no unknown words)."""

    kind: (
        Algorithm  # algorithm: word (lower-cased words and punctuation) or byte_bpe (any text, without unknown tokens)
    )
    vocab_size: Count  # tokens in the vocabulary, special ones included

    def __post_init__(self) -> None:
        least = len(SPECIAL_TOKENS) + {"word": 1, "byte_bpe": 256}[self.kind]
        if self.vocab_size < least:
            raise ValueError(f"vocab_size = {self.vocab_size} must be at least {least} for the kind {self.kind!r}")


class Tokenizer(abc.ABC):
    """Tokenizer interface of TrainedTokenizer and PretrainedTokenizer."""

    backend: tokenizers.Tokenizer
    pad_id: int  # may equal eos_id: only masks identify padding
    eos_id: int
    unknown_id: int | None  # None if every word has tokens
    start_id: int  # the only token of an empty prompt if there is no prefix
    prefix: tuple[int, ...]  # ids that start every prompt, such as BOS
    stop_ids: tuple[int, ...]  # ids that end a response, EOS first
    suppressed: tuple[int, ...]  # ids that a policy never samples
    vocab_size: int  # largest id plus one; a model's embedding may have more rows
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """Encode a text without prefix and EOS."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Encode many texts in parallel, without prefix and EOS; each different text is encoded once."""
        different = [*dict.fromkeys(texts)]
        found = self.backend.encode_batch(different, add_special_tokens=False)
        ids = {text: encoding.ids for text, encoding in zip(different, found, strict=True)}
        return [ids[text] for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids, skipping special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def decode_completion(self, prompt: Iterable[int], response: Iterable[int]) -> str:
        """Decode a response as it continues its prompt, including a space that joins them."""
        prompt = list(prompt)
        before, joint = self.decode(prompt), self.decode([*prompt, *response])
        return joint[len(before) :] if joint.startswith(before) else self.decode(response)

    def begin(self, ids: Iterable[int]) -> list[int]:
        """Add the prefix to a text prompt; an empty result becomes [start_id]."""
        return [*self.prefix, *ids] or [self.start_id]

    def trim(self, response: list[int]) -> list[int]:
        """Cut a response after the first stop token that is followed only by whitespace and stop tokens."""
        length = len(response)
        for i in reversed(range(len(response))):
            if response[i] in self.stop_ids:
                length = i + 1
            elif not self._is_blank(response[i]):
                break
        return response[:length]

    @functools.cached_property
    def _is_blank(self) -> Callable[[int], bool]:
        """Function, with a cache, that tells whether a token alone decodes to whitespace or nothing."""
        return functools.cache(lambda token: not self.decode([token]).strip())

    def end(self, response: list[int]) -> list[int]:
        """Trim a complete response and append EOS unless it already ends with a stop token."""
        trimmed = self.trim(response)
        return trimmed if trimmed and trimmed[-1] in self.stop_ids else [*trimmed, self.eos_id]

    @abc.abstractmethod
    def save(self, directory: Path) -> None:
        """Write atomically the files that `load_tokenizer` reads, creating the directory."""

    @abc.abstractmethod
    def render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """Render a conversation with the chat template. The text is to be encoded without adding the prefix.

        Args: add_generation_prompt appends the header of the assistant's next turn.
        Raises RlhfError if there is no template or it rejects the messages.
        """

    @abc.abstractmethod
    def encode_turns(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Encode a rendered conversation, with a mask of the assistant's tokens. Raises as `render` does."""


class TrainedTokenizer(Tokenizer):
    """Tokenizer trained by rlhf_jax, with four special tokens and no chat template."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wrap a tokenizer that has the four special tokens. Their names in a text are encoded as plain text."""
        self.backend = backend
        self.backend.encode_special_tokens = True
        self.pad_id, self.bos_id, self.eos_id, self.unknown_id = map(self._special_id, SPECIAL_TOKENS)
        self.start_id, self.prefix, self.stop_ids = self.bos_id, (self.bos_id,), (self.eos_id,)
        self.suppressed = (self.pad_id, self.bos_id, self.unknown_id)
        self.vocab_size = backend.get_vocab_size()
        self.chat_template = None

    def save(self, directory: Path) -> None:
        """Write tokenizer.json atomically. Raises OSError if it cannot be written."""
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / ".tokenizer.tmp"
        try:  # not `backend.save`, whose errors are no OSError
            temporary.write_text(self.backend.to_str(pretty=True), encoding="utf-8")
            temporary.replace(directory / TOKENIZER_FILE)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """Raises RlhfError: there is no chat template."""
        raise RlhfError(NO_TEMPLATE)

    def encode_turns(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Raises RlhfError: there is no chat template."""
        raise RlhfError(NO_TEMPLATE)

    def _special_id(self, token: str) -> int:
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise RlhfError(
                f"the tokenizer has no token {token}: train it with rlhf_jax, or add {SPECIAL_TOKENS}; a Hugging Face "
                f"tokenizer needs its {CONFIG_FILE} in the same directory"
            )
        return token_id


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load a tokenizer from a directory or a Hugging Face Hub repository.

    A directory with a tokenizer_config.json has a Hugging Face tokenizer; one with only a tokenizer.json has a
    TrainedTokenizer. A string that is not a directory names a repository, such as `HuggingFaceTB/SmolLM2-135M`.

    Raises: RlhfError if there is no tokenizer or a file is malformed.
    """
    directory = Path(source)
    if (isinstance(source, str) and not directory.exists()) or (directory / CONFIG_FILE).exists():
        # Imported here: transformers takes two seconds, which a TrainedTokenizer does not need.
        from rlhf_jax.text.hf_tokenizer import load_pretrained_tokenizer

        return load_pretrained_tokenizer(source)
    path = directory / TOKENIZER_FILE
    try:
        return TrainedTokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except RlhfError as error:
        raise RlhfError(f"{path}: {error}") from error
    except Exception as error:  # tokenizers raises bare Exception
        raise RlhfError(f"{path} is not a readable tokenizer.json: {error}") from error


def train_word_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a vocabulary of the most frequent lower-cased words and punctuation marks; other words are unknown.

    Decoding puts a space between tokens, except before closing and after opening punctuation, so that decoding and
    encoding a sequence of known tokens returns the same sequence.
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
    """Train a byte-level BPE tokenizer (as GPT-2's), which can encode every text."""
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


TRAINERS: dict[Algorithm, Callable[[Iterable[str], int], tokenizers.Tokenizer]] = {
    "word": train_word_tokenizer,
    "byte_bpe": train_byte_bpe_tokenizer,
}


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> TrainedTokenizer:
    """Train a tokenizer on texts, which must be those of the training split."""
    return TrainedTokenizer(TRAINERS[config.kind](texts, config.vocab_size))
