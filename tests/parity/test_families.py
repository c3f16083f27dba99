# torch and transformers are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import, missing-attribute]
"""Every family of models against transformers' own: logits, padding, gradients, and the way in and out again."""

import copy
import functools
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from rlhf_jax.core.sequences import joined
from rlhf_jax.interop import hf
from rlhf_jax.interop.families import FAMILIES, tensor_shape, tensors_of
from rlhf_jax.types import Rollout
from tests.parity import checkpoints
from tests.parity.checkpoints import logits_of, tokens


@functools.cache
def checkpoint(name: str, labels: int | None = None) -> checkpoints.Checkpoint:
    return checkpoints.make(name, Path(tempfile.mkdtemp()) / "model", labels=labels)


@pytest.mark.parametrize("name", checkpoints.SHAPES)
def test_logits_and_gradients_are_those_of_transformers(name):
    made = checkpoint(name)
    pretrained = hf.load_pretrained(str(made.directory))
    ids = tokens(3)
    ids_, everything = jnp.asarray(ids), jnp.ones(ids.shape, bool)
    expected = made.model(torch.tensor(ids, dtype=torch.long)).logits
    got = jax.jit(functools.partial(logits_of, pretrained))(pretrained.params, ids_, everything)
    assert np.std(expected.detach().numpy()) > 0.1
    np.testing.assert_allclose(got, expected.detach().numpy(), atol=2e-4)

    weights = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32) / expected.numel()
    made.model.zero_grad()
    (expected * torch.as_tensor(weights)).sum().backward()
    grads = jax.jit(jax.grad(lambda params: jnp.sum(logits_of(pretrained, params, ids_, everything) * weights)))(
        pretrained.params
    )
    with tempfile.TemporaryDirectory() as directory:
        hf.save_pretrained(Path(directory) / "grads", "policy", grads, pretrained.hf_config)
        ours = load_file(Path(directory) / "grads" / "model.safetensors")
    theirs = {n: p.grad.numpy() for n, p in made.model.named_parameters()}
    renamed = {"embed_out.weight": "lm_head.weight"}
    assert {renamed.get(n, n) for n in ours} == set(theirs)
    scale = max(np.abs(grad).max() for grad in theirs.values())
    for n, grad in ours.items():
        np.testing.assert_allclose(grad, theirs[renamed.get(n, n)], atol=1e-4 * scale, err_msg=n)


@pytest.mark.parametrize("name", checkpoints.SHAPES)
def test_padding_on_both_sides_changes_nothing(name):
    pretrained = hf.load_pretrained(str(checkpoint(name).directory))
    lengths, before = (5, 12, 9), (7, 0, 3)
    ids = tokens(3, 12)
    padded, mask = np.full((3, 16), 63, np.int32), np.zeros((3, 16), bool)
    for row, (length, start) in enumerate(zip(lengths, before, strict=True)):
        padded[row, start : start + length], mask[row, start : start + length] = ids[row, :length], True
    got = jax.jit(functools.partial(logits_of, pretrained))(pretrained.params, padded, mask)
    for row, length in enumerate(lengths):
        expected = checkpoint(name).model(torch.tensor(ids[row : row + 1, :length], dtype=torch.long)).logits
        np.testing.assert_allclose(got[row, mask[row]], expected.detach().numpy()[0], atol=2e-4)


@pytest.mark.parametrize("name", checkpoints.SHAPES)
def test_decoding_with_a_cache_gives_the_same_logits(name):
    made = checkpoint(name)
    pretrained = hf.load_pretrained(str(made.directory))
    network, ids = hf.network_of(pretrained), tokens(2, 14)
    start, step = jax.jit(network.start, static_argnums=3), jax.jit(network.step)
    logits, cache = start(pretrained.params, ids[:, :6], np.ones((2, 6), bool), 14)
    decoded = [logits]
    for t in range(6, 13):
        logits, cache = step(pretrained.params, ids[:, t], cache, t)
        decoded.append(logits)
    expected = made.model(torch.tensor(ids, dtype=torch.long)).logits.detach().numpy()[:, 5:13]
    np.testing.assert_allclose(np.stack(decoded, axis=1), expected, atol=2e-4)


