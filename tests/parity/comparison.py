# torch and transformers are in .venv-parity only, where types are not checked.
# pyrefly: ignore-errors[missing-import, missing-attribute]
"""One checkpoint here and in transformers: logits, gradients, padding, a cache that is decoded and one that goes on."""

import copy
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

from rlhf_jax.interop import hf
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.types import RlhfError
from tests.parity.random_configs import LENGTH

ROWS, PROMPT, MORE = 3, 8, 5
WHOLE = ("logits", "gradients", "padded logits", "padded gradients")
CACHED = ("cached", "continued")
TOLERANCE = 1e-4
"""Tolerances relative to the largest logit, and to the largest entry of a parameter's gradient."""


def make(family: str, fields: dict[str, Any], directory: Path) -> Any:
    """A random model of transformers, saved beside the config as it was given, not as transformers completes it.

    Its weights are large enough that every part of the network matters.
    """
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **copy.deepcopy(fields))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.eval().save_pretrained(directory)
    given = {"model_type": family, "architectures": [type(model).__name__], **fields}
    (directory / "config.json").write_text(json.dumps(given))
    return model


def differences(
    family: str, fields: dict[str, Any], checks: tuple[str, ...] = WHOLE + CACHED
) -> dict[str, float] | str:
    """The greatest difference of each check, as a share of what it is compared with; or why the config is refused.

    With `CACHED` comes "transformers' cache", how far transformers with a cache is from transformers without; infinite
    where its cache fails.
    """
    torch.set_num_threads(1)  # more of them cost more than so small a model takes
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "model"
        model = make(family, fields, directory)
        try:
            pretrained = hf.load_pretrained(str(directory))
            found = _whole(model, pretrained, Path(place)) if WHOLE[0] in checks else {}
            return found | (_through_a_cache(model, pretrained) if CACHED[0] in checks else {})
        except RlhfError as error:
            return str(error).removeprefix(f"{directory / 'config.json'}: ")


def _tokens(pretrained: hf.Checkpoint) -> np.ndarray:
    return np.random.default_rng(0).integers(3, pretrained.vocab_size, (ROWS, LENGTH)).astype(np.int32)  # none special


def _whole(model: Any, pretrained: hf.Checkpoint, place: Path) -> dict[str, float]:
    """Sequences in one pass, without and with padding."""
    ids, rng, vocabulary = _tokens(pretrained), np.random.default_rng(1), pretrained.vocab_size
    weights = rng.normal(size=(ROWS, LENGTH, vocabulary)).astype(np.float32) / ids.size / vocabulary
    everything = np.ones(ids.shape, bool)
    padded = np.ones(ids.shape, bool)
    padded[0, :5] = padded[1, 9:] = padded[2, :2] = padded[2, 13:] = False  # before, after, and on both sides

    run = jax.jit(functools.partial(_logits_and_gradients, pretrained))
    found = {}
    for name, mask in (("", everything), ("padded ", padded)):
        masked = weights * mask[..., None]
        (_, logits), grads = run(pretrained.params, ids, mask, masked)
        expected = _theirs(model, ids, mask)
        model.zero_grad()
        (expected * torch.as_tensor(masked)).sum().backward()
        theirs = expected.detach().numpy()
        found[f"{name}logits"] = _apart(np.asarray(logits)[mask], theirs[mask])
        directory = place / f"{name}grads"
        hf.save_pretrained(directory, "policy", grads, pretrained.hf_config)
        found[f"{name}gradients"] = _gradients_apart(load_file(directory / "model.safetensors"), model)
    return found


def _logits_and_gradients(pretrained: hf.Checkpoint, params: Any, ids: Any, mask: Any, weights: Any) -> Any:
    network = hf.network_of(pretrained)

    def loss(params: Any) -> tuple:
        hidden = Transformer(pretrained.config, pretrained.vocab_size).apply({"params": params}, ids, mask)
        logits = network.logits(params, hidden.reshape(-1, hidden.shape[-1])).reshape(*ids.shape, -1)
        return jnp.sum(jnp.where(mask[..., None], logits, 0) * weights), logits

    return jax.value_and_grad(loss, has_aux=True)(params)


