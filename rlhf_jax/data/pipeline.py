"""From rows of text to padded arrays of tokens, and from those to shuffled batches that any step can be asked for."""

import dataclasses
import functools
import logging
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import grain
import jax
import numpy as np

from rlhf_jax.config import Count, check_ranges
from rlhf_jax.data import chat, formats
from rlhf_jax.data.padding import pad_left, pad_right
from rlhf_jax.text.tokenizer import NO_TEMPLATE, Messages, Tokenizer
from rlhf_jax.types import PreferenceBatch, RlhfError, TokenBatch, UnpairedBatch

Batch = TypeVar("Batch", bound=tuple)
Row = dict[str, Any]
Content: TypeAlias = Any
"""A text, or a chat (`Messages`), of which the tokenizer's template makes one; None for no prompt."""

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the splits are, and how long prompts and responses may be.

    A source is a file, a Hugging Face dataset directory, or `tfds:NAME/SPLIT`. Nothing is chosen on `test`; None takes
    `eval` in its place. Rows of plain `text` become prompts by their first `text_prompt_tokens` (least, most) tokens.
    SFT learns the completion (of `messages`, the assistant's last), or all that the assistant says in a chat.
    """

    train: str  # source of the training split: a file, a dataset directory, or tfds:NAME/SPLIT
    eval: str  # source of the validation split, for evaluations during training and for choices
    test: str | None  # source of the test split, on which nothing is chosen; None: eval
    limit: Count | None  # use only the first rows of each split; None: all
    text_prompt_tokens: tuple[Count, Count]  # fewest and most tokens of a row of plain `text` that become its prompt
    max_prompt_tokens: Count  # longest prompt, BOS included; longer ones lose their beginning
    max_response_tokens: Count  # longest response, EOS included; longer ones are cut
    # What SFT learns of a chat: the last answer, or every turn of the assistant.
    loss_on: Literal["completion", "assistant"] = "completion"

    def __post_init__(self) -> None:
        check_ranges(self)
        least, most = self.text_prompt_tokens
        if not 1 <= least <= most:
            raise ValueError(f"text_prompt_tokens = {self.text_prompt_tokens} must be (least, most) with 1 <= least")
        if self.max_prompt_tokens < most + 1:
            raise ValueError(
                f"max_prompt_tokens = {self.max_prompt_tokens} has no room for BOS and "
                f"the {most} tokens of text_prompt_tokens"
            )

    def source(self, split: str) -> str:
        """Where a split ("train", "eval" or "test") is read from."""
        return {"train": self.train, "eval": self.eval, "test": self.test or self.eval}[split]


class Prompts(NamedTuple):
    """All prompts of a split, left-padded."""

    tokens: np.ndarray  # int32[N, P]
    mask: np.ndarray  # bool[N, P]


class Example(NamedTuple):
    """One tokenised row: the prompt, with BOS where the model has one, and the response with EOS unless cut off."""

    prompt: list[int]
    response: list[int]


def load_rows(config: DataConfig, split: str) -> list[Row]:
    """The rows of a split. Preference rows come out as `prompt, chosen, rejected`, other columns kept.

    Raises RlhfError naming file and row where a value is missing or is neither text nor chat, and where all preference
    rows have the same answer on both sides.
    """
    source = config.source(split)
    rows = _table(source, formats.file_hash(source))[: config.limit]
    kind = formats.kind_of(rows, source)
    if kind in ("preference", "implicit_prompt_preference"):
        pairs = formats.preference_rows(rows, source)
        if all(row["chosen"] == row["rejected"] for row in pairs):
            raise RlhfError(
                f"{source}: chosen and rejected are the same in every row, which prefers nothing: check them"
            )
        return pairs
    if kind in ("unpaired", "ranked"):
        return {"unpaired": formats.unpaired_rows, "ranked": formats.ranked_rows}[kind](rows, source)
    return formats.checked_rows(rows, formats.KINDS[kind], source)


def training_texts(rows: list[Row]) -> list[str]:
    """Every text a tokenizer is trained on: whole texts, or prompts with their (chosen) completions.

    Raises: RlhfError for chats, which only a checkpoint's tokenizer has a template for.
    """
    prompts, completions = demonstration_pairs(rows)
    if _is_chat(completions):
        raise RlhfError(NO_TEMPLATE)
    return [(prompt or "") + completion for prompt, completion in zip(prompts, completions, strict=True)]


def demonstrations(rows: list[Row], tokenizer: Tokenizer, config: DataConfig) -> TokenBatch:
    """Sequences for SFT, right-padded: the loss is on completions, or on all of a row of plain text.

    With `loss_on = "assistant"` it is on all that the assistant says in a chat. Unknown words are read but not learnt,
    for a policy never emits them. Cut-off responses have no EOS.

    Raises: RlhfError, naming the row, where a chat has nothing to learn or its template cannot say what the assistant
        wrote; where plain texts should have an assistant.
    """
    prompts, completions = demonstration_pairs(rows)
    if config.loss_on == "assistant":
        if not _is_chat(completions):
            raise RlhfError("data.loss_on = 'assistant' needs chats, and the rows are texts: set it to 'completion'")
        sequences, trained = _assistant_turns(prompts, completions, tokenizer, config)
    else:
        examples = tokenise(prompts, completions, tokenizer, config)
        sequences = [example.prompt + example.response for example in examples]
        trained = [[False] * len(example.prompt) + [True] * len(example.response) for example in examples]
    width = config.max_prompt_tokens + config.max_response_tokens
    tokens, mask = pad_right(sequences, width)
    loss_mask = pad_right(trained, width)[0].astype(bool)
    loss_mask[:, 0] = False
    if tokenizer.unknown_id is not None:
        loss_mask &= tokens != tokenizer.unknown_id
    return TokenBatch(tokens, mask, loss_mask)


def prompts(rows: list[Row], tokenizer: Tokenizer, config: DataConfig) -> Prompts:
    """Prompts of a split: the `prompt` column, what the assistant last answers in `messages`, or beginnings of texts.

    A beginning is one that the tokenizer knows every word of; its length is fixed by a hash of the whole text, uniform
    over `text_prompt_tokens`.
    """
    contents = [_prompt(row) for row in rows]
    if _is_chat(contents):
        texts = chat.render_prompts(contents, tokenizer)
        found = [_chat_prompt(ids, tokenizer, config) for ids in tokenizer.encode_all(texts)]
    elif "prompt" in rows[0]:
        found = [_text_prompt(ids, tokenizer, config) for ids in tokenizer.encode_all(contents)]
    else:
        found = []
        for text, ids in zip(contents, tokenizer.encode_all(contents), strict=True):
            least, most = config.text_prompt_tokens
            length = least + zlib.crc32(text.encode()) % (most - least + 1)
            if len(ids) > length and tokenizer.unknown_id not in ids[:length]:
                found.append(tokenizer.begin(ids[:length]))
    if not found:
        raise RlhfError(
            "no row of the data gives a prompt: every text is too short for text_prompt_tokens, or begins with words "
            "that the tokenizer does not know"
        )
    return Prompts(*pad_left(found, config.max_prompt_tokens))


def preferences(rows: list[Row], tokenizer: Tokenizer, config: DataConfig) -> PreferenceBatch:
    """All pairs of a table of preferences, padded."""
    asked = [row["prompt"] for row in rows]
    chosen = tokenise(asked, [row["chosen"] for row in rows], tokenizer, config)
    rejected = tokenise(asked, [row["rejected"] for row in rows], tokenizer, config)
    return PreferenceBatch(
        *pad_left([example.prompt for example in chosen], config.max_prompt_tokens),
        *pad_right([example.response for example in chosen], config.max_response_tokens),
        *pad_right([example.response for example in rejected], config.max_response_tokens),
    )


def unpaired(rows: list[Row], tokenizer: Tokenizer, config: DataConfig) -> UnpairedBatch:
    """All rows of a table of labelled completions, padded."""
    examples = tokenise([row["prompt"] for row in rows], [row["completion"] for row in rows], tokenizer, config)
    return UnpairedBatch(
        *pad_left([example.prompt for example in examples], config.max_prompt_tokens),
        *pad_right([example.response for example in examples], config.max_response_tokens),
        np.array([row["label"] for row in rows], bool),
    )


def tokenise(
    prompts: Sequence[Content], completions: Sequence[Content], tokenizer: Tokenizer, config: DataConfig
) -> list[Example]:
    """What `encode_pairs` gives; a warning says how many completions were encoded apart."""
    examples, apart = encode_pairs(prompts, completions, tokenizer, config)
    if apart:
        logger.warning(
            "In %d of %d rows (the first is row %d) the end of the prompt and the beginning of the completion would "
            "share a token: the completion was encoded apart.",
            len(apart),
            len(examples),
            apart[0],
        )
    return examples


def encode_pairs(
    prompts: Sequence[Content],
    completions: Sequence[Content],
    tokenizer: Tokenizer,
    config: DataConfig,
    *,
    first: int = 1,
    ended: Sequence[bool] | None = None,
) -> tuple[list[Example], list[int]]:
    """Tokens of prompts and of their completions, long prompts cut at their start, long completions at their end.

    Where the prompt is None the completion is a plain text, the response to BOS: as long as both may be. Chats are
    written by the tokenizer's template, whose end of a turn is the response's EOS.

    A prompt and its completion are encoded together, as the model will see them. Where that changes the prompt's own
    tokens (a merge across the border), the completion is encoded apart instead, as a policy that is given the prompt
    would write it.

    Args: first is the number of the first row; ended says which completions are whole, by default all. One that was cut
    off gets neither EOS nor the template's end of a turn, unless it has no token otherwise.
    Returns: the examples, and the numbers of the rows that were encoded apart.
    Raises: RlhfError, naming the row, for chats that the template cannot write so.
    """
    fit = _chat_prompt if _is_chat(completions) else _text_prompt
    if _is_chat(completions):
        before, after = chat.render_completions(prompts, completions, tokenizer, first=first, ended=ended)
    else:
        before, after = [prompt or "" for prompt in prompts], completions
    examples, apart = [], []
    alone = tokenizer.encode_all(before)
    joined = tokenizer.encode_all([p + c for p, c in zip(before, after, strict=True)])
    whole_ones = [True] * len(after) if ended is None else ended
    rows = zip(prompts, alone, joined, after, whole_ones, strict=True)
    for number, (asked, prompt, whole, text, has_end) in enumerate(rows, start=first):
        response = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt:
            apart.append(number)
            response = _encode_apart(text, tokenizer)
        room = config.max_response_tokens
        if asked is None:
            room += config.max_prompt_tokens - len(tokenizer.begin([]))
        response = tokenizer.end(response) if has_end or not response else response
        examples.append(Example(fit(prompt, tokenizer, config), response[:room]))
    return examples, apart


def shuffled_batches(arrays: Batch, batch_size: int, seed: int) -> grain.MapDataset:
    """Endless batches of rows, every epoch in another order. `dataset[step]` is a function of seed and step alone.

    That is why a checkpoint needs no iterator state beyond the step.
    """
    count = len(jax.tree.leaves(arrays)[0])
    if count < batch_size:
        raise RlhfError(f"{count} training rows do not fill one batch of {batch_size}: lower batch_size or add data")
    indices = grain.MapDataset.range(count).seed(seed).shuffle().batch(batch_size, drop_remainder=True).repeat()
    return indices.map(lambda rows: take(arrays, rows))


def take(arrays: Batch, rows: np.ndarray) -> Batch:
    """Take rows of every array of a batch."""
    return jax.tree.map(lambda array: array[rows], arrays)


@functools.lru_cache(maxsize=4)
def _table(source: str, content: str) -> list[Row]:
    del content  # a key: a file that has changed is read again
    return formats.read_table(source)


def demonstration_pairs(rows: list[Row]) -> tuple[list[Content], list[Content]]:
    """Prompts, and what should follow them; the prompts of plain texts are None."""
    pairs = []
    for number, row in enumerate(rows, start=1):
        with chat.naming_row(number):
            pairs.append(_demonstration(row))
    prompts, completions = zip(*pairs, strict=True)
    return list(prompts), list(completions)


def _demonstration(row: Row) -> tuple[Content, Content]:
    """By the first columns of these that a row has. Bad completions must not pass for demonstrations."""
    if "label" in row and "completion" in row and "chosen" not in row:
        raise RlhfError(
            "it is unpaired (prompt, completion, label), which is no demonstration: keep the rows with good "
            "completions and drop the column label"
        )
    for answer in ("chosen", "completion"):
        if "prompt" in row and answer in row:
            return row["prompt"], row[answer]
    if "messages" in row:
        return chat.last_answer(row["messages"])
    if "text" not in row:
        raise RlhfError(f"its columns {', '.join(row)} show no completion to learn from: add one, or a column text")
    return None, row["text"]


def _prompt(row: Row) -> Content:
    """The prompt of a row, or the plain text that begins with one."""
    if "prompt" in row:
        return row["prompt"]
    return chat.question(row["messages"]) if "messages" in row else row["text"]


def _is_chat(contents: Sequence[Content]) -> bool:
    return isinstance(contents[0], list)


def _assistant_turns(
    prompts: list[Messages], completions: list[Messages], tokenizer: Tokenizer, config: DataConfig
) -> tuple[list[list[int]], list[list[bool]]]:
    """Whole conversations up to the last answer, cut as prompt and response are, and what the assistant writes."""
    sequences, trained = [], []
    for number, messages in enumerate(map(list.__add__, prompts, completions), start=1):
        with chat.naming_row(number):
            ids, written = tokenizer.encode_turns(messages)
            if not any(written):
                raise RlhfError("the chat template marks nothing as written by the assistant: correct it")
        end = len(ids) - written[::-1].index(True)
        start = next((place + 1 for place in reversed(range(end)) if not written[place]), 0)
        response = tokenizer.end(ids[start:])[: config.max_response_tokens]
        kept = _kept(ids[:start], tokenizer, config)
        sequences.append([ids[place] for place in kept] + response)
        # One more, for an EOS that the template did not write.
        trained.append([written[place] for place in kept] + [*written[start:], True][: len(response)])
    return sequences, trained


def _encode_apart(completion: str, tokenizer: Tokenizer) -> list[int]:
    # After a newline, because sentencepiece's tokenizers put a space before every text.
    line, whole = tokenizer.encode("\n"), tokenizer.encode("\n" + completion)
    return whole[len(line) :] if whole[: len(line)] == line else tokenizer.encode(completion)


def _text_prompt(ids: list[int], tokenizer: Tokenizer, config: DataConfig) -> list[int]:
    return tokenizer.begin(ids[max(0, len(ids) - config.max_prompt_tokens + len(tokenizer.prefix)) :])


def _chat_prompt(ids: list[int], tokenizer: Tokenizer, config: DataConfig) -> list[int]:
    return [ids[place] for place in _kept(ids, tokenizer, config)]


def _kept(ids: list[int], tokenizer: Tokenizer, config: DataConfig) -> list[int]:
    """The places of a rendered prompt's tokens that fit: its end, after BOS where the template writes one."""
    head = len(tokenizer.prefix) if tuple(ids[: len(tokenizer.prefix)]) == tokenizer.prefix else 0
    return [*range(head), *range(max(head, len(ids) - config.max_prompt_tokens + head), len(ids))]
