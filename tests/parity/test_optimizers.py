# torch and transformers are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import, missing-attribute]
"""Optimisers against torch's and transformers', and which weights are decayed against transformers' rule."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from rlhf_jax.interop import hf
from rlhf_jax.interop.families import FAMILIES, tensors_of
from rlhf_jax.runtime import optimizers
from rlhf_jax.runtime.optimizers import OptimizerConfig, make_optimizer, update
from tests.parity import checkpoints

STEPS, WARMUP, RATE, DECAY = 12, 3, 1e-2, 0.1
SHAPES = {"kernel": (5, 4), "bias": (4,)}
CONFIG = OptimizerConfig(
    learning_rate=RATE, schedule="linear", warmup_steps=WARMUP, weight_decay=DECAY, max_grad_norm=1.5
)


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def ours(config: OptimizerConfig) -> list[dict[str, np.ndarray]]:
    """Parameters after every update by the same gradients as `theirs`."""
    optimizer, params = make_optimizer(config, STEPS), {"policy": jax.tree.map(jnp.asarray, arrays(0))}
    state, seen = optimizer.init(params), []
    step = jax.jit(lambda grads, params, state: update(optimizer, grads, params, state, (), key=jax.random.key(0))[:2])
    for number in range(STEPS):
        params, state = step({"policy": gradient(number)}, params, state)
        seen.append(jax.device_get(params["policy"]))
    return seen


def gradient(number: int) -> dict[str, np.ndarray]:
    """Some within the bound on the norm, some beyond."""
    return {name: 0.3 * (1 + number % 4) * value for name, value in arrays(100 + number).items()}


def theirs(make, schedule) -> list[dict[str, np.ndarray]]:
    """A torch training loop: bound the norm, step the optimiser, step the schedule; biases are not decayed."""
    leaves = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in arrays(0).items()}
    optimizer = make(
        [
            {"params": [leaves["kernel"]], "weight_decay": DECAY},
            {"params": [leaves["bias"]], "weight_decay": 0.0},
        ]
    )
    rates, seen = schedule(optimizer), []
    for number in range(STEPS):
        for name, value in gradient(number).items():
            leaves[name].grad = torch.tensor(value)
        torch.nn.utils.clip_grad_norm_(list(leaves.values()), CONFIG.max_grad_norm)
        optimizer.step()
        rates.step()
        seen.append({name: leaf.detach().numpy().copy() for name, leaf in leaves.items()})
    return seen


linear = functools.partial(
    transformers.get_linear_schedule_with_warmup, num_warmup_steps=WARMUP, num_training_steps=STEPS
)
cosine = functools.partial(
    transformers.get_cosine_with_min_lr_schedule_with_warmup,
    num_warmup_steps=WARMUP,
    num_training_steps=STEPS,
    min_lr_rate=0.1,
)

CASES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "adamw": ({}, torch.optim.AdamW, linear),
    "adamw, other numbers": (
        {"b1": 0.8, "b2": 0.95, "epsilon": 1e-3},
        functools.partial(torch.optim.AdamW, betas=(0.8, 0.95), eps=1e-3),
        linear,
    ),
    "adamw, cosine to a tenth": ({"schedule": "cosine", "min_learning_rate": RATE / 10}, torch.optim.AdamW, cosine),
    "adam": ({"name": "adam"}, torch.optim.Adam, linear),
    "rmsprop": ({"name": "rmsprop"}, torch.optim.RMSprop, linear),
    "rmsprop, momentum": (
        {"name": "rmsprop", "momentum": 0.9, "b2": 0.9, "epsilon": 1e-2},
        functools.partial(torch.optim.RMSprop, momentum=0.9, alpha=0.9, eps=1e-2),
        linear,
    ),
    "sgd": ({"name": "sgd"}, torch.optim.SGD, linear),
    "sgd, momentum": ({"name": "sgd", "momentum": 0.9}, functools.partial(torch.optim.SGD, momentum=0.9), linear),
    "adafactor": (
        {"name": "adafactor"},
        functools.partial(transformers.Adafactor, scale_parameter=False, relative_step=False),
        linear,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_update_is_torchs(name, monkeypatch):
    """Rates, bounded gradients, decay that leaves biases out, and a dozen updates, to float32's rounding.

    transformers factors every matrix; optax those from 128 by 128 on, unless told.
    """
    changes, make, schedule = CASES[name]
    factor = functools.partial(optimizers.optax.scale_by_factored_rms, min_dim_size_to_factor=2)
    monkeypatch.setattr(optimizers.optax, "scale_by_factored_rms", factor)
    expected = theirs(functools.partial(make, lr=RATE), schedule)
    for mine, other in zip(ours(dataclasses.replace(CONFIG, **changes)), expected, strict=True):
        for leaf in SHAPES:
            np.testing.assert_allclose(mine[leaf], other[leaf], rtol=2e-5, atol=2e-6, err_msg=leaf)
    assert np.abs(expected[-1]["kernel"] - arrays(0)["kernel"]).max() > 5e-3


@pytest.mark.parametrize("name", checkpoints.SHAPES)
def test_what_is_decayed_is_what_transformers_decays(name):
    """`Trainer.get_decay_parameter_names`, of every family: a parameter is decayed where its tensor is."""
    made = checkpoints.make(name, Path(tempfile.mkdtemp()) / "model")
    rule: Any = transformers.Trainer.get_decay_parameter_names  # reads nothing of the trainer
    wanted = set(rule(None, made.model))
    params = hf.load_pretrained(str(made.directory)).params
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    decayed = optimizers.decayed(CONFIG.no_decay, params)
    mine = dict(zip(paths, jax.tree.leaves(decayed), strict=True))
    family = FAMILIES[made.model.config.model_type]
    layers = made.model.config.num_hidden_layers
    tensors = tensors_of(family, layers, paths)
    assert {part for tensor in tensors for part in tensor.parts} == set(paths)
    for tensor in tensors:
        name = tensor.name.replace("embed_out", "lm_head")  # GPT-NeoX's head is called so within transformers
        for part in tensor.parts:
            assert mine[part] == (name in wanted), name
    assert set(mine.values()) == {True, False}
