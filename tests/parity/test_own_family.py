# torch and transformers are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""The example of a user's own family against transformers: logits and gradients."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from rlhf_jax.interop import hf
from tests.parity import checkpoints
from tests.parity.checkpoints import logits_of, tokens

FAMILY = f"{Path(__file__).parents[2] / 'examples' / 'family.py'}:STARCODER2"
SHAPES: dict[str, dict[str, Any]] = {
    "windows": {**checkpoints.GROUPED, "sliding_window": 5},
    "no biases, untied": {**checkpoints.GROUPED, "use_bias": False, "tie_word_embeddings": False},
    "linear rope": {
        **checkpoints.SMALL,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_starcoder2_is_that_of_transformers(name, tmp_path):
    torch.manual_seed(0)
    model = transformers.Starcoder2ForCausalLM(transformers.Starcoder2Config(**SHAPES[name])).eval()
    for parameter in model.parameters():  # norms of 1 and biases of 0 would hide an exchange
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    ours = hf.load_pretrained(str(tmp_path / "model"), family=FAMILY)
    ids = tokens(3)
    mask = jnp.ones(ids.shape, bool)
    expected = model(torch.tensor(ids, dtype=torch.long)).logits
    got = jax.jit(functools.partial(logits_of, ours))(ours.params, jnp.asarray(ids), mask)
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=2e-4)

    weights = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32) / expected.numel()
    (expected * torch.as_tensor(weights)).sum().backward()
    grads = jax.jit(jax.grad(lambda params: jnp.sum(logits_of(ours, params, jnp.asarray(ids), mask) * weights)))(
        ours.params
    )
    hf.save_pretrained(tmp_path / "grads", "policy", grads, ours.hf_config)
    found = load_file(tmp_path / "grads" / "model.safetensors")
    theirs = {n: p.grad.numpy() for n, p in model.named_parameters()}
    assert set(found) == set(theirs)
    scale = max(np.abs(grad).max() for grad in theirs.values())
    for n, grad in found.items():
        np.testing.assert_allclose(grad, theirs[n], atol=1e-4 * scale, err_msg=n)
