"""Your own model family: StarCoder2 (Lozhkov et al. 2024, arXiv:2402.19173).

A `Family` maps the fields of a checkpoint's config.json to `ModelConfig`, and its tensors to our parameters. Any
architecture that `ModelConfig` can express needs no change to the package. In a config, beside its checkpoint:

    "sft": {..., "model": {"init": "bigcode/starcoder2-3b", "family": "examples/family.py:STARCODER2"}},

and on the command line:

    rlhf-jax sample --model=bigcode/starcoder2-3b --family=examples/family.py:STARCODER2 --prompt="def fib(n):"

A changed file counts as a changed config. Exported checkpoints load in transformers.
"""

from typing import Any

from rlhf_jax.interop.families import Family, ends, linear, norm
from rlhf_jax.models.rotary import rope_of
from rlhf_jax.types import RlhfError


def fields(config: Any) -> dict[str, Any]:
    """Map a config, completed by transformers, to fields of ModelConfig.

    StarCoder2 has LayerNorm, grouped queries, rotary positions, an MLP without a gate, and biases in all layers.
    """
    if config.hidden_act != "gelu_pytorch_tanh":
        raise RlhfError(f"hidden_act = {config.hidden_act!r} is not supported: it should be 'gelu_pytorch_tanh'")
    context, width = config.max_position_embeddings, config.hidden_size // config.num_attention_heads
    return {
        "d_model": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "d_ff": config.intermediate_size,
        "activation": "gelu",
        "norm": "layer",
        "norm_epsilon": config.norm_epsilon,
        "qkv_bias": config.use_bias,
        "out_bias": config.use_bias,
        "mlp_bias": config.use_bias,
        "context": context,
        "rope": rope_of(config.rope_parameters, width, context),
        "windows": (config.sliding_window,) * config.num_hidden_layers if config.sliding_window else None,
        "tied": bool(config.tie_word_embeddings),
    }


LAYER = "model.layers.{i}."
STARCODER2 = Family(
    "starcoder2",
    fields,
    (
        *ends("model.embed_tokens.weight", "model.norm"),
        *(tensor for part in "qkvo" for tensor in linear(f"{LAYER}self_attn.{part}_proj", f"attention/{part}")),
        *linear(f"{LAYER}mlp.c_fc", "up"),
        *linear(f"{LAYER}mlp.c_proj", "down"),
        *norm(f"{LAYER}input_layernorm", "block_{i}/attention_norm"),
        *norm(f"{LAYER}post_attention_layernorm", "block_{i}/mlp_norm"),
    ),
    prefix="model.",
)
