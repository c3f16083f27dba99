"""Adapters in PEFT's format: out of a stage by `rlhf-jax export --adapter`, and in beside the base that they name."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlhf_jax.interop.hub import checkpoint_hash
from rlhf_jax.loading.models import Policy, RewardModel, as_reward_model, merged
from rlhf_jax.loading.pretrained import load_checkpoint
from rlhf_jax.loading.stage_models import Base
from rlhf_jax.reports.model_card import CARD
from tests.support import checkpoints, tokenizer_files
from tests.support.commands import fails, succeeds
from tests.support.trained_stages import LORA, adapted, assert_same_model, write_stage


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run: dpo, stable (rank-stabilised) and judge are adapters of a checkpoint, and tuned is one of dpo."""
    directory = tmp_path_factory.mktemp("adapters")
    source = str(checkpoints.policy(directory / "source"))
    start = load_checkpoint(source)
    assert isinstance(start, Policy)
    dpo, beside = adapted(start), Base(source, is_stage=False)
    write_stage(directory / "run" / "dpo", dpo, beside)
    stable = dataclasses.replace(LORA, use_rslora=True)
    write_stage(directory / "run" / "stable", adapted(start, stable), beside)
    write_stage(directory / "run" / "tuned", adapted(merged(dpo)), Base("dpo", is_stage=True))
    write_stage(directory / "run" / "judge", adapted(as_reward_model(start, jax.random.key(1))), beside)
    return directory


def export(capsys, made: Path, stage: str, out: Path, *flags: str) -> Path:
    succeeds(capsys, "export", f"--workdir={made / 'run'}", f"--stage={stage}", f"--out={out}", *flags)
    return out


