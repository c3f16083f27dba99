"""Tokenise rows of text: prompts to padded arrays, training data to rows of different lengths."""

import logging
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import numpy as np

from rlhf_jax.data import chat
from rlhf_jax.data.padding import pad_left
from rlhf_jax.data.ragged import Ragged, RaggedPairs, RaggedSequences, Table, token_table
from rlhf_jax.data.splits import DataConfig as DataConfig
from rlhf_jax.data.splits import Row as Row
from rlhf_jax.data.splits import load_rows as load_rows
from rlhf_jax.text.tokenizer import NO_TEMPLATE, Messages, Tokenizer
from rlhf_jax.types import RlhfError, TokenBatch

Batch = TypeVar("Batch", bound=tuple)
Content: TypeAlias = Any
"""A text, a chat (`Messages`), or None for no prompt."""

logger = logging.getLogger(__name__)


class Prompts(NamedTuple):
    """All prompts of a split, left-padded."""

    tokens: np.ndarray  # int32[N, P]
    mask: np.ndarray  # bool[N, P]


class Example(NamedTuple):
    """Tokens of one row: the prompt, with BOS if the tokenizer adds one, and the response, with EOS unless cut off."""

    prompt: list[int]
    response: list[int]


def training_texts(rows: list[Row]) -> list[str]:
    """Texts for training a tokenizer: plain texts, or prompts with their (chosen) completions.

    Raises: RlhfError for chats, which need the chat template of a checkpoint's tokenizer.
    """
    prompts, completions = demonstration_pairs(rows)
    if _is_chat(completions):
        raise RlhfError(NO_TEMPLATE)
    return [(prompt or "") + completion for prompt, completion in zip(prompts, completions, strict=True)]


def demonstrations(rows: list[Row], tokenizer: Tokenizer, config: DataConfig) -> Table[TokenBatch[np.ndarray]]:
    """Tokenise sequences for SFT; the loss is on completions, or on all tokens of a plain text.

    With `loss_on = "assistant"` the loss is on all messages of the assistant. Unknown words have no loss, because a
    policy never emits them. Truncated responses have no EOS.

    Raises: RlhfError, naming the row, if a chat has no message of the assistant or the template cannot mark them, or
        if loss_on = "assistant" and the rows are not chats.
    """
    prompts, completions = demonstration_pairs(rows)
    if config.loss_on == "assistant":
        if not _is_chat(completions):
            raise RlhfError("data.loss_on = 'assistant' needs chats, but the rows are texts: set it to 'completion'")
        sequences, trained = _assistant_turns(prompts, completions, tokenizer, config)
    else:
        examples = tokenise(prompts, completions, tokenizer, config)
        sequences = [example.prompt + example.response for example in examples]
        trained = [[False] * len(example.prompt) + [True] * len(example.response) for example in examples]
    tokens, counted = Ragged.of(sequences), Ragged.of(trained, bool)
    counted.values[tokens.ends - tokens.lengths] = False  # the first token of a row has no prediction
    if tokenizer.unknown_id is not None:
        counted.values[tokens.values == tokenizer.unknown_id] = False
    return token_table(tokens, counted)


def prompts(rows: list[Row], tokenizer: Tokenizer, config: DataConfig) -> Prompts:
    """Prompts of a split: the column `prompt`, `messages` without a final answer, or the first tokens of plain texts.

    The length of a prompt from a plain text is uniform over `text_prompt_tokens`, determined by a hash of the text.
    Texts that are too short, or whose prompt would contain an unknown word, are skipped.
    """
    contents = [_prompt(row) for row in rows]
    if _is_chat(contents):
        texts = chat.render_prompts(contents, tokenizer)
        prompt_ids = [_chat_prompt(ids, tokenizer, config) for ids in tokenizer.encode_all(texts)]
    elif "prompt" in rows[0]:
        prompt_ids = [_text_prompt(ids, tokenizer, config) for ids in tokenizer.encode_all(contents)]
    else:
        prompt_ids = [ids for ids in text_prompts(contents, tokenizer, config) if ids is not None]
    if not prompt_ids:
        raise RlhfError(
            "no row of the data gives a prompt: every text is too short for text_prompt_tokens, or starts with words "
            "that the tokenizer does not know"
        )
    return Prompts(*pad_left(prompt_ids, config.max_prompt_tokens))


