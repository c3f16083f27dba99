"""Hand-written gradients of layers against automatic differentiation of the plain formulas, in float64 and bfloat16."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.attention import attend
from rlhf_jax.models.linear import dot_general
from rlhf_jax.models.norms import rms_norm
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.rotary import rotate
from rlhf_jax.types import TokenBatch
from tests.support import networks

BATCH, QUERIES, SLOTS, HEADS, WIDTH = 3, 4, 6, 4, 8


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def plain_attention(q, k, v, mask, *, scale, softcap):
    """Softmax attention, one query head at a time."""
    shared = q.shape[2] // k.shape[1]
    heads = []
    for head in range(q.shape[2]):
        keys, values = k[:, head // shared], v[:, head // shared]
        logits = jnp.einsum("bsk,bck->bsc", q[:, :, head], keys) * scale
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        weights = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1)
        heads.append(jnp.einsum("bsc,bck->bsk", weights, values))
    return jnp.stack(heads, axis=2)


def windowed(window: int) -> jax.Array:
    """Mask of a window that ends at the query's own slot, one of the last; slot 2 of the first row is empty."""
    back = SLOTS - QUERIES + np.arange(QUERIES)[:, None] - np.arange(SLOTS)
    mask = np.repeat(((back >= 0) & (back < window))[None], BATCH, axis=0)
    mask[0, :, 2] = False
    return jnp.asarray(mask)


def gradients(function, *inputs):
    """Values, and the gradient of their sum with random weights."""
    weights = draw(*jax.eval_shape(function, *inputs).shape, seed=9)

    def loss(*inputs):
        out = function(*inputs)
        return jnp.sum(out * weights.astype(out.dtype)), out

    return jax.jit(jax.grad(loss, argnums=tuple(range(len(inputs))), has_aux=True))(*inputs)


def assert_close(got, expected, tolerance):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        scale = np.abs(np.asarray(other, np.float64)).max()
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=0, atol=tolerance * scale)


def attention_inputs(kv_heads: int, dtype) -> list:
    shapes = (BATCH, QUERIES, HEADS, WIDTH), (BATCH, kv_heads, SLOTS, WIDTH), (BATCH, kv_heads, SLOTS, WIDTH)
    return [jnp.asarray(draw(*shape, seed=i), dtype) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [SLOTS, 2])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_equals_the_plain_formula_in_float64(kv_heads, window, softcap):
    with jax.enable_x64(True):
        inputs = attention_inputs(kv_heads, jnp.float64)
        options = {"scale": 0.3, "softcap": softcap}
        mask = windowed(window)
        got = gradients(functools.partial(attend, mask=mask, **options, by="xla"), *inputs)
        expected = gradients(functools.partial(plain_attention, mask=mask, **options), *inputs)
        assert_close(got, expected, 1e-13)
        assert got[1].dtype == jnp.float64


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_attention_is_as_precise_as_its_dtype(dtype, tolerance):
    inputs = attention_inputs(2, dtype)
    options = {"scale": WIDTH**-0.5, "softcap": None}
    got = gradients(functools.partial(attend, mask=windowed(SLOTS), **options, by="xla"), *inputs)
    wide = [x.astype(jnp.float32) for x in inputs]
    expected = gradients(functools.partial(plain_attention, mask=windowed(SLOTS), **options), *wide)
    assert_close(got, jax.tree.map(lambda x: x.astype(dtype), expected), tolerance)


def test_queries_that_see_nothing_get_zeros_and_give_no_gradient():
    inputs = attention_inputs(2, jnp.float32)
    mask = windowed(SLOTS).at[1, 2].set(False)
    function = functools.partial(attend, mask=mask, scale=1.0, softcap=None, by="xla")
    (d_q, d_k, _), out = gradients(function, *inputs)
    assert np.all(out[1, 2] == 0) and np.all(d_q[1, 2] == 0)
    assert np.all(np.isfinite(d_k)) and np.all(np.any(d_q[1, [0, 1, 3]] != 0, axis=-1))


def test_attention_of_stacked_seeds_is_that_of_each():
    inputs = [jnp.stack([x, 2 * x]) for x in attention_inputs(2, jnp.float32)]
    function = functools.partial(attend, mask=windowed(SLOTS), scale=0.5, softcap=None, by="xla")
    both = gradients(jax.vmap(function), *inputs)
    weights = draw(*both[1].shape, seed=9)
    for seed in range(2):
        _, pull = jax.vjp(function, *(x[seed] for x in inputs))
        expected = pull(jnp.asarray(weights[seed], jnp.float32)), function(*(x[seed] for x in inputs))
        assert_close(jax.tree.map(lambda leaf, seed=seed: leaf[seed], both), expected, 1e-6)


