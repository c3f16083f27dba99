"""Tokenizers trained on the experiment's own text, and the one interface through which the rest sees any tokenizer."""

import abc
import dataclasses
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
    "a tokenizer trained here has no chat template, which chat messages need: give texts (columns text, or prompt and "
    "completion), or begin with a checkpoint whose tokenizer has a template"
)

Kind = Literal["word", "byte_bpe"]
Messages: TypeAlias = list[dict[str, Any]]
"""A conversation: `role` and `content` of each message, and whatever else its template reads."""


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """A tokenizer to be trained: `word` (lower-cased words and punctuation) or `byte_bpe` (any text, no unknowns)."""

    kind: Kind  # word (lower-cased words and punctuation) or byte_bpe (any text, without unknown tokens)
    vocab_size: Count  # tokens in the vocabulary, special ones included

    def __post_init__(self) -> None:
        least = len(SPECIAL_TOKENS) + {"word": 1, "byte_bpe": 256}[self.kind]
        if self.vocab_size < least:
            raise ValueError(f"vocab_size = {self.vocab_size} must be at least {least} for the kind {self.kind!r}")


class Tokenizer(abc.ABC):
    """What the rest of the code knows of a tokenizer, its own or that of a Hugging Face checkpoint."""

    backend: tokenizers.Tokenizer
    pad_id: int  # perhaps the same as eos_id: masks alone say what is padding
    eos_id: int
    unknown_id: int | None  # of words without a token, where the tokenizer has such words
    start_id: int  # what an empty prompt consists of
    prefix: tuple[int, ...]  # ids that every prompt begins with
    stop_ids: tuple[int, ...]  # ids that end a response: EOS, then others
    suppressed: tuple[int, ...]  # ids that a policy never emits
    vocab_size: int  # one more than the largest id; a model may have more rows
    chat_template: str | None

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without those that every prompt begins with and without EOS."""
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

    def begin(self, ids: Iterable[int]) -> list[int]:
        """A prompt of text: its ids after those that every prompt begins with, and never nothing."""
        return [*self.prefix, *ids] or [self.start_id]

    def trim(self, response: list[int]) -> list[int]:
        """A response up to the token that ends it, where nothing but blanks (a template's newline) follows that."""
        kept = len(response)
        for place in reversed(range(len(response))):
            if response[place] in self.stop_ids:
                kept = place + 1
            elif self.decode([response[place]]).strip():
                break
        return response[:kept]

    def end(self, response: list[int]) -> list[int]:
        """A whole response, ended by EOS, unless a stop token (of a chat template, say) ends it already."""
        trimmed = self.trim(response)
        return trimmed if trimmed and trimmed[-1] in self.stop_ids else [*trimmed, self.eos_id]

    @abc.abstractmethod
    def save(self, directory: Path) -> None:
        """Writes into a directory, which it makes, what `load_tokenizer` reads; whole or not there."""

    @abc.abstractmethod
    def render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """The text of a conversation, by the chat template; to be encoded as it is, without a prefix.

        Args: add_generation_prompt ends it with the beginning of an answer by the assistant.
        Raises RlhfError where there is no template, or it refuses the messages.
        """

    @abc.abstractmethod
    def encode_turns(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Ids of a rendered conversation, and which of them the assistant is to write. Raises as `render` does."""


class TrainedTokenizer(Tokenizer):
    """A tokenizer of ours, with four special tokens, which never come from text; it has no chat template."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wraps a tokenizer that knows the four special tokens. Their names within a text are text."""
        self.backend = backend
        self.backend.encode_special_tokens = True
        self.pad_id, self.bos_id, self.eos_id, self.unknown_id = map(self._special_id, SPECIAL_TOKENS)
        self.start_id, self.prefix, self.stop_ids = self.bos_id, (self.bos_id,), (self.eos_id,)
        self.suppressed = (self.pad_id, self.bos_id, self.unknown_id)
        self.vocab_size = backend.get_vocab_size()
        self.chat_template = None

    def save(self, directory: Path) -> None:
        """Writes tokenizer.json."""
        directory.mkdir(parents=True, exist_ok=True)
        temporary = directory / ".tokenizer.tmp"
        self.backend.save(str(temporary))
        temporary.replace(directory / TOKENIZER_FILE)

    def render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """Raises RlhfError: there is no chat template."""
        raise RlhfError(NO_TEMPLATE)

    def encode_turns(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Raises RlhfError: there is no chat template."""
        raise RlhfError(NO_TEMPLATE)

    def _special_id(self, token: str) -> int:
        found = self.backend.token_to_id(token)
        if found is None:
            raise RlhfError(
                f"the tokenizer has no token {token}: train it with rlhf_jax, or add {SPECIAL_TOKENS}; one of Hugging "
                f"Face's needs its {CONFIG_FILE} beside it"
            )
        return found


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer in a directory, or of a repository on the Hugging Face Hub.

    A directory with a tokenizer_config.json holds one of Hugging Face's, one with only a tokenizer.json one of ours. A
    `Path` is a directory; a string that is none is the name of a repository, such as `HuggingFaceTB/SmolLM2-135M`.

    Raises: RlhfError where there is none, or where a file does not parse.
    """
    directory = Path(source)
    if (isinstance(source, str) and not directory.exists()) or (directory / CONFIG_FILE).exists():
        # Imported here: transformers takes two seconds, which an experiment of its own need not wait for.
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


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> TrainedTokenizer:
    """A tokenizer trained on texts, which must be the training split's."""
    return TrainedTokenizer(TRAINERS[config.kind](texts, config.vocab_size))