def text_prompts(texts: list[str], tokenizer: Tokenizer, config: DataConfig) -> list[list[int] | None]:
    """Tokens of each text's prompt, as `prompts` makes them; None for a text that is skipped."""
    least, most = config.text_prompt_tokens
    prompts: list[list[int] | None] = []
    for text, ids in zip(texts, tokenizer.encode_all(texts), strict=True):
        length = least + zlib.crc32(text.encode()) % (most - least + 1)
        known = len(ids) > length and tokenizer.unknown_id not in ids[:length]
        prompts.append(tokenizer.begin(ids[:length]) if known else None)
    return prompts


def preferences(rows: list[Row], tokenizer: Tokenizer, config: DataConfig) -> RaggedPairs:
    """Tokenise all preference pairs."""
    prompts = [row["prompt"] for row in rows]
    sides = [tokenise(prompts, [row[side] for row in rows], tokenizer, config) for side in ("chosen", "rejected")]
    before = Ragged.of([example.prompt for example in sides[0]])
    return RaggedPairs(*(RaggedSequences(before, Ragged.of([example.response for example in side])) for side in sides))


def unpaired(rows: list[Row], tokenizer: Tokenizer, config: DataConfig) -> RaggedSequences:
    """Tokenise all labelled completions."""
    return ragged(tokenise([row["prompt"] for row in rows], [row["completion"] for row in rows], tokenizer, config))


def ragged(examples: Sequence[Example]) -> RaggedSequences:
    """Concatenate the tokens of examples."""
    prompts, responses = zip(*examples, strict=True)
    return RaggedSequences(Ragged.of(prompts), Ragged.of(responses))


