"""Chats rendered with the model's chat template, split into prompt and answer."""

import contextlib
from collections.abc import Iterator, Sequence

from rlhf_jax.text.tokenizer import Messages, Tokenizer
from rlhf_jax.types import RlhfError


def question(messages: Messages) -> Messages:
    """Messages that the assistant is to answer: all, without a final message of the assistant."""
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def last_answer(messages: Messages) -> tuple[Messages, Messages]:
    """Split a chat into the messages before the assistant's last one, and that one; later messages are dropped.

    Raises: RlhfError if the assistant has no message.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RlhfError("the chat has no message of the assistant and gives no completion: remove the row")
    return messages[: answers[-1]], messages[answers[-1] : answers[-1] + 1]


def render_prompts(prompts: Sequence[Messages], tokenizer: Tokenizer, *, first: int = 1) -> list[str]:
    """Render each prompt with a generation prompt. Raises RlhfError, naming the row."""
    texts = []
    for number, prompt in enumerate(prompts, start=first):
        with naming_row(number):
            texts.append(tokenizer.render(prompt, add_generation_prompt=True))
    return texts


def render_completions(
    prompts: Sequence[Messages],
    completions: Sequence[Messages],
    tokenizer: Tokenizer,
    *,
    first: int = 1,
    ended: Sequence[bool] | None = None,
) -> tuple[list[str], list[str]]:
    """Render prompts as `render_prompts` does, and the text that each completion adds to its prompt.

    Args: first is the number of the first row; ended tells which completions ended on their own (default: all). After
    one that was cut off, the template's end-of-turn token is left out.
    Raises: RlhfError, naming the row, if the template renders the prompt differently when an answer follows.
    """
    before, after = render_prompts(prompts, tokenizer, first=first), []
    for number, (prompt, completion, start) in enumerate(zip(prompts, completions, before, strict=True), start=first):
        with naming_row(number):
            conversation = tokenizer.render([*prompt, *completion], add_generation_prompt=False)
            if not conversation.startswith(start):
                pairs = enumerate(zip(start, [*conversation, ""], strict=False))
                shared = next(i for i, (a, b) in pairs if a != b)
                raise RlhfError(
                    f"the chat template ends the prompt with {start[-30:]!r}, but writes "
                    f"{conversation[shared:][:30]!r} instead of {start[shared:][:30]!r} when the completion follows: "
                    "start the completion with a message of the assistant, or use a template whose generation prompt "
                    "matches its answers"
                )
            after.append(conversation[len(start) :])
    if ended is not None:
        after = [
            text if complete else text[: _end_of(completion[-1]["content"], text)]
            for text, completion, complete in zip(after, completions, ended, strict=True)
        ]
    return before, after


def _end_of(content: str, text: str) -> int:
    """Find the end of a message's content in its turn's text; that text's end if the template rewrote the content."""
    for candidate in (content, content.strip()):  # some templates strip it
        if candidate and (start := text.rfind(candidate)) >= 0:
            return start + len(candidate)
    return len(text) if content.strip() else 0


@contextlib.contextmanager
def naming_row(number: int) -> Iterator[None]:
    """Prefix the message of an RlhfError with the row number, counted from 1."""
    try:
        yield
    except RlhfError as error:
        raise RlhfError(f"row {number} of the data: {error}") from error
