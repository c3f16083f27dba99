# torch and transformers are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""GGUF files of every architecture: the model that was put in, and what transformers itself makes of the file."""

import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from rlhf_jax.interop.gguf_families import ARCHITECTURES
from rlhf_jax.interop.hub import convert_gguf
from tests.support.gguf_files import CONTEXT, FAMILY_KEYS, HEADS, INNER, KV_HEADS, VOCABULARY, WIDTH, write_gguf

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
GEMMA: dict[str, Any] = COMMON | {"head_dim": 32, "tie_word_embeddings": True}
DEFAULT_THETA = {"rope_type": "default", "rope_theta": 10000.0}
TWO_THETAS = {"full_attention": COMMON["rope_parameters"], "sliding_attention": DEFAULT_THETA}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_inner": INNER,
    "n_layer": 2,
    "n_head": HEADS,
    "n_positions": CONTEXT,
    "tie_word_embeddings": True,
}
# What the file of tests/support/gguf_files.py says, as one who knows the model would write it.
CONFIGS: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**COMMON),
    "qwen2": transformers.Qwen2Config(**COMMON),
    "qwen3": transformers.Qwen3Config(**COMMON | {"head_dim": 32}),
    "gemma": transformers.GemmaConfig(**GEMMA | {"rope_parameters": DEFAULT_THETA}),
    "gemma2": transformers.Gemma2Config(**GEMMA | {"sliding_window": 8, "query_pre_attn_scalar": 32}),
    "gemma3": transformers.Gemma3TextConfig(
        **GEMMA
        | {
            "num_hidden_layers": 7,
            "sliding_window": 8,
            "query_pre_attn_scalar": 32,
            "rope_parameters": TWO_THETAS,
        }
    ),
    "gpt2": transformers.GPT2Config(**GPT2),
    "gptneox": transformers.GPTNeoXConfig(
        **COMMON | {"rope_parameters": DEFAULT_THETA | {"partial_rotary_factor": 0.25}, "layer_norm_eps": 1e-5}
    ),
    "olmo2": transformers.Olmo2Config(**COMMON),
    "phi3": transformers.Phi3Config(**COMMON | {"sliding_window": 8, "original_max_position_embeddings": CONTEXT}),
}
TOKENS = torch.tensor(np.random.default_rng(0).integers(VOCABULARY - 4, size=(2, 40)))


def random_model(config: Any) -> Any:
    """Model in which every parameter matters: norms are not all 1, and biases are not 0."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else 0.15))
            if name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")):
                parameter.add_(1.0)
    return model.eval()


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    tied = model.config.tie_word_embeddings
    state = model.state_dict()
    return {name: tensor.numpy() for name, tensor in state.items() if not (tied and name == "lm_head.weight")}


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(TOKENS).logits.numpy()


def load(directory: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            directory, output_loading_info=True, dtype=torch.float32
        )
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_that_comes_out_is_the_one_put_in(architecture: str, tmp_path: Path):
    model = random_model(CONFIGS[architecture])
    file = write_gguf(tmp_path / "model.gguf", architecture, FAMILY_KEYS[architecture], tensors_of(model))
    convert_gguf(file, tmp_path / "model", dtype="float32")
    expected = logits(model)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(logits(load(tmp_path / "model")), expected, atol=1e-5 * np.abs(expected).max())


# In the other architectures it leaves out a window, or the width of a head or of the feed-forward layer.
@pytest.mark.parametrize("quantisation", ["F16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_transformers_reads_the_same_from_the_file(architecture: str, quantisation: str, tmp_path: Path):
    tensors, kind = tensors_of(random_model(CONFIGS[architecture])), gguf.GGMLQuantizationType[quantisation]
    file = write_gguf(tmp_path / "model.gguf", architecture, FAMILY_KEYS[architecture], tensors, kind)
    convert_gguf(file, tmp_path / "model", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    np.testing.assert_allclose(logits(load(tmp_path / "model")), logits(theirs.eval()), rtol=1e-5, atol=1e-5)
