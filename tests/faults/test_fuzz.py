"""Damaged and hostile inputs: only our own errors, one message each, and nothing of an input is executed."""

import contextlib
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from rlhf_jax import experiment
from rlhf_jax.api import load_config
from rlhf_jax.config import override
from rlhf_jax.data.formats import read_table
from rlhf_jax.interop import hf
from rlhf_jax.interop.gguf import read_gguf
from rlhf_jax.interop.tensor_files import DTYPES, find_tensors, read_tensor
from rlhf_jax.runtime.checkpoints import WRITTEN_LATER, damaged_file
from rlhf_jax.text.gguf_tokenizer import write_tokenizer
from rlhf_jax.text.tokenizer import load_tokenizer
from rlhf_jax.types import RlhfError
from tests.support import checkpoints, gguf_files, own_data, tokenizer_files, watched
from tests.support.damage import edits, json_edits
from tests.support.fuzzing import fuzzed, reading, write_counts

MESSAGES = [{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "it is"}]


@pytest.fixture(autouse=True)
def bounded_and_counted(request) -> Iterator[None]:
    with watched.bounded_memory():
        yield
    write_counts(request.node.name)


def tables() -> dict[str, bytes]:
    """The content of a small table in every format."""
    import gzip
    import io
    import lzma

    import pyarrow as pa

    rows = own_data.pairs(4)
    lines, parquet, arrow = rows.to_json(orient="records", lines=True).encode(), io.BytesIO(), io.BytesIO()
    rows.to_parquet(parquet)
    table = pa.Table.from_pandas(rows, preserve_index=False)
    with pa.ipc.new_stream(arrow, table.schema) as writer:
        writer.write_table(table)
    return {
        "jsonl": lines,
        "jsonl.gz": gzip.compress(lines, mtime=0),
        "jsonl.xz": lzma.compress(lines),
        "json": rows.to_json(orient="records").encode(),
        "csv": rows.to_csv(index=False).encode(),
        "parquet": parquet.getvalue(),
        "arrow": arrow.getvalue(),
    }


TABLES = tables()


@pytest.mark.parametrize("ending", TABLES)
@fuzzed
@given(data=st.data())
def test_tables(ending, tmp_path_factory, data):
    content = data.draw(edits(TABLES[ending]) | st.binary(max_size=64))
    path = tmp_path_factory.getbasetemp() / f"damaged.{ending}"
    path.write_bytes(content)
    with reading(f"a table in {ending}", path.parent):
        assert all(isinstance(row, dict) for row in read_table(str(path)))


CONFIG = load_config(own_data.PREFERENCES.removeprefix("--config="))
FIELDS = [
    "seed",
    "stages",
    "data.train",
    "sft",
    "sft.batch_size",
    "sft.model",
    "ppo.optimizer.learning_rate",
    "dpo.x.y",
]
VALUES = [
    *("1", "-1", "nan", "1e999", "None", "()", "{}", "{'a': 1}", "[[[]]]", "'", "sft,ppo", "1" * 5000, "\\x"),
    *("(" * 500, "[" * 100_000, "-" * 50_000 + "1", "{1: {2: {}}}", "b''", "...", "1_0", "0x1", "9" * 30, "\ud800"),
]


@fuzzed
@given(field=st.sampled_from(FIELDS), value=st.sampled_from(VALUES) | st.text(max_size=20))
def test_overrides(field, value, tmp_path_factory):
    config = ConfigDict(CONFIG.to_dict())
    with reading("a field on the command line", tmp_path_factory.getbasetemp()):
        override(config, field, value)
        experiment.parse(config)


PIECES = [
    *("{{ ", " }}", "{% for m in messages %}", "{% endfor %}", "{% if m %}", "{% endif %}", "m['content']", "m.x.y()"),
    *(
        "messages[0]",
        "raise_exception('x')",
        "strftime_now('%Y')",
        "strftime_now(1)",
        " + ",
        "1 / 0",
        "'a' * 3",
        "| tojson",
    ),
    *("| length", "{% set a = 1 %}", "{% macro f() %}{{ f() }}{% endmacro %}", "f()", "range(10 ** 9)", "loop.index"),
    *("[1, 2][5]", "namespace(x=1)", "{% include 'x' %}", "lipsum()", "cycler", "9 ** 9 ** 2", "%}", "{{"),
]
HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ lipsum.__globals__['os'].popen('touch MARK').read() }}",
    "{{ namespace.__init__.__globals__['__builtins__'].open('MARK', 'w') }}",
    "{{ messages.__class__.__base__.__subclasses__()[0].__init__.__globals__ }}",
    "{{ (messages | attr('append'))({}) }}",
    "{{ raise_exception.__globals__['__builtins__']['exec']('open(\"MARK\", \"w\")') }}",
    "{% include '/etc/passwd' %}",
]


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return tokenizer_files.chatml(tmp_path_factory.mktemp("chatml"))


