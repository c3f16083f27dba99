# torch, transformers and peft are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""Adapters of every family against PEFT's own: what they compute, their gradients, merging, and the way in and out."""

import copy
import dataclasses
import functools
import json
import re
import tempfile
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from rlhf_jax.core.sequences import joined
from rlhf_jax.interop import hf
from rlhf_jax.interop.peft import load_adapter, save_adapter
from rlhf_jax.models.lora import Adapted, LoraConfig, layers_of
from rlhf_jax.types import RlhfError, Rollout
from tests.parity import checkpoints

# name of a checkpoint -> what PEFT adapts of it
CASES = [
    ("gpt2", ["c_attn"]),
    ("gpt2, inner width", "all-linear"),
    ("gpt_neox", ["query_key_value", "dense_4h_to_h"]),
    ("gpt_neox, in sequence, tied, no bias", "all-linear"),
    ("llama, grouped", ["q_proj", "v_proj"]),
    ("llama, tied, biases", "all-linear"),
    ("arcee", ["up_proj", "v_proj"]),
    ("mistral, window", ["o_proj", "down_proj"]),
    ("qwen2", r".*\.1\.self_attn\.[kv]_proj"),
    ("qwen3", ["layers.0.self_attn.q_proj", "up_proj"]),
    ("gemma, one kv head", "all-linear"),
    ("gemma2", ["gate_proj", "k_proj"]),
    ("gemma3", "all-linear"),
    ("olmo2", "all-linear"),
    ("phi3", ["qkv_proj"]),
    ("phi3, partial", "all-linear"),
]
every_case = pytest.mark.parametrize("name, targets", CASES, ids=[f"{name}: {targets}" for name, targets in CASES])


@functools.cache
def checkpoint(name: str, labels: int | None = None) -> checkpoints.Checkpoint:
    return checkpoints.make(name, Path(tempfile.mkdtemp()) / "model", labels=labels)


def made_by_peft(made: checkpoints.Checkpoint, directory: Path, targets, task="CAUSAL_LM", **options):
    """A random adapter of PEFT's on a copy of a model, saved."""
    conv1d = made.model.config.model_type == "gpt2"
    config = peft.LoraConfig(
        **{"r": 3, "lora_alpha": 4, "task_type": task, "fan_in_fan_out": conv1d, "target_modules": targets, **options}
    )
    model = peft.get_peft_model(copy.deepcopy(made.model), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(directory)
    return model


def tokens(rows: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 64, (rows, 14)).astype(np.int32)  # no special tokens


def network_and_base(made: checkpoints.Checkpoint):
    pretrained = hf.load_pretrained(str(made.directory))
    return pretrained, hf.network_of(pretrained)


def with_lora(network, config):
    return type(network)(**{**vars(network), "lora": config})


@functools.partial(jax.jit, static_argnums=0)
def logits_of(network, params, ids):
    hidden = network.apply(params, ids, jnp.ones(ids.shape, bool))
    return network.logits(params, hidden.reshape(-1, hidden.shape[-1])).reshape(*ids.shape, -1)


def theirs_of(model, ids):
    return model(input_ids=torch.tensor(ids, dtype=torch.long)).logits


def contents(directory: Path) -> dict[str, np.ndarray]:
    return load_file(directory / "adapter_model.safetensors")


@every_case
def test_peft_adapters_compute_and_learn_the_same_here(name, targets, tmp_path):
    made = checkpoint(name)
    model = made_by_peft(made, tmp_path / "adapter", targets)
    pretrained, network = network_and_base(made)
    loaded = load_adapter(str(tmp_path / "adapter"), pretrained)
    network, ids = with_lora(network, loaded.config), tokens()
    params = Adapted(pretrained.params, loaded.adapter)
    expected = theirs_of(model, ids)
    np.testing.assert_allclose(logits_of(network, params, ids), expected.detach().numpy(), atol=2e-4)
    base = theirs_of(made.model, ids).detach().numpy()
    assert np.abs(base - expected.detach().numpy()).max() > 0.01
    np.testing.assert_allclose(logits_of(network, pretrained.params, ids), base, atol=2e-4)

    weights = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32) / expected.numel()
    (expected * torch.as_tensor(weights)).sum().backward()
    grads = jax.jit(
        jax.grad(lambda a: jnp.sum(logits_of(network, Adapted(pretrained.params, a), jnp.asarray(ids)) * weights))
    )(loaded.adapter)
    save_adapter(
        tmp_path / "grads",
        "policy",
        Adapted(pretrained.params, grads),
        loaded.config,
        pretrained.hf_config,
        base=None,
    )
    theirs = {n.replace(".default", ""): p.grad.numpy() for n, p in model.named_parameters() if p.requires_grad}
    ours, scale = contents(tmp_path / "grads"), max(np.abs(grad).max() for grad in theirs.values())
    assert ours.keys() == theirs.keys()
    for n, grad in ours.items():
        np.testing.assert_allclose(grad, theirs[n], atol=1e-4 * scale, err_msg=n)


