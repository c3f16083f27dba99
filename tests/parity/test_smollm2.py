# torch and transformers are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""A real language model says what transformers says with the same weights: 20 prompts, 64 tokens each, greedily."""

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from rlhf_jax.data.padding import pad_left
from rlhf_jax.interop.hub import fetch_model
from rlhf_jax.loading.models import Policy, Tuning
from rlhf_jax.loading.pretrained import load_checkpoint
from rlhf_jax.sampling.batches import sample_all
from rlhf_jax.sampling.choice import Sampling

NEW = 64
TEXTS = [
    "The capital of France is",
    "Once upon a time, in a village at the foot of a mountain,",
    "def fibonacci(n):\n    ",
    "To be, or not to be, that is",
    "1, 1, 2, 3, 5, 8,",
    "The film begins well, but after the first half hour",
    "Dear Sir or Madam,\n\nI am writing to",
    "Photosynthesis is the process by which",
    "Question: What is 12 times 12?\nAnswer:",
    "Die Hauptstadt von Deutschland ist",
    "import numpy as np\n\nx = np.",
    "Ingredients:\n- 2 eggs\n- 100 g of flour\n",
]
MESSAGES = [
    "What is the capital of Italy?",
    "Write a haiku about rain.",
    "Explain gravity to a child in two sentences.",
    "Give me three names for a black cat.",
    "Translate 'good morning' into French, Spanish and 日本語.",
    "Write a Python function that reverses a string.",
    "Who wrote Hamlet, and when?",
    "List the planets of the solar system 🪐 in order.",
]


@pytest.fixture(scope="module")
def directory() -> Path:
    return fetch_model("smollm2")


@pytest.fixture(scope="module")
def policy(directory) -> Policy:
    found = load_checkpoint(str(directory), Tuning(param_dtype="float32", compute_dtype="float32"))
    assert isinstance(found, Policy)
    return found


def encode(policy: Policy) -> list[list[int]]:
    tokenizer = policy.tokenizer
    chats = [[{"role": "user", "content": message}] for message in MESSAGES]
    rendered = [tokenizer.render(chat, add_generation_prompt=True) for chat in chats]
    return [tokenizer.begin(tokenizer.encode(text)) for text in TEXTS] + [tokenizer.encode(text) for text in rendered]


def theirs(directory: Path, prompts: list[list[int]]) -> np.ndarray:
    """Nothing ends a text, so that 64 tokens of each are compared."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    width = max(map(len, prompts))
    tokens, mask = (torch.from_numpy(array.astype(np.int64)) for array in pad_left(prompts, width))
    with torch.no_grad():
        out = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    return out[:, width:].numpy()


def test_greedy_text_is_that_of_transformers(directory, policy):
    prompts = encode(policy)
    assert len(prompts) == 20
    sampling = Sampling(NEW, 0.0, ())
    padded = pad_left(prompts, max(map(len, prompts)))
    ours = sample_all(
        policy.network, policy.params, padded, jax.random.key(0), sampling, samples=1, batch_size=len(prompts)
    )
    expected = theirs(directory, prompts)
    assert expected.shape == (20, NEW)
    for prompt, mine, other in zip([*TEXTS, *MESSAGES], np.asarray(ours.response), expected, strict=True):
        shared = int(np.argmin(np.append(mine == other, False)))
        assert shared == NEW, f"{prompt!r}: token {shared} is {mine[shared]}, and {other[shared]} for transformers"