def rendered(tokenizer, template: str) -> str:
    tokenizer.chat_template = template
    return tokenizer.render(MESSAGES, add_generation_prompt=True)


@fuzzed
@given(parts=st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12))
def test_chat_templates(parts, chatml):
    with reading("a chat template", chatml):
        assert isinstance(rendered(load_tokenizer(chatml), "".join(parts)), str)


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_runs_nothing(template, chatml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RlhfError, match="the chat template rejects these messages"):
        rendered(load_tokenizer(chatml), template)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoints.policy(tmp_path_factory.mktemp("model"))


@fuzzed
@given(data=st.data())
def test_safetensors(data, model, tmp_path_factory):
    content = (model / "model.safetensors").read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    valid = json_edits(header).map(
        lambda changed: len(changed).to_bytes(8, "little") + changed + content[len(header) :]
    )
    directory = tmp_path_factory.getbasetemp() / "safetensors"
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors").write_bytes(data.draw(valid | edits(content)))
    with reading("model.safetensors", directory):
        for tensor in find_tensors(directory).values():
            assert read_tensor(tensor).dtype == DTYPES[tensor.dtype]


@fuzzed
@given(data=st.data(), name=st.sampled_from(["config.json", "model.safetensors"]))
def test_checkpoints_of_transformers(data, name, model, tmp_path_factory):
    directory = tmp_path_factory.getbasetemp() / "transformers"
    directory.mkdir(exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        (directory / file).write_bytes((model / file).read_bytes())
    content = (model / name).read_bytes()
    (directory / name).write_bytes(data.draw(json_edits(content) if name == "config.json" else edits(content)))
    with reading("a checkpoint of transformers", directory):
        assert hf.load_pretrained(str(directory)).params


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    keys = gguf_files.FAMILY_KEYS["llama"]
    return gguf_files.write_gguf(path, "llama", keys, gguf_files.hub_tensors("llama"))


@fuzzed
@given(data=st.data())
def test_gguf(data, gguf_file, tmp_path_factory):
    content = gguf_file.read_bytes()
    head = 8192
    changed = data.draw(edits(content[:head]).map(lambda start: start + content[head:]) | edits(content))
    directory = tmp_path_factory.getbasetemp() / "gguf"
    directory.mkdir(exist_ok=True)
    (directory / "model.gguf").write_bytes(changed)
    tracemalloc.start()
    with reading("model.gguf", directory):
        file = read_gguf(directory / "model.gguf")
        write_tokenizer(file.metadata, directory, source=directory / "model.gguf")
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


@fuzzed
@given(data=st.data(), name=st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
def test_tokenizers(data, name, chatml, tmp_path_factory):
    directory = tmp_path_factory.getbasetemp() / "tokenizer"
    directory.mkdir(exist_ok=True)
    for file in chatml.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    content = (chatml / name).read_bytes()
    (directory / name).write_bytes(data.draw(json_edits(content) | edits(content)))
    with reading("tokenizer.json", directory):
        assert isinstance(load_tokenizer(directory).encode("it is"), list)


@fuzzed
@given(data=st.data())
def test_every_change_of_a_checkpoint_is_found(data, saved):
    later = (WRITTEN_LATER, "commit_success.txt")  # by Orbax, when all others are hashed
    files = sorted(path for path in saved.rglob("*") if path.is_file() and path.name not in later)
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    changed = data.draw(edits(content).filter(lambda changed: changed != content))
    path.write_bytes(changed)
    try:
        with reading("a checkpoint of a run", saved):
            damaged = damaged_file(saved)
            assert damaged is not None or json.loads(changed) == json.loads(content)
            if damaged is not None:
                raise RlhfError(f"{damaged} is damaged")
    finally:
        path.write_bytes(content)
    assert damaged_file(saved) is None


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A checkpoint of a state."""
    import jax.numpy as jnp

    from rlhf_jax.runtime.checkpoints import Checkpoints, TrainState

    directory = tmp_path_factory.mktemp("saved")
    with contextlib.closing(Checkpoints(directory, keep=1)) as kept:
        kept.save(TrainState(jnp.int32(3), {"policy": {"w": jnp.arange(100.0)}}, {"count": jnp.int32(3)}))
    return directory / "3"