@every_case
def test_the_way_in_and_out_keeps_every_byte(name, targets, tmp_path):
    made = checkpoint(name)
    made_by_peft(made, tmp_path / "in", targets, lora_dropout=0.25)
    pretrained, _ = network_and_base(made)
    loaded = load_adapter(str(tmp_path / "in"), pretrained)
    assert (loaded.config.rank, loaded.config.alpha, loaded.config.dropout) == (3, 4.0, 0.25)
    params = Adapted(pretrained.params, loaded.adapter)
    save_adapter(tmp_path / "out", "policy", params, loaded.config, pretrained.hf_config, base="a/b")
    before, after = ((tmp_path / d / "adapter_model.safetensors").read_bytes() for d in ("in", "out"))
    assert before == after
    before, after = (json.loads((tmp_path / d / "adapter_config.json").read_text()) for d in ("in", "out"))
    changed = {n for n in after if before[n] != after[n]}
    assert changed <= {"base_model_name_or_path", "target_modules"}, changed
    assert after["base_model_name_or_path"] == "a/b"
    if name.startswith(("llama, grouped", "gpt2", "phi3", "gemma2")) and targets != "all-linear":
        assert sorted(before["target_modules"]) == after["target_modules"]
    # And the config makes an adapter of the same layers.
    again = with_lora(hf.network_of(pretrained), loaded.config).init_adapter(pretrained.params, jax.random.key(0))
    assert jax.tree.structure(again) == jax.tree.structure(loaded.adapter)
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, loaded.adapter)


def test_rank_stabilised_adapters_are_scaled_by_the_root_of_the_rank_as_in_peft(tmp_path):
    made = checkpoint("llama, grouped")
    model = made_by_peft(made, tmp_path / "in", ["q_proj", "up_proj"], use_rslora=True)
    pretrained, network = network_and_base(made)
    loaded = load_adapter(str(tmp_path / "in"), pretrained)
    assert loaded.config.use_rslora and loaded.config.scale == pytest.approx(4 / 3**0.5)
    params, ids = Adapted(pretrained.params, loaded.adapter), tokens()
    got = logits_of(with_lora(network, loaded.config), params, ids)
    np.testing.assert_allclose(got, theirs_of(model, ids).detach().numpy(), atol=2e-4)
    plain = with_lora(network, dataclasses.replace(loaded.config, use_rslora=False))
    assert np.abs(got - logits_of(plain, params, ids)).max() > 0.01

    save_adapter(tmp_path / "out", "policy", params, loaded.config, pretrained.hf_config, base=str(made.directory))
    again = peft.PeftModel.from_pretrained(copy.deepcopy(made.model), tmp_path / "out").eval()
    assert again.peft_config["default"].use_rslora
    torch.testing.assert_close(theirs_of(again, ids), theirs_of(model, ids))
    merged = with_lora(network, loaded.config).merge(params)
    theirs = model.merge_and_unload()
    np.testing.assert_allclose(logits_of(network, merged, ids), theirs_of(theirs, ids).detach().numpy(), atol=2e-4)


OURS = [
    ("gpt2", ("attention/qkv", "up")),
    ("gpt2, inner width", ("attention/o",)),  # c_proj, as is the MLP's
    ("gpt2", ("down", "attention/o")),
    ("gpt_neox", ("attention/qkv|attention/o|up|down",)),
    ("llama, grouped", ("attention/[qkvo]", "up|gate|down")),
    ("llama, grouped", ("attention/qkv", "gate_up")),  # what PEFT keeps apart can share an A here
    ("llama 3, long", ("block_1/.*/[qk]", "block_0/down")),
    ("gemma3", ("attention/[vo]", "gate")),
    ("olmo2", ("attention/q",)),
    ("phi3", ("attention/qkv", "gate_up", "down")),
]


def random_adapter(network, params, seed=0):
    rng = np.random.default_rng(seed)
    adapter = network.init_adapter(params, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32), adapter)


