"""Encode prompts and completions, texts or chats, without truncation."""

import dataclasses
from collections.abc import Sequence

from rlhf_jax.data.pipeline import Content
from rlhf_jax.loading.models import Policy
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.text.tokenizer import Tokenizer
from rlhf_jax.types import RlhfError

MOST_QUOTED = 80
"""Maximum length of a prompt in a message."""


def encode_prompt(prompt: Content, tokenizer: Tokenizer, max_prompt_tokens: int | None = None) -> list[int]:
    """Encode a text with BOS, or a chat with the header of the assistant's next turn.

    Raises RlhfError if the tokenizer lacks a token for a word, or if the prompt has more than `max_prompt_tokens`
    tokens, including BOS.
    """
    if isinstance(prompt, list):
        ids = tokenizer.encode(tokenizer.render(prompt, add_generation_prompt=True))
        prefix = 0
    else:
        encoding = tokenizer.backend.encode(prompt, add_special_tokens=False)
        spans = [span for id, span in zip(encoding.ids, encoding.offsets, strict=True) if id == tokenizer.unknown_id]
        unknown = [prompt[start:end].strip() or prompt[start:end] for start, end in spans]
        if unknown:
            raise RlhfError(f"prompt {_start(prompt)}: the tokenizer has no token for {', '.join(map(repr, unknown))}")
        ids = tokenizer.begin(encoding.ids)
        prefix = len(tokenizer.prefix)
    if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
        raise RlhfError(
            f"prompt {_start(prompt)} has {len(ids) - prefix} tokens, but this run allows at most "
            f"{max_prompt_tokens - prefix} (data.max_prompt_tokens = {max_prompt_tokens}, including BOS): shorten it"
        )
    return ids


def _start(prompt: Content) -> str:
    """Quote a prompt, or the start of a long one, for a message."""
    text = repr(prompt)
    return text if len(text) <= MOST_QUOTED else f"{text[:MOST_QUOTED]}..."


def encode_prompts(prompts: Sequence[Content], policy: Policy, max_prompt_tokens: int | None = None) -> list[list[int]]:
    """Encode prompts. Raises RlhfError as `encode_prompt` does, and if a prompt leaves no room for an answer."""
    encoded = [encode_prompt(prompt, policy.tokenizer, max_prompt_tokens) for prompt in prompts]
    for ids in encoded:
        require_room(policy, ids)
    return encoded


def as_answers(prompt: Content, texts: Sequence[str]) -> list[Content]:
    """Convert answers to the form of their prompt: texts, or chats with one message."""
    if isinstance(prompt, str):
        return list(texts)
    return [[{"role": "assistant", "content": text}] for text in texts]


def require_room(policy: Policy, prompt: Sequence[int]) -> None:
    """Raise RlhfError if a prompt fills the model's context and leaves no room for an answer."""
    context = policy.network.config.context
    if context is not None and len(prompt) >= context:
        raise RlhfError(f"the prompt has {len(prompt)} tokens, but the context is {context}, including the answer")


def within_context(policy: Policy, prompt: Sequence[int], sampling: Sampling) -> Sampling:
    """Limit max_new_tokens to the model's remaining context. Raises RlhfError if the prompt leaves no room."""
    require_room(policy, prompt)
    context = policy.network.config.context
    if context is None:
        return sampling
    return dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, context - len(prompt)))
