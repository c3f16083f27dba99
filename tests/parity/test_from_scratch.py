# torch and transformers are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import]
"""Models trained from scratch, exported: transformers gives the same tokens, logits and draws."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rlhf_jax.core.sequences import joined
from rlhf_jax.loading.export import export
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.models.model_config import Rope
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.text.tokenizer import TokenizerConfig, train_tokenizer
from rlhf_jax.types import Rollout
from tests.support import tiny

TEXTS = ["The film was good; it's the best (of 1999).", "naïve \u3042 <eos> text<pad>\n", "  two  spaces", "", "film"]
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
SHAPES: dict[str, dict[str, Any]] = {
    "arcee": {},
    "arcee, biases, untied": {**BIASES, "tied": False, "activation": "gelu", "n_kv_heads": 1},
    "llama": {"gated": True, "activation": "silu", "rope": Rope(500.0), "norm_epsilon": 1e-3},
    "qwen3": {"gated": True, "qk_norm": "head", "head_dim": 12, "activation": "gelu_exact"},
    "olmo2": {"gated": True, "qk_norm": "all", "norm_placement": "after"},
    "gpt2": {**BIASES, "norm": "layer", "positions": "learned", "context": 40},
    "gpt_neox": {**BIASES, "norm": "layer", "rope": Rope(fraction=0.5), "parallel": True, "context": 50},
}


def scaled(params):
    """Every part of the network matters."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), params)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_draws(name, tmp_path, caplog):
    tokenizer = train_tokenizer(TokenizerConfig("word", 20), ["the film was good", "a bad one"])
    network = PolicyNetwork(
        dataclasses.replace(tiny.MODEL, n_layers=2, **SHAPES[name]), tokenizer.vocab_size, tokenizer.suppressed
    )
    params = scaled(network.init(jax.random.key(0)))
    export(Policy(network, params, tokenizer), tmp_path / "out")
    with caplog.at_level("WARNING"):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not caplog.records, caplog.text
    assert not any(info.values()) and model.config.model_type == name.partition(",")[0]

    ids = np.random.default_rng(1).integers(0, tokenizer.vocab_size, (3, 12)).astype(np.int32)
    hidden = jax.jit(lambda params: network.apply(params, jnp.asarray(ids), jnp.ones(ids.shape, bool)))(params)
    ours = network.logits(params, hidden.reshape(-1, hidden.shape[-1])).reshape(*ids.shape, -1)
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(ids, dtype=torch.long)).logits.numpy()
    allowed = [token for token in range(tokenizer.vocab_size) if token not in tokenizer.suppressed]
    np.testing.assert_allclose(ours[..., allowed], theirs[..., allowed], atol=2e-4)

    asked = {"input_ids": torch.tensor(ids[:1], dtype=torch.long), "attention_mask": torch.ones(1, ids.shape[1])}
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 1}
    drawn = model.generate(**asked, **options, output_scores=True, return_dict_in_generate=True)
    np.testing.assert_allclose(
        torch.softmax(drawn.scores[0], -1).numpy(),
        jax.nn.softmax(ours[:1, -1]),
        atol=1e-4,
        err_msg="what is drawn from",
    )


@pytest.mark.parametrize(("kind", "size"), [("word", 14), ("byte_bpe", 280)])
def test_tokens(kind, size, tmp_path):
    tokenizer = train_tokenizer(TokenizerConfig(kind, size), TEXTS[:1] * 3)
    network = PolicyNetwork(tiny.MODEL, tokenizer.vocab_size, tokenizer.suppressed)
    export(Policy(network, network.init(jax.random.key(0)), tokenizer), tmp_path / "out")
    theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == tokenizer.begin(ids)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs.decode([*tokenizer.begin(ids), tokenizer.eos_id], skip_special_tokens=True) == tokenizer.decode(
            ids
        )
    assert [theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id] == [0, 1, 2, 3]
    padded = theirs(TEXTS[-2:], padding=True)
    assert set(padded["input_ids"][0][1:]) == {0} and sum(padded["attention_mask"][0]) == 1


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_scores(pooling, tmp_path):
    tokenizer = train_tokenizer(TokenizerConfig("word", 20), ["the film was good", "a bad one"])
    network = ScalarNetwork(tiny.MODEL, tokenizer.vocab_size, pooling)
    params = scaled(network.init(jax.random.key(0)))
    params["head"]["bias"] = np.full(1, 0.0 if pooling == "last" else 0.7, np.float32)  # only our class has a bias
    export(RewardModel(network, params, tokenizer), tmp_path / "out")
    theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True, trust_remote_code=True
    )
    assert not any(info.values()), info
    prompts, responses = np.array([[1, 4, 5]] * 2), np.array([[6, 2, 0], [7, 4, 2]])
    mask = responses > 0
    scores = jax.jit(network.scores)(params, joined(Rollout(prompts, np.ones_like(mask), responses, mask)))
    with torch.no_grad():
        tokens, attended = np.hstack([prompts, responses]), np.hstack([np.ones_like(mask), mask])
        expected = theirs.eval()(torch.tensor(tokens), attention_mask=torch.tensor(attended)).logits[:, 0]
    np.testing.assert_allclose(scores, expected.numpy(), atol=2e-4)