@pytest.mark.parametrize("name, targets", OURS, ids=[f"{name}: {targets}" for name, targets in OURS])
def test_our_adapters_load_into_peft_without_a_word(name, targets, tmp_path, caplog):
    made = checkpoint(name)
    pretrained, network = network_and_base(made)
    network = with_lora(network, LoraConfig(2, 3.5, targets, dropout=0.1))
    params = Adapted(pretrained.params, random_adapter(network, pretrained.params))
    save_adapter(tmp_path / "out", "policy", params, network.lora, pretrained.hf_config, base=str(made.directory))
    with caplog.at_level("WARNING"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(made.model), tmp_path / "out").eval()
    assert not caplog.records and not [w for w in caught if "peft" in str(w.filename)], (caplog.text, caught)
    assert model.peft_config["default"].lora_dropout == 0.1
    expected = theirs_of(model, tokens()).detach().numpy()
    np.testing.assert_allclose(logits_of(network, params, tokens()), expected, atol=2e-4)
    adapted = {n for n, _ in model.named_modules() if n.endswith("lora_A.default")}
    assert len(adapted) == len([n for n in contents(tmp_path / "out") if "lora_A" in n])

    back = load_adapter(str(tmp_path / "out"), pretrained)
    assert back.config.alpha == 3.5 and layers_of(back.adapter).keys() == layers_of(params.adapter).keys()
    np.testing.assert_allclose(
        logits_of(with_lora(network, back.config), Adapted(pretrained.params, back.adapter), tokens()),
        logits_of(network, params, tokens()),
        atol=1e-5,
    )

    merged = model.merge_and_unload().state_dict()
    hf.save_pretrained(tmp_path / "merged", "policy", network.merge(params), pretrained.hf_config)
    for n, array in load_file(tmp_path / "merged" / "model.safetensors").items():
        np.testing.assert_allclose(array, merged[n.replace("embed_out", "lm_head")].numpy(), atol=2e-6, err_msg=n)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama, grouped", "phi3"])
def test_adapters_of_classifiers_are_those_of_reward_models_with_their_heads(name, tmp_path):
    made = checkpoint(name, labels=1)
    model = made_by_peft(made, tmp_path / "in", "all-linear", "SEQ_CLS")
    pretrained, network = network_and_base(made)
    loaded = load_adapter(str(tmp_path / "in"), pretrained)
    network, ids = with_lora(network, loaded.config), tokens()
    params = Adapted(pretrained.params, loaded.adapter)
    everything = np.ones((3, 7), bool)
    scores = jax.jit(network.scores)(params, joined(Rollout(ids[:, :7], everything, ids[:, 7:], everything)))
    np.testing.assert_allclose(scores, theirs_of(model, ids).detach().numpy()[:, 0], atol=2e-4)
    assert not np.allclose(loaded.adapter["head"]["kernel"], pretrained.params["head"]["kernel"], atol=1e-2)

    save_adapter(tmp_path / "out", "reward", params, loaded.config, pretrained.hf_config, base=None)
    assert contents(tmp_path / "in").keys() == contents(tmp_path / "out").keys()
    before, after = ((tmp_path / d / "adapter_model.safetensors").read_bytes() for d in ("in", "out"))
    assert before == after
    again = peft.PeftModel.from_pretrained(copy.deepcopy(made.model), tmp_path / "out").eval()
    torch.testing.assert_close(theirs_of(again, ids), theirs_of(model, ids))

    # A head that PEFT did not save is the base's.
    tensors = contents(tmp_path / "in")
    del tensors["base_model.model.score.weight"]
    save_file(tensors, tmp_path / "in" / "adapter_model.safetensors")
    headless = load_adapter(str(tmp_path / "in"), pretrained)
    np.testing.assert_array_equal(headless.adapter["head"]["kernel"], pretrained.params["head"]["kernel"])


def test_half_precision_is_widened(tmp_path):
    made = checkpoint("llama, grouped")
    made_by_peft(made, tmp_path, ["q_proj"])
    pretrained, _ = network_and_base(made)
    full = load_adapter(str(tmp_path), pretrained).adapter
    save_file({n: t.astype(np.float16) for n, t in contents(tmp_path).items()}, tmp_path / "adapter_model.safetensors")
    for x, y in zip(
        jax.tree.leaves(load_adapter(str(tmp_path), pretrained).adapter), jax.tree.leaves(full), strict=True
    ):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, atol=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"use_dora": True}, "use_dora = true is not supported: merge the adapter with PEFT"),
        ({"modules_to_save": ["lm_head"]}, r'modules_to_save = \["lm_head"\]'),
        ({"rank_pattern": {"q_proj": 5}}, r'rank_pattern = {"q_proj": 5}'),
        ({"alpha_pattern": {"q_proj": 5}}, "alpha_pattern"),
        ({"bias": "lora_only"}, 'bias = "lora_only"'),
        ({"lora_bias": True, "target_modules": ["o_proj"]}, "lora_bias = true"),
        ({"init_lora_weights": "olora"}, 'init_lora_weights = "olora"'),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            "adapts layers that are not supported: .*embed_tokens.lora_embedding_A",
        ),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts layers that are not supported: .*lm_head.lora_A"),
        ({"target_modules": ["lm_head"]}, "adapts layers that are not supported: "),
    ],
    ids=str,
)
def test_what_we_do_not_have_is_refused_by_name(options, message, tmp_path):
    made = checkpoint("llama, tied, biases" if "lora_bias" in options else "llama, grouped")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made_by_peft(made, tmp_path, options.pop("target_modules", ["q_proj"]), **options)
    with pytest.raises(RlhfError, match=message):
        load_adapter(str(tmp_path), network_and_base(made)[0])


