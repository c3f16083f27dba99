"""From rows of text to padded arrays of tokens, and from those to shuffled batches that any step can be asked for."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import grain
import numpy as np

from rlhf_jax.data import formats
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import PreferenceBatch, RlhfError, TokenBatch

Batch = TypeVar("Batch", bound=tuple)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the splits are, and how long prompts and responses may be.

    A source is a file, a Hugging Face dataset directory, or `tfds:NAME/SPLIT`. Nothing is chosen on `test`; None takes
    `eval` in its place. Rows of plain `text` become prompts by their first `text_prompt_tokens` (least, most) tokens.
    """

    train: str
    eval: str
    test: str | None
    limit: int | None  # only the first rows of each split
    text_prompt_tokens: tuple[int, int]
    max_prompt_tokens: int  # BOS included
    max_response_tokens: int  # EOS included

    def __post_init__(self) -> None:
        least, most = self.text_prompt_tokens
        if not 1 <= least <= most:
            raise ValueError(f"text_prompt_tokens = {self.text_prompt_tokens} must be (least, most) with 1 <= least")
        if self.max_prompt_tokens < most + 1:
            raise ValueError(
                f"max_prompt_tokens = {self.max_prompt_tokens} has no room for BOS and "
                f"the {most} tokens of text_prompt_tokens"
            )
        if self.max_response_tokens < 1:
            raise ValueError(f"max_response_tokens = {self.max_response_tokens} must be at least 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit = {self.limit} must be at least 1, or None for every row")

    def source(self, split: str) -> str:
        """Where a split ("train", "eval" or "test") is read from."""
        return {"train": self.train, "eval": self.eval, "test": self.test or self.eval}[split]


class Prompts(NamedTuple):
    """All prompts of a split, left-padded."""

    tokens: np.ndarray  # int32[N, P]
    mask: np.ndarray  # bool[N, P]


class Example(NamedTuple):
    """One tokenised row: the prompt with BOS, and the response with EOS unless it was cut off."""

    prompt: list[int]
    response: list[int]


def load_rows(config: DataConfig, split: str) -> list[Row]:
    """The rows of a split. Preference rows come out as `prompt, chosen, rejected`, other columns kept.

    Raises RlhfError naming file and row where a text is missing or is no text, and for unpaired data, which no stage
    learns from yet: its bad completions must not pass for demonstrations.
    """
    source = config.source(split)
    rows = _table(source, formats.file_hash(source))[: config.limit]
    kind = formats.kind_of(rows, source)
    if kind in ("preference", "implicit_prompt_preference"):
        return formats.preference_rows(rows, source)
    if kind == "unpaired":
        raise RlhfError(
            f"{source} is unpaired data (prompt, completion, label), which no stage learns from: keep the rows with "
            "good completions and drop the column label, or make pairs of chosen and rejected"
        )
    formats.require_texts(rows, formats.KINDS[kind], source)
    return rows


def training_texts(rows: list[Row]) -> list[str]:
    """Every text a tokenizer is trained on: whole texts, or prompts with their (chosen) completions."""
    return [(prompt or "") + completion for prompt, completion in map(_demonstration, rows)]


def demonstrations(rows: list[Row], tokenizer: Tokenizer, config: DataConfig) -> TokenBatch:
    """Sequences for SFT, right-padded: the loss is on completions, or on all of a row of plain text.

    Unknown words are read but not learnt, for a policy never emits them. Cut-off responses have no EOS.
    """
    prompts, completions = zip(*map(_demonstration, rows), strict=True)
    examples = tokenise(prompts, completions, tokenizer, config)
    sequences = [example.prompt + example.response for example in examples]
    tokens, mask = pad_right(sequences, config.max_prompt_tokens + config.max_response_tokens)
    starts = np.array([len(example.prompt) for example in examples])
    loss_mask = mask & (np.arange(tokens.shape[1])[None, :] >= starts[:, None]) & (tokens != tokenizer.unknown_id)
    return TokenBatch(tokens, mask, loss_mask)


def prompts(rows: list[Row], tokenizer: Tokenizer, config: DataConfig) -> Prompts:
    """Prompts of a split: the `prompt` column, or beginnings of plain text that the tokenizer knows every word of.

    The length of a beginning is fixed by a hash of its text, uniform over `text_prompt_tokens`.
    """
    if "prompt" in rows[0]:
        texts = [row["prompt"] for row in rows]
        found = [_with_bos(ids, tokenizer, config) for ids in tokenizer.encode_all(texts)]
    else:
        texts = [row["text"] for row in rows]
        found = []
        for text, ids in zip(texts, tokenizer.encode_all(texts), strict=True):
            least, most = config.text_prompt_tokens
            length = least + zlib.crc32(text.encode()) % (most - least + 1)
            if len(ids) > length and tokenizer.unknown_id not in ids[:length]:
                found.append([tokenizer.bos_id, *ids[:length]])
    if not found:
        raise RlhfError(
            "no row of the data gives a prompt: every text is too short for text_prompt_tokens, or begins with words "
            "that the tokenizer does not know"
        )
    return Prompts(*pad_left(found, config.max_prompt_tokens))


