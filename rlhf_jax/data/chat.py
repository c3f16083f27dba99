"""Chats as their model's template writes them: what stands before an answer, and the answer."""

import contextlib
from collections.abc import Iterator, Sequence

from rlhf_jax.text.tokenizer import Messages, Tokenizer
from rlhf_jax.types import RlhfError


def question(messages: Messages) -> Messages:
    """The messages that the assistant is to answer: all, or those before its last answer if nothing follows that."""
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def last_answer(messages: Messages) -> tuple[Messages, Messages]:
    """The messages before the assistant's last one, and that one; what follows it is left out.

    Raises: RlhfError where the assistant says nothing.
    """
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RlhfError("no message is the assistant's, so that there is nothing to learn: remove the row")
    return messages[: answers[-1]], messages[answers[-1] : answers[-1] + 1]


def render_prompts(prompts: Sequence[Messages], tokenizer: Tokenizer, *, first: int = 1) -> list[str]:
    """Text of each prompt, ended by the beginning of an answer. Raises RlhfError, naming the row."""
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
    """Texts of the prompts, as `render_prompts` gives them, and of what the whole conversations add to them.

    Args: first is the number of the first row; ended says which completions are whole, by default all. After the last
    message of one that was cut off, the template's end of a turn is left out.
    Raises: RlhfError, naming the row, where the template writes a prompt otherwise once it is answered.
    """
    before, after = render_prompts(prompts, tokenizer, first=first), []
    for number, (prompt, completion, start) in enumerate(zip(prompts, completions, before, strict=True), start=first):
        with naming_row(number):
            whole = tokenizer.render([*prompt, *completion], add_generation_prompt=False)
            if not whole.startswith(start):
                shared = next(i for i, pair in enumerate(zip(start, [*whole, ""], strict=False)) if pair[0] != pair[1])
                raise RlhfError(
                    f"the chat template ends the prompt with {start[-30:]!r} and goes on with {whole[shared:][:30]!r} "
                    f"instead of {start[shared:][:30]!r} once it is answered: begin the completion with a message of "
                    "the assistant, or use a template that begins answers as it writes them"
                )
            after.append(whole[len(start) :])
    if ended is not None:
        after = [
            text if whole else text[: _end_of(completion[-1]["content"], text)]
            for text, completion, whole in zip(after, completions, ended, strict=True)
        ]
    return before, after


def _end_of(content: str, text: str) -> int:
    """Find the end of a message's content in its turn's text; that text's end if the template rewrote the content."""
    for said in (content, content.strip()):  # some templates strip it
        if said and (place := text.rfind(said)) >= 0:
            return place + len(said)
    return len(text) if content.strip() else 0


@contextlib.contextmanager
def naming_row(number: int) -> Iterator[None]:
    """Says which row an RlhfError is about; rows are counted from 1."""
    try:
        yield
    except RlhfError as error:
        raise RlhfError(f"row {number} of the data: {error}") from error
