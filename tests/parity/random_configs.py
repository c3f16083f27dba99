"""Random configs of every family that transformers accepts, small enough to be computed in a moment.

A number gives a family and its config; the same number gives the same one. Fields are drawn over what a config.json may
say: odd head widths, odd numbers of rotary channels, every type of rope scaling, older spellings, and fields of other
families, which transformers leaves unread.
"""

import random
from typing import Any

FAMILIES = (
    *("gpt2", "gpt_neox", "llama", "arcee", "mistral", "qwen2", "qwen3"),
    *("gemma", "gemma2", "gemma3_text", "olmo2", "phi3"),
)
LENGTH = 16
"""Tokens of the sequences that are compared: prompts of 8, 5 that follow in one pass, and 3 that follow one by one."""

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu", "relu2", "swish")
OTHER_ACTIVATIONS = ("quick_gelu", "tanh", "mish", "gelu_10")  # of transformers alone

LAYERS = (1, 1, 2, 2, 3)
LEAST = 4
"""Smallest model width: norms over fewer channels magnify rounding (over one channel they have no gradient)."""

Fields = dict[str, Any]


def config(number: int) -> tuple[str, Fields]:
    """The family, and what its config.json says beside the family's name."""
    rng = random.Random(number)
    family = FAMILIES[number % len(FAMILIES)]
    fields = gpt2(rng) if family == "gpt2" else gpt_neox(rng) if family == "gpt_neox" else decoder(rng, family)
    fields |= {"vocab_size": rng.randint(24, 60), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if rng.random() < 0.8:  # else it is as the family has it
        fields["tie_word_embeddings"] = rng.random() < 0.5
    if rng.random() < 0.3:
        fields["initializer_range"] = rng.choice([0.01, 0.3])
    return family, fields


def activation(rng: random.Random) -> str:
    return rng.choice(OTHER_ACTIVATIONS if rng.random() < 0.03 else ACTIVATIONS)


def epsilon(rng: random.Random) -> float:
    return rng.choice([1e-6, 1e-5, 1e-3, 1e-2])


def context(rng: random.Random) -> int:
    return rng.choice([LENGTH, 24, 40, 64])


def sometimes(rng: random.Random, chance: float, **fields: Any) -> Fields:
    return fields if rng.random() < chance else {}


def gpt2(rng: random.Random) -> Fields:
    heads, width = rng.randint(1, 4), rng.randint(1, 12)
    return {
        "n_embd": heads * (width if heads * width >= LEAST else LEAST),
        "n_head": heads,
        "n_layer": rng.choice(LAYERS),
        "n_positions": context(rng),
        "n_inner": rng.choice([None, rng.randint(5, 60)]),
        "activation_function": activation(rng),
        "layer_norm_epsilon": epsilon(rng),
        **sometimes(rng, 0.3, scale_attn_weights=False),
        **sometimes(rng, 0.1, scale_attn_by_inverse_layer_idx=True),
        **sometimes(rng, 0.3, reorder_and_upcast_attn=True),
        **sometimes(rng, 0.3, resid_pdrop=0.3, embd_pdrop=0.2, attn_pdrop=0.5),
        **sometimes(rng, 0.2, sliding_window=3, head_dim=5),  # of others
    }


def gpt_neox(rng: random.Random) -> Fields:
    heads, width = rng.randint(1, 4), rng.randint(2, 12)
    width = width if heads * width >= LEAST else LEAST
    share = rng.choice([None, 0.25, 0.5, 0.7, 0.9, 1.0])
    channels = int(width * (0.25 if share is None else share))
    if channels == width and width % 2:
        share, channels = 0.6, int(width * 0.6)
    fields = {
        "hidden_size": heads * width,
        "num_attention_heads": heads,
        "num_hidden_layers": rng.choice(LAYERS),
        "intermediate_size": rng.randint(5, 60),
        "hidden_act": activation(rng),
        "layer_norm_eps": epsilon(rng),
        "max_position_embeddings": context(rng),
        **sometimes(rng, 0.5, use_parallel_residual=rng.random() < 0.5),
        **sometimes(rng, 0.5, attention_bias=rng.random() < 0.5),
        **sometimes(rng, 0.2, hidden_dropout=0.3, attention_dropout=0.2),
        **sometimes(rng, 0.2, num_key_value_heads=1, sliding_window=3),  # of others
    }
    return fields | rope(rng, channels, {} if share is None else {"share": share}, family="gpt_neox")


def decoder(rng: random.Random, family: str) -> Fields:
    """Families with Llama's layout."""
    heads = rng.choice([1, 2, 3, 4, 6])
    width = 2 * rng.randint(1, 6)
    fields: Fields = {
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        "num_hidden_layers": rng.choice(LAYERS),
        "intermediate_size": rng.randint(5, 60),
        "rms_norm_eps": epsilon(rng),
        "max_position_embeddings": context(rng),
    }
    if family in ("phi3", "olmo2") or (family not in ("qwen3", *GEMMAS) and rng.random() < 0.4):
        width = min(width, 48 // heads // 2 * 2) if heads * width >= LEAST else LEAST
        fields["hidden_size"] = heads * width
    else:
        fields["head_dim"] = width
        whole = family in ("llama", "arcee", "gemma2", "gemma3_text")  # they ask for a multiple
        fields["hidden_size"] = heads * rng.randint(2, 48 // heads) if whole else rng.randint(8, 48)
        if fields["hidden_size"] < LEAST:
            fields["hidden_size"] = heads * LEAST
    if family in ("llama", "arcee", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2"):
        fields |= sometimes(rng, 0.5, attention_bias=rng.random() < 0.6)
    if family in ("llama", "arcee"):
        fields |= sometimes(rng, 0.5, mlp_bias=rng.random() < 0.6)
    if family in ("gemma2", "gemma3_text"):
        fields |= gemma2(rng, 0.7 if family == "gemma2" else 0.1)  # Gemma 3 has the field, and does not read it
    else:
        fields |= sometimes(rng, 0.8, hidden_act=activation(rng))
    fields |= windows(rng, family, fields["num_hidden_layers"])
    fields |= unread(rng, family, fields["num_hidden_layers"])
    if family == "phi3":
        return fields | phi3_rope(rng, fields, width)
    if family == "gemma3_text":
        return fields | gemma3_rope(rng, width)
    if rng.random() < 0.04:
        return fields | {"partial_rotary_factor": 0.5}
    return fields | rope(rng, width, {}, family=family)


GEMMAS = ("gemma", "gemma2", "gemma3_text")


def gemma2(rng: random.Random, chance_of_cap: float) -> Fields:
    return {
        "query_pre_attn_scalar": rng.randint(1, 40),
        **sometimes(rng, 0.8, hidden_activation=activation(rng)),
        **sometimes(rng, chance_of_cap, attn_logit_softcapping=rng.choice([None, 0.5, 2.0, 30.0])),
        **sometimes(rng, 0.7, final_logit_softcapping=rng.choice([None, 0.5, 2.0, 30.0])),
        **sometimes(rng, 0.05, use_bidirectional_attention=True),
    }


def windows(rng: random.Random, family: str, layers: int) -> Fields:
    window, kinds = rng.randint(1, 9), ["sliding_attention", "full_attention"]
    each = {"layer_types": [rng.choice(kinds) for _ in range(layers)]}
    if family in ("mistral", "phi3"):
        return rng.choice([{}, {"sliding_window": None}, {"sliding_window": window}])
    if family in ("qwen2", "qwen3"):
        if rng.random() < 0.4:
            return sometimes(rng, 0.5, use_sliding_window=False, sliding_window=window)
        own = {"use_sliding_window": True, "sliding_window": window}
        return own | rng.choice([each, {"max_window_layers": rng.randint(0, layers)}])
    if family == "gemma2":
        return {"sliding_window": window} | rng.choice([{}, each])
    if family == "gemma3_text":
        return {"sliding_window": window} | rng.choice([each, {"sliding_window_pattern": rng.randint(1, 3)}])
    return {}


def unread(rng: random.Random, family: str, layers: int) -> Fields:
    """Fields that others of the families have, and this one has not."""
    if rng.random() < 0.75:
        return {}
    if family in ("mistral", "phi3"):
        return {"attention_bias": True, "mlp_bias": True, "query_pre_attn_scalar": 3}
    if family in ("llama", "arcee", "olmo2"):
        return {"sliding_window": 3, "final_logit_softcapping": 1.0, "query_pre_attn_scalar": 3}
    if family in ("qwen2", "qwen3"):
        return {"mlp_bias": True, "attn_logit_softcapping": 1.0}
    if family == "gemma":
        return {"hidden_activation": "relu", "query_pre_attn_scalar": 3, "final_logit_softcapping": 1.0}
    return {"hidden_act": "relu", "mlp_bias": True}


# ---- rotary positions ----------------------------------------------------------------------------------------------


def scaling(rng: random.Random, channels: int, family: str) -> Fields:
    """A type of rope scaling, and what it reads; yarn and dynamic are not computed by transformers for any number."""
    kinds = ["linear", "llama3", "longrope"]
    kinds += ["yarn"] if channels % 2 == 0 and channels else []
    kinds += ["dynamic"] if channels > 2 else []
    kind = rng.choice(kinds)
    factor = rng.choice([1.0, 2.0, 3.7, 8.0])
    original = {"original_max_position_embeddings": rng.choice([4, 20])}
    said: Fields = {"rope_type": kind, "factor": factor}
    if kind == "llama3":
        low = rng.choice([0.5, 1.0])
        said |= {"low_freq_factor": low, "high_freq_factor": low * rng.choice([2.0, 4.0]), **original}
    elif kind == "longrope":
        pairs = (channels + 1) // 2
        for name in ("short_factor", "long_factor"):
            said[name] = [round(rng.uniform(0.5, 4), 2) for _ in range(pairs)]
        said |= original | sometimes(rng, 0.3, attention_factor=rng.choice([0.7, 1.6]))
        if rng.random() < 0.5:
            del said["factor"]
    elif kind == "yarn":
        said |= {
            **original,
            **sometimes(rng, 0.4, beta_fast=rng.choice([2.0, 8.0]), beta_slow=rng.choice([0.1, 0.5])),
            **sometimes(rng, 0.3, truncate=rng.random() < 0.5),
            **sometimes(rng, 0.3, attention_factor=rng.choice([0.7, 1.6])),
            **sometimes(rng, 0.3, mscale=rng.choice([0.7, 1.4]), mscale_all_dim=rng.choice([0.5, 1.0])),
        }
    return said


def rope(rng: random.Random, channels: int, share: Fields, *, family: str) -> Fields:
    """Rotary positions as newer or as older configs say them."""
    theta = rng.choice([10.0, 500.0, 1e4, 1e6])
    said = scaling(rng, channels, family) if rng.random() < 0.6 else {"rope_type": "default"}
    if rng.random() < 0.7:
        own = {"partial_rotary_factor": share["share"]} if share else {}
        return {"rope_parameters": said | own | sometimes(rng, 0.9, rope_theta=theta)}
    neox = family == "gpt_neox"
    old: Fields = {"rotary_emb_base" if neox else "rope_theta": theta}
    old |= {"rotary_pct": share["share"]} if share else {}
    if said["rope_type"] != "default":
        old["rope_scaling"] = said if rng.random() < 0.5 else {"type": said["rope_type"], **_without(said)}
    return old


def _without(said: Fields) -> Fields:
    return {name: value for name, value in said.items() if name != "rope_type"}


def phi3_rope(rng: random.Random, fields: Fields, width: int) -> Fields:
    share = rng.choice([1.0, 1.0, 0.5, 0.75])
    channels, theta = int(width * share), rng.choice([100.0, 1e4])
    said: Fields = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}
    if rng.random() < 0.5 and channels % 2 == 0:
        factors = {
            name: [round(rng.uniform(0.5, 4), 2) for _ in range(channels // 2)]
            for name in ("short_factor", "long_factor")
        }
        said |= factors | {"rope_type": "longrope"}
        said |= sometimes(rng, 0.3, attention_factor=1.3)
    # The whole config's, which comes before what rope_parameters say.
    return {"rope_parameters": said, "original_max_position_embeddings": rng.choice([4, 20])}


def gemma3_rope(rng: random.Random, width: int) -> Fields:
    layers = {"full_attention": 1e4, "sliding_attention": 100.0}
    kinds = {
        name: scaling(rng, width, "gemma3_text") if rng.random() < 0.5 else {"rope_type": "default"} for name in layers
    }
    if rng.random() < 0.3:  # as older configs have it
        linear = {"rope_type": "linear", "factor": 4.0}
        return {"rope_theta": 500.0, "rope_local_base_freq": 50.0} | sometimes(rng, 0.5, rope_scaling=linear)
    return {"rope_parameters": {name: kind | {"rope_theta": layers[name]} for name, kind in kinds.items()}}