def preferences(rows: list[Row], tokenizer: Tokenizer, config: DataConfig) -> PreferenceBatch:
    """All pairs of a table of preferences, padded."""
    texts = [row["prompt"] for row in rows]
    chosen = tokenise(texts, [row["chosen"] for row in rows], tokenizer, config)
    rejected = tokenise(texts, [row["rejected"] for row in rows], tokenizer, config)
    return PreferenceBatch(
        *pad_left([example.prompt for example in chosen], config.max_prompt_tokens),
        *pad_right([example.response for example in chosen], config.max_response_tokens),
        *pad_right([example.response for example in rejected], config.max_response_tokens),
    )


def tokenise(
    prompts: Sequence[str | None], completions: Sequence[str], tokenizer: Tokenizer, config: DataConfig
) -> list[Example]:
    """Tokens of prompts and of their completions, long prompts cut at their start, long completions at their end.

    Where the prompt is None the completion is a plain text, the response to BOS: as long as both may be.

    A prompt and its completion are encoded together, as the model will see them. Where that changes the prompt's own
    tokens (a merge across the border), the completion is encoded apart instead.
    """
    examples = []
    alone = tokenizer.encode_all([prompt or "" for prompt in prompts])
    joined = tokenizer.encode_all([(p or "") + c for p, c in zip(prompts, completions, strict=True)])
    for text, prompt, whole, completion in zip(prompts, alone, joined, completions, strict=True):
        response = whole[len(prompt) :] if whole[: len(prompt)] == prompt else tokenizer.encode(completion)
        room = config.max_response_tokens + (config.max_prompt_tokens - 1 if text is None else 0)
        examples.append(Example(_with_bos(prompt, tokenizer, config), [*response, tokenizer.eos_id][:room]))
    return examples


def pad_right(sequences: Sequence[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """int32[N, width] with padding 0 on the right, and its mask."""
    tokens, mask = np.zeros((len(sequences), width), np.int32), np.zeros((len(sequences), width), bool)
    for row, ids in enumerate(sequences):
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    return tokens, mask


def pad_left(sequences: Sequence[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """int32[N, width] with padding 0 on the left, and its mask."""
    tokens, mask = np.zeros((len(sequences), width), np.int32), np.zeros((len(sequences), width), bool)
    for row, ids in enumerate(sequences):
        tokens[row, width - len(ids) :], mask[row, width - len(ids) :] = ids, True
    return tokens, mask


def shuffled_batches(arrays: Batch, batch_size: int, seed: int) -> grain.MapDataset:
    """Endless batches of rows, every epoch in another order. `dataset[step]` is a function of seed and step alone.

    That is why a checkpoint needs no iterator state beyond the step.
    """
    count = len(arrays[0])
    if count < batch_size:
        raise RlhfError(f"{count} training rows do not fill one batch of {batch_size}: lower batch_size or add data")
    indices = grain.MapDataset.range(count).seed(seed).shuffle().batch(batch_size, drop_remainder=True).repeat()
    return indices.map(lambda rows: take(arrays, rows))


def take(arrays: Batch, rows: np.ndarray) -> Batch:
    """The rows of a tuple of arrays."""
    return type(arrays)(*(array[rows] for array in arrays))


@functools.lru_cache(maxsize=4)
def _table(source: str, content: str) -> list[Row]:
    del content  # a key: a file that has changed is read again
    return formats.read_table(source)


def _demonstration(row: Row) -> tuple[str | None, str]:
    """A prompt and what should follow it, or None and a plain text: by the first columns of these that a row has."""
    for answer in ("chosen", "completion"):
        if "prompt" in row and answer in row:
            return row["prompt"], row[answer]
    if "text" not in row:
        raise RlhfError(f"rows of {', '.join(row)} show no completion to learn from: add one, or a column text")
    return None, row["text"]


def _with_bos(ids: list[int], tokenizer: Tokenizer, config: DataConfig) -> list[int]:
    return [tokenizer.bos_id, *ids[max(0, len(ids) - config.max_prompt_tokens + 1) :]]
