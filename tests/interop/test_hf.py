"""Checkpoints read from a directory: what memory that takes, and what their config.json may leave out."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.interop import hf
from rlhf_jax.interop.tensor_files import read_header, write_tensors
from rlhf_jax.models.model_config import Rope
from rlhf_jax.models.rotary import rope_angles, rotate
from rlhf_jax.types import RlhfError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def checkpoint(directory: Path, hf_config: dict[str, Any]) -> Path:
    """One whose parameters are all 0.01, and take no memory while it is written."""
    config, vocab_size = hf.read_shape(hf_config, param_dtype="float32", compute_dtype="float32")
    params: dict[str, Any] = {}
    for path, shape in hf.parameter_shapes("policy", config, vocab_size).items():
        params[path] = np.broadcast_to(np.float32(0.01), shape)
    hf.save_pretrained(directory, "policy", params, hf_config)
    return directory


def test_a_config_may_leave_out_what_is_as_its_family_has_it_by_default(tmp_path):
    given = checkpoint(tmp_path / "given", LLAMA | {"vocab_size": 32000, "rms_norm_eps": 1e-6, "hidden_act": "silu"})
    left_out = checkpoint(tmp_path / "left out", LLAMA)
    assert "vocab_size" not in json.loads((left_out / "config.json").read_text())
    expected, found = (hf.load_pretrained(str(directory)) for directory in (given, left_out))
    assert (found.config, found.vocab_size) == (expected.config, 32000)
    assert found.params["embedding"].shape == (32000, 8)


def rope(**parameters: Any) -> Rope:
    said = LLAMA | {"head_dim": 128, "max_position_embeddings": 32768, "rope_parameters": parameters}
    return hf.read_shape(said, param_dtype="float32", compute_dtype="float32")[0].rope


def test_yarn_as_qwen_has_it():
    """Pairs that turn 32 times or more in 32,768 tokens stay as they are; those that turn once or less are stretched.

    Pair i of 64 turns 32768 / (2 pi 10^(6 i / 64)) times: pair 23 turns 36.3 times, 24 29.3; 39 1.15 times, 40 0.93.
    """
    yarn = rope(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768)
    assert yarn.factors is not None
    ramp = [min(max((i - 23) / (40 - 23), 0), 1) for i in range(64)]
    np.testing.assert_allclose(1 / np.array(yarn.factors), [1 - share + share / 4 for share in ramp])
    assert yarn.amplitude == pytest.approx(1.138629)  # 0.1 ln 4 + 1
    assert yarn.limit is None


def test_dynamic_positions_serve_the_context_and_nothing_beyond():
    dynamic = rope(rope_type="dynamic", rope_theta=1e4, factor=4.0)
    positions = jnp.arange(5, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(
        rope_angles(dynamic, 128, positions, 32768)[0], rope_angles(Rope(1e4), 128, positions, 32768)[0]
    )
    with pytest.raises(
        RlhfError, match=r"sequences may grow to 32769 tokens, but the model's dynamic .* support only 32768"
    ):
        rope_angles(dynamic, 128, positions, 32769)


NEOX = {"model_type": "gpt_neox", "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 9}

ODD = {"rope_theta": 1000.0, "partial_rotary_factor": 0.25}  # 3 of 12 channels


def shape(hf_config: dict[str, Any]):
    return hf.read_shape(hf_config, param_dtype="float32", compute_dtype="float32")[0]


def test_an_odd_number_of_rotary_channels_is_rounded_up_to_pairs_under_the_odd_exponent():
    """A quarter of GPT-NeoX's head of 12: channels 0 to 3 turn, as pairs (0, 2), (1, 3), with exponents 0 and 2 / 3."""
    found = shape(NEOX | {"rope_parameters": ODD | {"rope_type": "default"}}).rope
    positions = jnp.array([[0, 1, 7]], jnp.int32)
    sin, cos = rope_angles(found, 12, positions, 8)
    expected = np.array([[0, 1, 7]])[..., None] * np.array([1, 1000 ** (-2 / 3)])
    np.testing.assert_allclose(sin, np.sin(expected), atol=1e-6)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 1, 12)), jnp.float32)
    turned = rotate(x, sin, cos)
    np.testing.assert_array_equal(turned[..., 4:], x[..., 4:])
    before = np.asarray(x)[:, :, 0]
    pairs = (before[..., :2] + 1j * before[..., 2:4]) * np.exp(1j * expected)
    np.testing.assert_allclose(turned[:, :, 0, :4], np.concatenate([pairs.real, pairs.imag], axis=-1), atol=1e-6)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            LLAMA | {"head_dim": 8, "partial_rotary_factor": 0.5},
            "partial_rotary_factor = 0.5 is not supported for model_type = 'llama': .* all 8 channels .* rotate only 4",
        ),
        (
            NEOX | {"rope_parameters": ODD | {"rope_type": "yarn", "factor": 2.0}},
            r"rope_type = 'yarn' is not supported for an odd number of rotated channels: 3 of 12",
        ),
        (
            NEOX | {"rope_parameters": ODD | {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            "has 1 short and 1 long factors, but 3 of a head's 12 channels are rotated in 2 pairs",
        ),
        (LLAMA | {"head_dim": 3}, "a head has an odd number of them, 3 "),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        (
            {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
            "attn_logit_softcapping = 50.0 is not supported",
        ),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ],
    ids=["partial llama", "odd yarn", "odd longrope", "odd head", "gpt2", "gemma 3", "gemma"],
)
def test_what_cannot_be_computed_as_transformers_does_is_refused_with_its_numbers(said, message):
    with pytest.raises(RlhfError, match=message):
        shape(said)


def test_a_family_reads_its_own_fields_alone():
    """Fields that transformers reads in another family, and leaves unread in this one."""
    plain = shape(LLAMA | {"sliding_window": None})
    assert shape(LLAMA | {"sliding_window": 4, "layer_types": ["sliding_attention"]}).windows == plain.windows is None
    mistral = LLAMA | {"model_type": "mistral", "sliding_window": 4}
    unread = {"layer_types": ["full_attention"], "attention_bias": True, "mlp_bias": True}
    assert shape(mistral | unread) == shape(mistral)
    assert shape(mistral).windows == (4,) and not shape(mistral).qkv_bias
    gemma = LLAMA | {"model_type": "gemma", "hidden_act": "silu", "hidden_activation": "relu"}
    assert shape(gemma).activation == "silu"


def test_a_file_that_ends_within_a_tensor_is_named(tmp_path):
    write_tensors(tmp_path / "a", [("x", (3,), np.dtype(np.float32))], lambda _: np.ones(3, np.float32))
    tensor = read_header(tmp_path / "a")["x"]
    np.testing.assert_array_equal(hf.read_tensor(tensor), np.ones(3))
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with pytest.raises(RlhfError, match="a is truncated: download it again"):
        hf.read_tensor(tensor)


PEAK = """
import sys
from pathlib import Path
from rlhf_jax.interop import hf
loaded = hf.load_pretrained(sys.argv[1])
print(Path("/proc/self/status").read_text())
"""


@pytest.mark.nightly
def test_no_second_copy_of_a_model_is_made_in_memory(tmp_path):
    """Upper bound on a process's memory: the model, twice its largest fused group, and 200 MB."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3, "vocab_size": 8192}
    directory = checkpoint(tmp_path / "model", LLAMA | sizes)
    groups = [tensor.size for tensor in read_header(directory / "model.safetensors").values()]
    run = subprocess.run([sys.executable, "-c", PEAK, str(directory)], check=True, capture_output=True, text=True)
    found = re.search(r"VmHWM:\s+(\d+) kB", run.stdout)
    assert found is not None
    peak = int(found[1]) * 1024
    assert sum(groups) < peak < sum(groups) + 2 * max(groups) + 200e6, (peak, sum(groups), max(groups))
    assert sum(groups) > 2e8
