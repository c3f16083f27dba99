"""`rlhf-jax export`: what goes out comes in again, whole or not at all. tests/parity loads it with transformers."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from rlhf_jax.core.sequences import joined
from rlhf_jax.interop import hf
from rlhf_jax.loading.export import export
from rlhf_jax.loading.models import Policy, RewardModel, merged
from rlhf_jax.loading.pretrained import load_checkpoint
from rlhf_jax.loading.stage_models import Base
from rlhf_jax.models.lora import Adapted, LoraConfig
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.text.hf_tokenizer import PretrainedTokenizer
from rlhf_jax.text.tokenizer import TokenizerConfig, train_tokenizer
from rlhf_jax.types import RlhfError, Rollout
from tests.support import checkpoints, tiny, tokenizer_files
from tests.support.commands import fails, succeeds
from tests.support.trained_stages import adapted, assert_same_model, write_stage


@pytest.mark.parametrize("make", [checkpoints.policy, checkpoints.reward_model])
@pytest.mark.parametrize("tokenizer", [tokenizer_files.chatml, tokenizer_files.gemma, tokenizer_files.gpt2])
def test_a_checkpoint_goes_through_unchanged(make, tokenizer, tmp_path, capsys):
    source, out = make(tmp_path / "source", tokenizer), tmp_path / "new" / "out"
    assert succeeds(capsys, "export", f"--model={source}", f"--out={out}").strip() == str(out)
    assert_same_model(load_checkpoint(str(source)), load_checkpoint(str(out)))
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_what_ends_a_text_is_said(tmp_path, capsys):
    source = checkpoints.policy(tmp_path / "source", tokenizer_files.gemma)
    succeeds(capsys, "export", f"--model={source}", f"--out={tmp_path / 'out'}")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"eos_token_id": [1, 5, 4], "pad_token_id": 0}


def test_another_dtype(tmp_path, capsys):
    source, out = checkpoints.policy(tmp_path / "source"), tmp_path / "out"
    succeeds(capsys, "export", f"--model={source}", f"--out={out}", "--dtype=bfloat16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    leaves = jax.tree.leaves(hf.load_pretrained(str(out)).params)
    assert {leaf.dtype.name for leaf in leaves} == {"bfloat16"}


@pytest.mark.parametrize("make", [checkpoints.policy, checkpoints.reward_model])
def test_a_stage_that_began_with_a_checkpoint(make, tmp_path, capsys):
    model = load_checkpoint(str(make(tmp_path / "source")))
    tuned = model._replace(params=jax.tree.map(lambda leaf: leaf + 1, model.params))
    write_stage(tmp_path / "run" / "dpo", tuned)
    succeeds(capsys, "export", f"--workdir={tmp_path / 'run'}", "--stage=dpo", f"--out={tmp_path / 'out'}")
    assert_same_model(load_checkpoint(str(tmp_path / "out")), tuned)


def test_an_adapter_is_merged(tmp_path, capsys):
    source = str(checkpoints.policy(tmp_path / "source"))
    model = load_checkpoint(source)
    assert isinstance(model, Policy)
    network = dataclasses.replace(model.network, lora=LoraConfig(rank=2, alpha=4.0, targets=("attention/[qv]",)))
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, network.init_adapter(model.params, jax.random.key(0)))
    adapted = Adapted(model.params, adapter)
    write_stage(tmp_path / "run" / "dpo", model._replace(network=network, params=adapted), Base(source, is_stage=False))
    succeeds(capsys, "export", f"--workdir={tmp_path / 'run'}", "--stage=dpo", f"--out={tmp_path / 'out'}")
    assert_same_model(load_checkpoint(str(tmp_path / "out")), model._replace(params=network.merge(adapted)))


def test_the_function_merges_an_adapter(tmp_path):
    model = adapted(load_checkpoint(str(checkpoints.policy(tmp_path / "source"))))
    assert_same_model(load_checkpoint(str(export(model, tmp_path / "out"))), merged(model))


@pytest.mark.parametrize(("kind", "size"), [("word", 16), ("byte_bpe", 270)])
def test_a_policy_from_scratch_becomes_a_checkpoint(kind, size, tmp_path, capsys):
    tokenizer = train_tokenizer(TokenizerConfig(kind, size), ["the film was good"])
    network = PolicyNetwork(tiny.MODEL, tokenizer.vocab_size, tokenizer.suppressed)
    params = network.init(jax.random.key(0))
    write_stage(tmp_path / "run" / "sft", Policy(network, params, tokenizer))
    run, out = f"--workdir={tmp_path / 'run'}", tmp_path / "out"
    succeeds(capsys, "export", run, "--stage=sft", f"--out={out}")
    back = load_checkpoint(str(out))
    assert isinstance(back, Policy) and isinstance(back.tokenizer, PretrainedTokenizer)
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    assert back.network == dataclasses.replace(network, config=back.network.config)
    assert back.network.suppressed == (0, 1, 3)
    text = "The film <eos> was<pad> new."
    assert back.tokenizer.encode(text) == tokenizer.encode(text)
    assert back.tokenizer.begin(tokenizer.encode(text)) == back.tokenizer.wrapped(text)["input_ids"]
    assert back.tokenizer.stop_ids == tokenizer.stop_ids and back.tokenizer.pad_id == tokenizer.pad_id
    assert "'sfd'" in fails(capsys, "export", run, "--stage=sfd", f"--out={tmp_path / 'other'}")

    write_stage(tmp_path / "run" / "tuned", back._replace(params=jax.tree.map(lambda leaf: leaf + 1, params)))
    succeeds(capsys, "export", f"--workdir={tmp_path / 'run'}", "--stage=tuned", f"--out={tmp_path / 'again'}")
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "again" / file).read_text() == (out / file).read_text()


def test_a_reward_model_from_scratch_becomes_a_classifier(tmp_path, capsys):
    tokenizer = train_tokenizer(TokenizerConfig("word", 16), ["the film was good"])
    network = ScalarNetwork(tiny.MODEL, tokenizer.vocab_size, "last")
    model = RewardModel(network, network.init(jax.random.key(0)), tokenizer)
    write_stage(tmp_path / "run" / "judge", model)
    succeeds(capsys, "export", f"--workdir={tmp_path / 'run'}", "--stage=judge", f"--out={tmp_path / 'out'}")
    back = load_checkpoint(str(tmp_path / "out"))
    assert isinstance(back, RewardModel)
    prompts, mask = np.array([[1, 4, 5]] * 2), np.ones((2, 3), bool)
    rollout = Rollout(prompts, mask, np.array([[6, 2, 0], [7, 4, 2]]), np.array([[1, 1, 0], [1, 1, 1]], bool))
    scores = [jax.jit(each.network.scores)(each.params, joined(rollout)) for each in (model, back)]
    np.testing.assert_allclose(*scores, atol=1e-6)


def test_a_shape_that_no_family_has_is_refused(tmp_path, capsys):
    tokenizer = train_tokenizer(TokenizerConfig("word", 16), ["the film was good"])
    shape = dataclasses.replace(tiny.MODEL, norm_placement="around")
    network = PolicyNetwork(shape, tokenizer.vocab_size, tokenizer.suppressed)
    with pytest.raises(RlhfError, match=r"the nearest is arcee, with norm_placement = 'before' instead of 'around'\."):
        export(Policy(network, network.init(jax.random.key(0)), tokenizer), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    source = checkpoints.policy(tmp_path / "source")
    (tmp_path / "there").mkdir()
    assert "already exists" in fails(capsys, "export", f"--model={source}", f"--out={tmp_path / 'there'}")
    model = load_checkpoint(str(source))

    def full(directory):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.tokenizer), "save", lambda self, directory: full(directory))
    before = sorted(tmp_path.iterdir())
    assert "No space left" in fails(capsys, "export", f"--model={source}", f"--out={tmp_path / 'out'}")
    assert sorted(tmp_path.iterdir()) == before


def test_a_mean_pooled_reward_model_has_a_class_of_its_own(tmp_path):
    """It has a bias; tests/parity/test_from_scratch.py has the scores that transformers computes with the class."""
    tokenizer = train_tokenizer(TokenizerConfig("word", 16), ["the film was good"])
    network = ScalarNetwork(tiny.MODEL, tokenizer.vocab_size, "mean")
    params = network.init(jax.random.key(0))
    params["head"]["bias"] = params["head"]["bias"] + 0.5
    back = load_checkpoint(str(export(RewardModel(network, params, tokenizer), tmp_path / "out")))
    assert isinstance(back, RewardModel) and back.network.pooling == "mean" and back.network.bias
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    module, _, name = config["auto_map"]["AutoModelForSequenceClassification"].partition(".")
    assert f"class {name}(" in (tmp_path / "out" / f"{module}.py").read_text() and config["architectures"] == [name]
    again = export(back, tmp_path / "again")
    assert json.loads((again / "config.json").read_text()) == config


def test_the_pooling_of_a_classifier_may_change(tmp_path):
    model = load_checkpoint(str(checkpoints.reward_model(tmp_path / "judge")))
    assert isinstance(model, RewardModel)
    mean = model._replace(network=dataclasses.replace(model.network, pooling="mean"))
    back = load_checkpoint(str(export(mean, tmp_path / "mean")))
    assert isinstance(back, RewardModel) and back.network.pooling == "mean" and not back.params["head"]["bias"]
    np.testing.assert_array_equal(back.params["head"]["kernel"], model.params["head"]["kernel"])
    last = export(back._replace(network=dataclasses.replace(back.network, pooling="last")), tmp_path / "last")
    assert_same_model(load_checkpoint(str(last)), model)
    assert not (last / "modeling_mean_pooled.py").exists()
