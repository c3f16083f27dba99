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

from rlhf_jax.models import hf
from rlhf_jax.models.config import Rope
from rlhf_jax.models.rotary import rope_angles
from rlhf_jax.models.tensor_files import read_header, write_tensors
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
    for path, shape in hf._parameter_shapes("policy", config, vocab_size).items():
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
    with pytest.raises(RlhfError, match=r"room for sequences of 32769 tokens, and the model's dynamic .* serve 32768"):
        rope_angles(dynamic, 128, positions, 32769)


def test_a_file_that_ends_within_a_tensor_is_named(tmp_path):
    write_tensors(tmp_path / "a", [("x", (3,), np.dtype(np.float32))], lambda _: np.ones(3, np.float32))
    tensor = read_header(tmp_path / "a")["x"]
    np.testing.assert_array_equal(hf.read_tensor(tensor), np.ones(3))
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with pytest.raises(RlhfError, match="a is cut short: download it again"):
        hf.read_tensor(tensor)


PEAK = """
import sys
from pathlib import Path
from rlhf_jax.models import hf
loaded = hf.load_pretrained(sys.argv[1])
print(Path("/proc/self/status").read_text())
"""


def test_no_second_copy_of_a_model_is_made_in_memory(tmp_path):
    """Of a whole process: less than the model, twice its largest fused group, and 200 MB in all."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3, "vocab_size": 8192}
    directory = checkpoint(tmp_path / "model", LLAMA | sizes)
    groups = [tensor.size for tensor in read_header(directory / "model.safetensors").values()]
    run = subprocess.run([sys.executable, "-c", PEAK, str(directory)], check=True, capture_output=True, text=True)
    found = re.search(r"VmHWM:\s+(\d+) kB", run.stdout)
    assert found is not None
    peak = int(found[1]) * 1024
    assert sum(groups) < peak < sum(groups) + 2 * max(groups) + 200e6, (peak, sum(groups), max(groups))
    assert sum(groups) > 2e8
