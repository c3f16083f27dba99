"""GGUF files: what comes out is what was put in, named as on the hub; what is wrong with a file is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from rlhf_jax.interop import hf
from rlhf_jax.interop.families import FAMILIES
from rlhf_jax.interop.gguf import read_gguf, write_checkpoint
from rlhf_jax.interop.gguf_families import ARCHITECTURES, Header
from rlhf_jax.types import RlhfError
from tests.support.gguf_files import (
    F32,
    FAMILY_KEYS,
    HEADS,
    KEYS,
    KV_HEADS,
    TOKENIZER,
    VOCABULARY,
    hub_tensors,
    permute,
    stored,
    write_gguf,
)

Kind = gguf.GGMLQuantizationType


def convert(path: Path, dtype: Any = "float32") -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    out = path.with_suffix("")
    out.mkdir()
    write_checkpoint(read_gguf(path), out, dtype=dtype)
    return json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert found[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_comes_back_byte_for_byte(architecture: str, tied: bool, tmp_path: Path):
    tensors = hub_tensors(architecture, tied=tied)
    path = write_gguf(tmp_path / "model.gguf", architecture, FAMILY_KEYS[architecture], tensors)
    config, found = convert(path)
    assert_same(found, tensors)
    assert config["tie_word_embeddings"] is tensors.keys().isdisjoint({"lm_head.weight", "embed_out.weight"})
    assert config["vocab_size"] == VOCABULARY


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_are_rounded_to_the_dtype_asked_for(dtype: Any, tmp_path: Path):
    tensors = {name: tensor / 3 for name, tensor in hub_tensors("llama").items()}
    tensors["model.norm.weight"][:] = -0.0  # which stays negative
    path = write_gguf(tmp_path / "model.gguf", "llama", FAMILY_KEYS["llama"], tensors)
    config, found = convert(path, np.dtype(dtype).name)
    assert_same(found, {name: tensor.astype(dtype) for name, tensor in tensors.items()})
    assert config["dtype"] == np.dtype(dtype).name


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_quantised_weights_are_what_gguf_makes_of_them(
    kind: Kind, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rlhf_jax.interop.gguf.CHUNK", 300)  # several chunks a tensor, the last one shorter
    tensors, keys = hub_tensors(architecture), FAMILY_KEYS[architecture]
    path = write_gguf(tmp_path / "model.gguf", architecture, keys, tensors, kind)
    expected = {}
    for (name, tensor), in_file in zip(tensors.items(), stored(architecture, tensors, keys).values(), strict=True):
        blocks = gguf.quants.quantize(in_file, kind if in_file.ndim > 1 else F32)
        weights = gguf.quants.dequantize(blocks, kind if in_file.ndim > 1 else F32)
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            order = permute(np.arange(len(tensor)), HEADS if "q_proj" in name else KV_HEADS)
            weights = weights[np.argsort(order)]
        if "c_" in name:
            weights = weights.T
        expected[name] = weights
    config, found = convert(path)
    assert_same(found, expected)
    assert config.get("dequantised_from") == (kind.name if kind.name.startswith("Q") else None)


def test_the_config_of_a_llama(tmp_path: Path):
    path = write_gguf(tmp_path / "model.gguf", "llama", FAMILY_KEYS["llama"], hub_tensors("llama"))
    assert convert(path, "bfloat16")[0] == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 260,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 48,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


def test_what_the_other_families_add(tmp_path: Path):
    configs = {}
    for name, keys in FAMILY_KEYS.items():
        configs[name] = convert(write_gguf(tmp_path / f"{name}.gguf", name, keys, hub_tensors(name)))[0]
    assert configs["gpt2"]["n_inner"] == 96
    assert configs["gpt2"]["layer_norm_epsilon"] == 1e-5
    assert configs["gemma"]["rope_parameters"]["rope_theta"] == 10000.0
    assert configs["gemma"]["head_dim"] == 32
    assert configs["gemma2"]["layer_types"] == ["sliding_attention", "full_attention"]
    assert configs["gemma2"]["attn_logit_softcapping"] == 50.0
    assert configs["gemma2"]["query_pre_attn_scalar"] == 32
    assert configs["gemma3"]["layer_types"] == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert configs["gemma3"]["model_type"] == "gemma3_text"
    assert configs["gemma3"]["rope_parameters"] == {
        "full_attention": {"rope_type": "default", "rope_theta": 20000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    assert configs["phi3"]["sliding_window"] == 8
    assert configs["gptneox"]["rope_parameters"] == {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    }


def with_keys(tmp_path: Path, extra: dict[str, np.ndarray] | None = None, **keys: Any) -> Path:
    renamed = {key.replace("__", "."): value for key, value in keys.items()}
    path = tmp_path / "model.gguf"
    return write_gguf(path, "llama", FAMILY_KEYS["llama"] | renamed, hub_tensors("llama"), extra=extra)


def test_a_sliding_window_makes_a_llama_a_mistral(tmp_path: Path):
    config, _ = convert(with_keys(tmp_path, attention__sliding_window=8))
    assert (config["model_type"], config["architectures"]) == ("mistral", ["MistralForCausalLM"])
    assert config["sliding_window"] == 8


def test_linear_and_yarn_scaling(tmp_path: Path):
    linear: dict[str, Any] = {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}
    config, _ = convert(with_keys(tmp_path, **linear))
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 4.0, "rope_theta": 20000.0}
    (tmp_path / "yarn").mkdir()
    yarn = linear | {"rope__scaling__type": "yarn", "rope__scaling__original_context_length": 12}
    config, _ = convert(with_keys(tmp_path / "yarn", **yarn))
    assert config["rope_parameters"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 12,
        "rope_theta": 20000.0,
    }


# Of Llama 3.2, with a rotary base of 20,000: by the formula of Meta's reference implementation, in a loop.
def llama3_factors(factor: float) -> np.ndarray:
    factors = []
    for pair in range(8):
        wavelength = 2 * np.pi * 20000.0 ** (pair / 8)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama_3_scaling_is_found_from_its_factors(tmp_path: Path):
    config, tensors = convert(with_keys(tmp_path, {"rope_freqs.weight": llama3_factors(32.0)}))
    assert config["rope_parameters"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 20000.0,
    }
    assert tensors.keys() == hub_tensors("llama").keys()


def truncated(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path


def without(tmp_path: Path, name: str) -> Path:
    tensors = {key: tensor for key, tensor in hub_tensors("llama").items() if key != name}
    return write_gguf(tmp_path / "model.gguf", "llama", FAMILY_KEYS["llama"], tensors)


def without_key(tmp_path: Path, key: str) -> Path:
    keys = {name: value for name, value in FAMILY_KEYS["llama"].items() if name != key}
    return write_gguf(tmp_path / "model.gguf", "llama", keys, hub_tensors("llama"))


def missing(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def text(tmp_path: Path) -> Path:
    (tmp_path / "model.gguf").write_text("version https://git-lfs.github.com/spec/v1\n" * 9)
    return tmp_path / "model.gguf"


def of_another_architecture(tmp_path: Path) -> Path:
    keys = {"block_count": 1}
    return write_gguf(tmp_path / "model.gguf", "mamba", keys, {})


def integers(tmp_path: Path) -> Path:
    path = without(tmp_path, "model.norm.weight")
    extra = {"output_norm.weight": np.zeros(64, np.int32)}
    tensors = {key: tensor for key, tensor in hub_tensors("llama").items() if key != "model.norm.weight"}
    return write_gguf(path, "llama", FAMILY_KEYS["llama"], tensors, extra=extra)


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no file": (missing, "model.gguf cannot be read: No such file"),
    "a text": (text, "model.gguf is not a GGUF file"),
    "empty": (lambda here: truncated(with_keys(here), 0), "is not a GGUF file, or is truncated"),
    "cut in the metadata": (lambda here: truncated(with_keys(here), 300), "is not a GGUF file, or is truncated"),
    "cut in the tensors": (lambda here: truncated(with_keys(here), 100_000), "is not a GGUF file, or is truncated"),
    "architecture": (
        of_another_architecture,
        "unsupported architecture 'mamba': it must be one of llama, qwen2, ",
    ),
    "no tensor": (lambda here: without(here, "model.layers.1.mlp.up_proj.weight"), "has no tensor blk.1.ffn_up.wei"),
    "no key": (lambda here: without_key(here, "context_length"), "no number under llama.context_length"),
    "shape": (
        lambda here: with_keys(here, feed_forward_length=128),
        r"blk.0.ffn_gate.weight has the shape \(96, 64\), but the file's metadata requires \(128, 64\)",
    ),
    "unknown tensor": (
        lambda here: with_keys(here, {"blk.0.attn_q.bias": np.zeros(64, np.float32)}),
        "has a tensor blk.0.attn_q.bias, which LlamaForCausalLM does not have",
    ),
    "integers": (integers, "output_norm.weight is stored as I32, which the installed gguf package cannot dequantise"),
    "longrope": (
        lambda here: with_keys(here, rope__scaling__type="longrope", rope__scaling__factor=4.0),
        "has rope scaling of type 'longrope'",
    ),
    "other factors": (
        lambda here: with_keys(here, {"rope_freqs.weight": llama3_factors(8.0)[::-1].copy()}),
        "rope_freqs.weight is not Llama 3's scaling",
    ),
    "partly rotated": (
        lambda here: with_keys(here, attention__key_length=16, rope__dimension_count=8),
        "partial rotary positions",
    ),
    "another OLMo": (
        lambda here: write_gguf(
            here / "model.gguf", "olmo2", KEYS | {"attention.sliding_window": 8}, hub_tensors("olmo2")
        ),
        "it is OLMo 3, but only OLMo 2 is supported",
    ),
    "no decoder": (lambda here: with_keys(here, attention__causal=False), "its attention is not causal"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(case: str, tmp_path: Path):
    make, message = BAD[case]
    path = make(tmp_path)
    with pytest.raises(RlhfError, match=message):
        read_gguf(path)


def test_a_part_of_a_file(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(RlhfError, match="is one of 3 parts: join them"):
        read_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (np.inf, "bfloat16"), (1e5, "float16")])
def test_weights_that_are_no_numbers(value: float, dtype: str, tmp_path: Path):
    tensors = hub_tensors("llama")
    tensors["model.layers.1.self_attn.q_proj.weight"][3, 4] = value
    path = write_gguf(tmp_path / "model.gguf", "llama", FAMILY_KEYS["llama"], tensors)
    with pytest.raises(RlhfError, match=rf"blk.1.attn_q.weight has weights that are not finite in {dtype}"):
        convert(path, dtype)


def test_two_ends_of_a_turn(tmp_path: Path):
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama", FAMILY_KEYS["llama"], hub_tensors("llama"), tokenizer=TOKENIZER | {"eot_token_id": 258})
    config, _ = convert(path)
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert config["eos_token_id"] == 257
    assert generation["eos_token_id"] == [257, 258]


@pytest.mark.parametrize(("channels", "heads"), [(4, 1), (15, 1), (3, 2), (13, 1)])
def test_the_rotary_share_of_a_head_gives_back_its_channels(channels, heads):
    """15 of 26 channels, a share that floating point would turn into 14."""
    header = Header(
        Path("x.gguf"),
        {
            "general.architecture": "gptneox",
            "gptneox.block_count": 1,
            "gptneox.attention.layer_norm_epsilon": 1e-5,
            "gptneox.rope.dimension_count": channels,
        },
        {},
        None,
    )
    sizes = {"D": 26, "F": 104, "K": 26 // heads, "C": 64, "heads": heads, "V": 9}
    config = ARCHITECTURES["gptneox"].config(header, sizes) | {"model_type": "gpt_neox", "vocab_size": 9}
    found, _ = hf.read_shape(config, param_dtype="float32", compute_dtype="float32")
    assert found.rope.channels(26 // heads) == channels


def test_every_architecture_is_that_of_a_family():
    assert {architecture.model_type for architecture in ARCHITECTURES.values()} <= FAMILIES.keys()