def test_attention_keeps_one_matrix_of_weights_for_the_gradient():
    """A soft cap keeps a second one; automatic differentiation keeps three or four."""

    def matrices(softcap: float | None) -> int:
        function = functools.partial(attend, mask=windowed(SLOTS), scale=0.5, softcap=softcap, by="xla")
        pullback = jax.eval_shape(lambda *qkv: jax.vjp(function, *qkv)[1], *attention_inputs(HEADS, jnp.float32))
        weights = BATCH * HEADS * QUERIES * SLOTS
        return sum(leaf.size == weights for leaf in jax.tree.leaves(pullback))

    assert matrices(None) == 1 and matrices(1.5) == 2


@pytest.mark.parametrize("channels", [WIDTH, WIDTH // 2])
def test_rotation_equals_automatic_differentiation(channels):
    with jax.enable_x64(True):
        x, angles = (jnp.asarray(draw(BATCH, QUERIES, *rest)) for rest in ((HEADS, WIDTH), (channels // 2,)))
        sin, cos = jnp.sin(angles), jnp.cos(angles)

        def turned(x):
            turns = jax.lax.complex(x[..., : channels // 2], x[..., channels // 2 : channels])
            turns = turns * jax.lax.complex(cos, sin)[:, :, None]
            return jnp.concatenate([turns.real, turns.imag, x[..., channels:]], axis=-1)

        assert_close(gradients(lambda x: rotate(x, sin, cos), x), gradients(turned, x), 1e-14)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Dense(7), (2, 3, 5)),
        (nn.Dense(7, use_bias=False), (5,)),
        (nn.DenseGeneral((2, 7)), (2, 3, 5)),
        (nn.DenseGeneral(7, axis=(-2, -1)), (2, 3, 5, 4)),
    ],
    ids=str,
)
def test_linear_layers_equal_those_of_flax(layer, shape):
    with jax.enable_x64(True):
        x = jnp.asarray(draw(*shape))
        ours = layer.clone(dot_general=dot_general, dtype=jnp.float64, param_dtype=jnp.float64)
        flax = layer.clone(dtype=jnp.float64, param_dtype=jnp.float64)
        params = flax.init(jax.random.key(0), x)
        assert_close(gradients(ours.apply, params, x), gradients(flax.apply, params, x), 1e-14)


def plain_norm(x, scale, *, epsilon):
    return x / jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon) * scale


@pytest.mark.parametrize("shape", [(5, WIDTH), (BATCH, QUERIES, HEADS, WIDTH)])
def test_norms_equal_automatic_differentiation(shape):
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        inputs = jnp.asarray(draw(*shape)), jnp.asarray(draw(WIDTH))
        got, expected = (gradients(functools.partial(norm, epsilon=0.1), *inputs) for norm in (rms_norm, plain_norm))
        assert_close(got, expected, 1e-14)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "relu2", "gelu", "gelu_exact", "silu"])
def test_the_mlp_keeps_the_inputs_and_the_product_of_its_activation_alone(activation, gated):
    """The gradient recomputes the activation, so that it needs neither its value nor its derivative."""
    d_ff = 29
    network = PolicyNetwork(
        networks.config(activation=activation, gated=gated, d_ff=d_ff, n_layers=1), networks.VOCAB, ()
    )
    tokens, mask = jnp.ones((2, 3), jnp.int32), jnp.ones((2, 3), bool)

    def loss(params):
        return jnp.sum(network.sequence_stats(params, TokenBatch(tokens, mask, mask)).logprobs)

    params = jax.eval_shape(network.init, jax.random.key(0))
    pullback = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pullback) if leaf.shape[-1:] == (d_ff,) and leaf.ndim != 1)
    kernels = (2 if gated else 1) * networks.CONFIG.d_model * d_ff
    assert kept == kernels + (3 if gated else 2) * tokens.size * d_ff


def test_sines_are_computed_once_for_all_layers():
    """XLA fuses sines into every rotation of every layer and head, unless `rope_angles` gives it reason not to."""

    def sines(n_layers: int) -> int:
        network = PolicyNetwork(networks.config(n_layers=n_layers), networks.VOCAB, ())
        tokens, mask = jnp.ones((2, 3), jnp.int32), jnp.ones((2, 3), bool)

        def loss(params):
            return jnp.sum(network.sequence_stats(params, TokenBatch(tokens, mask, mask)).logprobs)

        params = jax.eval_shape(network.init, jax.random.key(0))
        return (jax.jit(jax.grad(loss)).lower(params).compile().as_text() or "").count(" sine(")

    assert 1 <= sines(2) == sines(1)