def test_layers_that_peft_was_told_to_leave_out_are_not_missed(tmp_path):
    made = checkpoint("llama, grouped")
    for i, options in enumerate(({"layers_to_transform": [1]}, {"exclude_modules": r".*\.0\..*"})):
        made_by_peft(made, tmp_path / str(i), ["q_proj"], **options)
        loaded = load_adapter(str(tmp_path / str(i)), network_and_base(made)[0])
        assert loaded.config.targets == ("block_1/attention/q",)


def test_damaged_and_foreign_adapters_are_refused(tmp_path):
    made, other = checkpoint("llama, grouped"), checkpoint("llama 3, long")
    made_by_peft(made, tmp_path, ["q_proj"])
    pretrained = network_and_base(made)[0]
    with pytest.raises(
        RlhfError, match=r"q_proj.lora_B.weight has the shape \(32, 3\), but the base and r require \(64"
    ):
        load_adapter(str(tmp_path), network_and_base(other)[0])
    with pytest.raises(RlhfError, match=r"is incomplete|adapts layers that are not supported"):
        load_adapter(str(tmp_path), network_and_base(checkpoint("gpt2"))[0])
    file, whole = tmp_path / "adapter_model.safetensors", contents(tmp_path)
    for name in ("layers.1.self_attn.q_proj.lora_A.weight", "layers.0.self_attn.q_proj.lora_B.weight"):
        save_file({n: t for n, t in whole.items() if not n.endswith(name)}, file)
        with pytest.raises(RlhfError, match=f"is incomplete: it has no tensor .*{re.escape(name)}"):
            load_adapter(str(tmp_path), pretrained)
    save_file({n: t for n, t in whole.items() if "layers.0" in n}, file)
    with pytest.raises(RlhfError, match=r"has no tensor .*layers\.1\.self_attn\.q_proj\.lora_A\.weight"):
        load_adapter(str(tmp_path), pretrained)
    file.unlink()
    with pytest.raises(RlhfError, match=r"adapter_model\.safetensors is missing"):
        load_adapter(str(tmp_path), pretrained)
    config = tmp_path / "adapter_config.json"
    for text, message in (
        (json.dumps({"peft_type": "IA3", "r": 1, "lora_alpha": 1, "target_modules": []}), "peft_type = 'IA3'"),
        (json.dumps({"peft_type": "LORA", "r": 1}), "has no lora_alpha, target_modules"),
        ("[]", "is not a PEFT config"),
        ("{", "is not a PEFT config"),
    ):
        config.write_text(text)
        with pytest.raises(RlhfError, match=message):
            load_adapter(str(tmp_path), pretrained)
    config.unlink()
    with pytest.raises(RlhfError, match="cannot be read"):
        load_adapter(str(tmp_path), pretrained)


@pytest.mark.parametrize(
    "name, targets, message",
    [
        ("gpt2", ("attention/[qv]",), "gpt2 stores block_0/attention/q, .* as one layer transformer.h.0.attn.c_attn,"),
        ("gpt2", ("attention/[qkv]",), "train with 'attention/qkv' in lora.targets"),
        ("phi3", ("up|gate",), "phi3 stores block_0/gate, block_0/up as one layer .*'gate_up' in lora.targets"),
    ],
)
def test_what_peft_cannot_say_is_not_written(name, targets, message, tmp_path):
    pretrained, network = network_and_base(checkpoint(name))
    network = with_lora(network, LoraConfig(2, 3.5, targets))
    params = Adapted(pretrained.params, random_adapter(network, pretrained.params))
    with pytest.raises(RlhfError, match=message):
        save_adapter(tmp_path / "out", "policy", params, network.lora, pretrained.hf_config, base=None)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(tmp_path):
    pretrained, network = network_and_base(checkpoint("gpt2"))
    network = with_lora(network, LoraConfig(2, 3.5, ("attention/qkv",)))
    params = Adapted(pretrained.params, random_adapter(network, pretrained.params))
    (tmp_path / "file").touch()
    with pytest.raises(RlhfError, match="exists and is not empty"):
        save_adapter(tmp_path, "policy", params, network.lora, pretrained.hf_config, base=None)