def changed(adapter: Path, out: Path, **fields) -> Path:
    """A copy of an adapter with other fields in its config."""
    shutil.copytree(adapter, out)
    config = json.loads((out / "adapter_config.json").read_text()) | fields
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("stage", ["dpo", "stable", "judge"])
def test_what_an_adapter_and_its_base_make_is_the_stages_model(stage, made, tmp_path, capsys):
    alone = export(capsys, made, stage, tmp_path / "adapter", "--adapter")
    config = json.loads((alone / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((made / "source").resolve())
    assert not (alone / "config.json").exists() and not (alone / "model.safetensors").exists()
    whole = export(capsys, made, stage, tmp_path / "merged")
    assert_same_model(load_checkpoint(str(alone)), load_checkpoint(str(whole)))
    again = tmp_path / "again"
    succeeds(capsys, "export", f"--model={alone}", f"--out={again}")
    for file in whole.iterdir():
        if file.name != CARD:  # the record of a stage's run
            assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_verbs_read_an_adapter(made, tmp_path, capsys):
    alone, whole = export(capsys, made, "dpo", tmp_path / "a", "--adapter"), export(capsys, made, "dpo", tmp_path / "b")
    flags = ["--prompt=The film", "--temperature=0", "--max-new-tokens=12"]
    said = [succeeds(capsys, "sample", f"--model={model}", *flags) for model in (alone, whole, made / "source")]
    assert said[0] == said[1] != said[2]


def test_an_adapter_beside_a_stage_needs_that_stages_export(made, tmp_path, capsys):
    ask = ["export", f"--workdir={made / 'run'}", "--stage=tuned", f"--out={tmp_path / 'out'}", "--adapter"]
    assert "on stage 'dpo', which PEFT cannot load: export that stage first" in fails(capsys, *ask)
    assert "the weights differ" in fails(capsys, *ask, f"--base={made / 'source'}")
    assert list(tmp_path.iterdir()) == []
    base = export(capsys, made, "dpo", tmp_path / "base")
    succeeds(capsys, *ask, f"--base={base}")
    whole = export(capsys, made, "tuned", tmp_path / "whole")
    assert_same_model(load_checkpoint(str(tmp_path / "out")), load_checkpoint(str(whole)))
    nested = changed(tmp_path / "out", tmp_path / "nested", base_model_name_or_path=str(tmp_path / "out"))
    asked = ["export", f"--model={nested}", f"--out={tmp_path / 'other'}"]
    assert "is itself an adapter: merge it" in fails(capsys, *asked)


@pytest.mark.parametrize("said", [True, False], ids=["new", "of an earlier version"])
def test_what_is_wrong_with_the_stage_beside_is_told(said, made, tmp_path, capsys):
    run = shutil.copytree(made / "run", tmp_path / "run")
    if not said:
        spec = json.loads((run / "tuned" / "model.json").read_text())
        del spec["base_is_stage"]
        (run / "tuned" / "model.json").write_text(json.dumps(spec))
    asked = ["export", f"--workdir={run}", "--stage=tuned", f"--out={tmp_path / 'out'}"]
    shutil.rmtree(run / "dpo" / "checkpoints")
    (run / "dpo" / "checkpoints").mkdir()
    assert f"{run / 'dpo' / 'checkpoints'} has no checkpoint" in fails(capsys, *asked)
    shutil.rmtree(run / "dpo")
    assert "has no stage 'dpo'; its stages: " in fails(capsys, *asked)
    (run / "dpo").mkdir()  # what a directory of that name holds is not asked
    assert "has no stage 'dpo'; its stages: " in fails(capsys, *asked)


def test_adapters_of_several_seeds_have_the_first_seeds_base(made, tmp_path, capsys):
    start = load_checkpoint(str(made / "source"))
    write_stage(tmp_path / "run" / "sft", start, seeds=range(3, 4))
    write_stage(tmp_path / "run" / "dpo", adapted(start), Base("sft", is_stage=True), seeds=range(3, 5))
    out = export(capsys, tmp_path, "dpo", tmp_path / "out", "--policy-seed=4")
    assert_same_model(load_checkpoint(str(out)), merged(adapted(start)))


def test_what_has_no_adapter(made, tmp_path, capsys):
    write_stage(tmp_path / "run" / "sft", load_checkpoint(str(made / "source")))
    out = f"--out={tmp_path / 'out'}"
    stage = ["export", f"--workdir={tmp_path / 'run'}", "--stage=sft", out]
    assert "stage 'sft' trained no adapter" in fails(capsys, *stage, "--adapter")
    assert "--base is only used with --adapter" in fails(capsys, *stage, "--base=x")
    assert "leave --dtype out" in fails(capsys, *stage, "--adapter", "--dtype=bfloat16")
    assert "--adapter exports the adapter of a stage" in fails(capsys, "export", "--model=x", out, "--adapter")
    assert "no model given" in fails(capsys, "export", out, "--adapter")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_model_name_or_path": None}, "has no base_model_name_or_path"),
        ({"base_model_name_or_path": "/nowhere"}, "base_model_name_or_path: /nowhere is not a directory"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3' is not supported"),
        ({"task_type": "SEQ_CLS"}, "has no tensor base_model.model.score.weight (the head"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type = 'SEQ_2_SEQ_LM', but its base is a policy model"),
        ({"target_modules": ["query"]}, 'target_modules = ["query"] matches none'),
    ],
    ids=str,
)
def test_adapters_that_cannot_be(fields, message, made, tmp_path, capsys):
    broken = changed(export(capsys, made, "dpo", tmp_path / "adapter", "--adapter"), tmp_path / "broken", **fields)
    if "target_modules" in fields:
        save_file({}, broken / "adapter_model.safetensors")
    assert message in fails(capsys, "sample", f"--model={broken}", "--prompt=x")


def test_an_adapters_tokenizer_and_its_bases_ends(made, tmp_path, capsys):
    alone = export(capsys, made, "dpo", tmp_path / "adapter", "--adapter")
    base = shutil.copytree(made / "source", tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [5]}))
    moved = changed(alone, tmp_path / "moved", base_model_name_or_path=str(base))
    assert set(load_checkpoint(str(moved)).tokenizer.stop_ids) == {5, 2}
    tokenizer_files.chatml(moved, tokenizer_files.MARKED)
    assert load_checkpoint(str(moved)).tokenizer.chat_template == tokenizer_files.MARKED
    for file in moved.glob("*token*"):
        file.unlink()
    (moved / "chat_template.jinja").unlink()
    assert load_checkpoint(str(moved)).tokenizer.chat_template == tokenizer_files.CHATML


def test_a_changed_base_is_noticed(made, tmp_path, capsys):
    alone = export(capsys, made, "dpo", tmp_path / "adapter", "--adapter")
    base = shutil.copytree(made / "source", tmp_path / "base")
    moved = changed(alone, tmp_path / "moved", base_model_name_or_path=str(base))
    before = checkpoint_hash(str(moved))
    assert before != checkpoint_hash(str(base))
    tensors = load_file(base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, base / "model.safetensors")
    assert checkpoint_hash(str(moved)) != before


def test_a_reward_models_adapter_keeps_its_head(made, tmp_path, capsys):
    judge = load_checkpoint(str(export(capsys, made, "judge", tmp_path / "adapter", "--adapter")))
    assert isinstance(judge, RewardModel) and judge.network.pooling == "last"
    assert np.abs(np.asarray(judge.params["head"]["kernel"])).min() > 0
