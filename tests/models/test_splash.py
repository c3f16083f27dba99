"""Splash attention, whose kernel a CPU interprets: the attention of XLA, without a mask of queries by slots on TPUs."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import attention
from rlhf_jax.models.attention import attend
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.splash import splash_attend
from rlhf_jax.runtime.programs import make_placement
from rlhf_jax.types import TokenBatch
from tests.support.networks import SUPPRESSED, VOCAB, config, random_params
from tests.support.programs import runtime

BATCH, LENGTH, HEADS, GROUPS, WIDTH = 2, 130, 4, 2, 16
SHAPE = config(n_heads=HEADS, n_kv_heads=GROUPS, d_model=32, windows=(None, 3))


@pytest.fixture(autouse=True)
def kernels_as_jax_wrote_them():
    """Let the kernel promote dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def on_cpu_as_on_tpu(monkeypatch):
    """Programs for CPUs take the branch of TPUs, with an interpreted kernel."""

    def branch(*args, default, tpu=None, **others):
        return (tpu or others.get("cpu") or default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", branch)
    monkeypatch.setattr(attention, "splash_attend", functools.partial(splash_attend, interpret=True))


def segments() -> np.ndarray:
    """Left and right padding, and three sequences in the second row."""
    found = np.zeros((BATCH, LENGTH), np.int32)
    found[0, :5], found[0, 100:] = -1, -1
    found[1, 40:90], found[1, 90:120], found[1, 120:] = 1, 2, -1
    return found


def visible_slots(window: int | None) -> np.ndarray:
    ids, places = segments(), np.arange(LENGTH)
    back = places[:, None] - places[None]
    mask = (back >= 0) & (back < (window or LENGTH))
    return mask & (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, None, :]


def inputs(dtype) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    shapes = (BATCH, LENGTH, HEADS, WIDTH), *[(BATCH, GROUPS, LENGTH, WIDTH)] * 2
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def with_gradients(function, args):
    """Outputs at tokens, and the gradients of a random projection of them."""
    weights = np.random.default_rng(1).normal(size=(BATCH, LENGTH, HEADS, WIDTH)) * (segments() >= 0)[..., None, None]

    def loss(*args):
        out = function(*args).astype(jnp.float32) * jnp.asarray(weights, jnp.float32)
        return jnp.sum(out), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*args)
    return [out, *grads]


@pytest.mark.parametrize(
    ("window", "softcap", "dtype", "tolerance"),
    [
        (None, None, jnp.float32, 2e-5),
        pytest.param(7, None, jnp.float32, 2e-5, marks=pytest.mark.nightly),
        pytest.param(None, 2.0, jnp.float32, 2e-5, marks=pytest.mark.nightly),
        pytest.param(None, None, jnp.bfloat16, 4e-2, marks=pytest.mark.nightly),
    ],
)
def test_values_and_gradients_are_those_of_xla(window, softcap, dtype, tolerance):
    args, options = inputs(dtype), {"scale": 0.3, "softcap": softcap, "window": window}
    splash = functools.partial(splash_attend, segments=jnp.asarray(segments()), interpret=True, **options)
    xla = functools.partial(attend, mask=jnp.asarray(visible_slots(window)), by="xla", **options)
    for found, expected in zip(with_gradients(splash, args), with_gradients(xla, args), strict=True):
        assert found.dtype == expected.dtype
        scale = float(jnp.abs(expected).max())
        np.testing.assert_allclose(
            found.astype(jnp.float32), expected.astype(jnp.float32), atol=tolerance * scale, rtol=tolerance
        )


def packed_batch(rows: int) -> TokenBatch[np.ndarray]:
    tokens = np.random.default_rng(0).integers(4, VOCAB, (rows, 12)).astype(np.int32)
    mask = np.arange(12) < np.random.default_rng(1).integers(3, 13, rows)[:, None]
    return TokenBatch(tokens, mask, mask & (np.arange(12) > 0))


def loss_of(shape: ModelConfig):
    network = PolicyNetwork(shape, VOCAB, SUPPRESSED)

    def loss(params, batch):
        stats = network.sequence_stats(params, batch)
        return jnp.sum(jnp.where(batch.loss_mask[:, 1:], stats.logprobs, 0)) / batch.tokens.shape[0]

    return network, jax.value_and_grad(loss)


def assert_close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4), found, expected)


@pytest.mark.nightly
@pytest.mark.usefixtures("on_cpu_as_on_tpu")
@pytest.mark.parametrize("remat", [False, True])
def test_seeds_and_devices_have_kernels_of_their_own(remat):
    """Parameters of two seeds, and rows and heads over fsdp = 2 x tensor = 2 devices."""
    network, expected_of = loss_of(SHAPE)
    _, gradient = loss_of(dataclasses.replace(SHAPE, attention="splash", remat=remat))
    params, batch = random_params(network), packed_batch(4)
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.9 * leaf]), params)

    def step(state, frozen, batch, run_key):
        loss, grads = gradient(state, batch)
        return grads, {"loss": loss}, ()

    placement = make_placement(runtime("jit", data=1, fsdp=2, tensor=2), seeds=2)
    state = placement.put_state(two)
    batches = jax.tree.map(lambda leaf: np.stack([leaf, leaf])[None], batch)
    grads, metrics, _ = placement.compile(step, state)(state, (), batches, jax.random.split(jax.random.key(0)))
    for seed in range(2):
        own = jax.tree.map(lambda leaf, k=seed: leaf[k], two)
        found = metrics["loss"][0, seed], jax.tree.map(lambda leaf, k=seed: leaf[k], grads)
        assert_close(jax.device_get(found), jax.jit(expected_of)(own, batch))


def lowered(by: str, platform: str) -> str:
    network, gradient = loss_of(config(attention=by, n_layers=1))
    params = jax.eval_shape(network.init, jax.random.key(0))
    batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, 384, *leaf.shape[2:]), leaf.dtype), packed_batch(2))
    return jax.jit(gradient).trace(params, batch).lower(lowering_platforms=(platform,)).as_text()


def test_programs_for_tpus_have_kernels_and_compute_no_logits_of_queries_by_slots():
    pattern = re.compile(r"dot_general.*x384x384xf32>\n")
    assert len(re.findall("tpu_custom_call", lowered("splash", "tpu"))) >= 3  # forward, and two of the gradient
    assert pattern.search(lowered("xla", "tpu")) and not pattern.search(lowered("splash", "tpu"))
    assert "tpu_custom_call" not in lowered("splash", "cpu")