def tokenise(
    prompts: Sequence[Content], completions: Sequence[Content], tokenizer: Tokenizer, config: DataConfig
) -> list[Example]:
    """Encode pairs with `encode_pairs`, and log a warning if completions were encoded separately."""
    examples, separate = encode_pairs(prompts, completions, tokenizer, config)
    if separate:
        logger.warning(
            "In %d of %d rows (the first is row %d) a token would span the end of the prompt and the start of the "
            "completion: the completion was encoded separately.",
            len(separate),
            len(examples),
            separate[0],
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
    """Encode prompts and completions; long prompts are truncated on the left, long completions on the right.

    If the prompt is None, the completion is a plain text: the response to BOS, limited to the sum of both maximum
    lengths. Chats are rendered with the tokenizer's template, whose end-of-turn token serves as EOS.

    A prompt and its completion are encoded together, as the model will see them. If that changes the prompt's own
    tokens (a merge across the boundary), the completion is encoded separately, as a policy would generate it after the
    prompt.

    Args: first is the number of the first row; ended tells which completions ended on their own (default: all). A
    completion that was cut off gets neither EOS nor the template's end of turn, unless it would have no token.
    Returns: the examples, and the numbers of the rows that were encoded separately.
    Raises: RlhfError, naming the row, for chats that the template cannot render.
    """
    fit = _chat_prompt if _is_chat(completions) else _text_prompt
    if _is_chat(completions):
        before, after = chat.render_completions(prompts, completions, tokenizer, first=first, ended=ended)
    else:
        before, after = [prompt or "" for prompt in prompts], completions
    examples, separate = [], []
    prompt_ids = tokenizer.encode_all(before)
    joint_ids = tokenizer.encode_all([p + c for p, c in zip(before, after, strict=True)])
    with_end = [True] * len(after) if ended is None else ended
    rows = zip(prompts, prompt_ids, joint_ids, after, with_end, strict=True)
    for number, (content, prompt, joint, text, has_end) in enumerate(rows, start=first):
        response = joint[len(prompt) :]
        if joint[: len(prompt)] != prompt:
            separate.append(number)
            response = _encode_separately(text, tokenizer)
        limit = config.max_response_tokens
        if content is None:
            limit += config.max_prompt_tokens - len(tokenizer.begin([]))
        response = tokenizer.end(response) if has_end or not response else response
        examples.append(Example(fit(prompt, tokenizer, config), response[:limit]))
    return examples, separate


def take(arrays: Batch, rows: np.ndarray) -> Batch:
    """Take rows of every array of a batch."""
    return jax.tree.map(lambda array: array[rows], arrays)


def demonstration_pairs(rows: list[Row]) -> tuple[list[Content], list[Content]]:
    """Split rows into prompts and completions; the prompts of plain texts are None."""
    pairs = []
    for number, row in enumerate(rows, start=1):
        with chat.naming_row(number):
            pairs.append(_demonstration(row))
    prompts, completions = zip(*pairs, strict=True)
    return list(prompts), list(completions)


def _demonstration(row: Row) -> tuple[Content, Content]:
    """Prompt and completion of a row. Unpaired rows are rejected: their completions may be bad ones."""
    if "label" in row and "completion" in row and "chosen" not in row:
        raise RlhfError(
            "unpaired rows (prompt, completion, label) are not demonstrations: keep the rows with good completions and "
            "drop the column label"
        )
    for answer in ("chosen", "completion"):
        if "prompt" in row and answer in row:
            return row["prompt"], row[answer]
    if "messages" in row:
        return chat.last_answer(row["messages"])
    if "text" not in row:
        raise RlhfError(f"the columns {', '.join(row)} contain no completion: add a column completion or text")
    return None, row["text"]


def _prompt(row: Row) -> Content:
    """Prompt of a row, or the plain text to take a prompt from."""
    if "prompt" in row:
        return row["prompt"]
    return chat.question(row["messages"]) if "messages" in row else row["text"]


def _is_chat(contents: Sequence[Content]) -> bool:
    return isinstance(contents[0], list)


def _assistant_turns(
    prompts: list[Messages], completions: list[Messages], tokenizer: Tokenizer, config: DataConfig
) -> tuple[list[list[int]], list[list[bool]]]:
    """Conversations up to the last answer, truncated like prompt and response, and masks of the assistant's tokens."""
    sequences, trained = [], []
    for number, messages in enumerate(map(list.__add__, prompts, completions), start=1):
        with chat.naming_row(number):
            ids, written = tokenizer.encode_turns(messages)
            if not any(written):
                raise RlhfError("the chat template marks no token as the assistant's: correct the template")
        end = len(ids) - written[::-1].index(True)
        start = next((i + 1 for i in reversed(range(end)) if not written[i]), 0)
        response = tokenizer.end(ids[start:])[: config.max_response_tokens]
        kept = _kept(ids[:start], tokenizer, config)
        sequences.append([ids[i] for i in kept] + response)
        # The extra True is for an EOS that the template did not write.
        trained.append([written[i] for i in kept] + [*written[start:], True][: len(response)])
    return sequences, trained


def _encode_separately(completion: str, tokenizer: Tokenizer) -> list[int]:
    # Encoded after a newline, because SentencePiece tokenizers put a space before every text.
    newline, joint = tokenizer.encode("\n"), tokenizer.encode("\n" + completion)
    return joint[len(newline) :] if joint[: len(newline)] == newline else tokenizer.encode(completion)


def _text_prompt(ids: list[int], tokenizer: Tokenizer, config: DataConfig) -> list[int]:
    return tokenizer.begin(ids[max(0, len(ids) - config.max_prompt_tokens + len(tokenizer.prefix)) :])


def _chat_prompt(ids: list[int], tokenizer: Tokenizer, config: DataConfig) -> list[int]:
    return [ids[i] for i in _kept(ids, tokenizer, config)]


def _kept(ids: list[int], tokenizer: Tokenizer, config: DataConfig) -> list[int]:
    """Indices of the tokens kept when a rendered prompt is truncated on the left; BOS, if there is one, is kept."""
    head = len(tokenizer.prefix) if tuple(ids[: len(tokenizer.prefix)]) == tokenizer.prefix else 0
    return [*range(head), *range(max(head, len(ids) - config.max_prompt_tokens + head), len(ids))]
