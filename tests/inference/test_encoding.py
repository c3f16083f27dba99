"""Messages about prompts that cannot be encoded."""

import pytest

from rlhf_jax.inference.encoding import encode_prompt
from rlhf_jax.text.tokenizer import TokenizerConfig, train_tokenizer
from rlhf_jax.types import RlhfError

TOKENIZER = train_tokenizer(TokenizerConfig("word", 16), ["good bad film"])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("good " * 5000, "at most 3 (data.max_prompt_tokens = 4"), ("film " * 5000 + "dull", "'dull'")],
)
def test_a_long_prompt_is_quoted_in_part(prompt, words):
    with pytest.raises(RlhfError) as raised:
        encode_prompt(prompt, TOKENIZER, 4)
    message = str(raised.value)
    assert prompt[:60] in message and words in message and len(message) < 250