@pytest.mark.parametrize("name", checkpoints.SHAPES)
def test_the_way_in_and_out_keeps_every_byte_and_transformers_reads_it_without_a_word(name, tmp_path, caplog):
    made = checkpoint(name)
    pretrained = hf.load_pretrained(str(made.directory))
    hf.save_pretrained(tmp_path / "out", "policy", pretrained.params, pretrained.hf_config)
    before, after = (load_file(d / "model.safetensors") for d in (made.directory, tmp_path / "out"))
    assert {n: (t.dtype, t.tobytes()) for n, t in before.items()} == {
        n: (t.dtype, t.tobytes()) for n, t in after.items()
    }
    with caplog.at_level("WARNING"):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not caplog.records and not any(info.values()), (caplog.text, info)
    ids = torch.tensor(tokens(2), dtype=torch.long)
    torch.testing.assert_close(model.eval()(ids).logits, made.model(ids).logits, atol=1e-5, rtol=1e-5)


def test_long_sequences_take_the_long_factors():
    """Longrope of a sequence beyond the short context: the room of the batch decides."""
    name = "phi3, longrope, short"
    made, ids = checkpoint(name), tokens(2, 48)
    pretrained = hf.load_pretrained(str(made.directory))
    got = jax.jit(functools.partial(logits_of, pretrained))(pretrained.params, ids, np.ones_like(ids, bool))
    expected = made.model(torch.tensor(ids, dtype=torch.long)).logits.detach().numpy()
    np.testing.assert_allclose(got, expected, atol=2e-4)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama, grouped", "qwen2", "gemma2", "phi3"])
def test_classifiers_with_one_label_are_reward_models(name, tmp_path):
    made = checkpoint(name, labels=1)
    pretrained = hf.load_pretrained(str(made.directory))
    assert pretrained.kind == "reward"
    ids = tokens(3)
    prompt, response = ids[:, :8], ids[:, 8:]
    mask = np.arange(response.shape[1])[None] < np.array([12, 7, 1])[:, None]
    scores = hf.network_of(pretrained).scores(
        pretrained.params, joined(Rollout(prompt, np.ones_like(prompt, bool), np.where(mask, response, 0), mask))
    )
    whole = np.concatenate([prompt, np.where(mask, response, 0)], axis=1)
    attention = np.concatenate([np.ones_like(prompt, bool), mask], axis=1)
    expected = made.model(torch.tensor(whole, dtype=torch.long), attention_mask=torch.tensor(attention)).logits
    np.testing.assert_allclose(scores, expected.detach().numpy()[:, 0], atol=2e-4)

    hf.save_pretrained(tmp_path / "out", "reward", pretrained.params, pretrained.hf_config)
    _, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), info


def test_shards_and_half_precision_and_the_place_of_each_parameter(tmp_path):
    made = checkpoint("llama, grouped")
    copy.deepcopy(made.model).to(torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="12KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    placed = {}

    def place(path, array):
        placed[path] = array.dtype
        return jnp.array(array)

    pretrained = hf.load_pretrained(str(tmp_path / "shards"), place=place)
    assert pretrained.config.param_dtype == "bfloat16"
    assert len(placed) == len(jax.tree.leaves(pretrained.params))
    widened = hf.load_pretrained(str(tmp_path / "shards"), param_dtype="float32")
    for low, wide in zip(jax.tree.leaves(pretrained.params), jax.tree.leaves(widened.params), strict=True):
        assert low.dtype == jnp.bfloat16 and wide.dtype == jnp.float32
        np.testing.assert_array_equal(low.astype(jnp.float32), wide)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_as_transformers_has_it(family, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    config, vocab_size = hf.read_shape(hf.read_config(tmp_path), param_dtype="float32", compute_dtype="float32")
    shapes = hf.parameter_shapes("policy", config, vocab_size)
    tensors = tensors_of(FAMILIES[family], config.n_layers, shapes)
    ours = {tensor.name: tensor_shape(tensor, [shapes[part] for part in tensor.parts]) for tensor in tensors}
    with torch.device("meta"):  # which takes no memory
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family))
    renamed = {"embed_out.weight": "lm_head.weight"}
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {renamed.get(name, name): shape for name, shape in ours.items()} == theirs