def _theirs(model: Any, ids: np.ndarray, mask: np.ndarray, cache: Any = None, seen: np.ndarray | None = None) -> Any:
    """Logits of transformers, each token at its position among those that are no padding."""
    whole = mask if seen is None else np.concatenate([seen, mask], axis=1)
    positions = np.maximum(whole.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
    return model(
        torch.tensor(ids, dtype=torch.long),
        attention_mask=torch.tensor(whole, dtype=torch.long),
        position_ids=torch.tensor(positions, dtype=torch.long),
        past_key_values=cache,
        use_cache=cache is not None,
    ).logits


def _through_a_cache(model: Any, pretrained: hf.Checkpoint) -> dict[str, float]:
    """Left-padded prompts, several more tokens in one pass, then one at a time: beside transformers in one pass.

    transformers with a cache is compared with itself in one pass too: it keeps the last `sliding_window` tokens even
    where the model (a Llama, a GPT-2) does not read that field.
    """
    ids = _tokens(pretrained)
    network, params = hf.network_of(pretrained), pretrained.params
    start, step, extend = jax.jit(network.start, static_argnums=3), jax.jit(network.step), jax.jit(network.extend)
    seen = np.ones((ROWS, LENGTH), bool)
    seen[0, :3] = seen[2, :1] = False
    ends = [PROMPT, PROMPT + MORE, *range(PROMPT + MORE + 1, LENGTH + 1)]
    with torch.no_grad():
        expected = _theirs(model, ids, seen)[:, [end - 1 for end in ends]].numpy().swapaxes(0, 1)
        theirs = _with_their_cache(model, ids, seen, ends)
    logits, ours = start(params, ids[:, :PROMPT], seen[:, :PROMPT], LENGTH)
    got = [logits]
    logits, ours = extend(params, ids[:, PROMPT : ends[1]], np.ones((ROWS, MORE), bool), ours, PROMPT)
    got.append(logits)
    for slot in range(ends[1], LENGTH):
        logits, ours = step(params, ids[:, slot], ours, slot)
        got.append(logits)
    return {
        "cached": _apart(np.stack([got[0], *got[2:]]), np.delete(expected, 1, axis=0)),
        "continued": _apart(np.asarray(got[1]), expected[1]),
        "transformers' cache": float("inf") if theirs is None else _apart(theirs, expected),
    }


def _with_their_cache(model: Any, ids: np.ndarray, seen: np.ndarray, ends: list[int]) -> np.ndarray | None:
    """Logits of transformers with its own cache, or None where that cannot take these tokens."""
    cache, found, begin = transformers.DynamicCache(config=model.config), [], 0
    for end in ends:
        part = slice(begin, end)
        try:
            found.append(_theirs(model, ids[:, part], seen[:, part], cache, seen[:, :begin])[:, -1].numpy())
        except RuntimeError as error:  # a mask for the whole cache, of which a layer with a window kept a part
            if "must match the size of tensor" not in str(error):
                raise
            return None
        begin = end
    return np.stack(found)


def _apart(got: np.ndarray, expected: np.ndarray) -> float:
    """The greatest difference, as a share of the greatest value."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def _gradients_apart(ours: dict[str, np.ndarray], model: Any) -> float:
    """The worst of all parameters, each as a share of its own greatest entry or of a hundredth of all parameters'."""
    renamed = {"embed_out.weight": "lm_head.weight"}
    ours = {renamed.get(name, name): grad for name, grad in ours.items()}
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    least = 0.01 * max(np.abs(grad).max() for grad in theirs.values())
    return max(float(np.abs(ours[n] - g).max() / max(np.abs(g).max(), least)) for n, g in theirs.items())
