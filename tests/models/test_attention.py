"""Attention by cuDNN, lowered for a GPU where there is none: what we ask of it is what jax takes, and it is used."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from rlhf_jax.models.attention import attend, cudnn_takes
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.types import TokenBatch
from tests.support.networks import SUPPRESSED, VOCAB, config

SHAPE = functools.partial(config, attention="cudnn", compute_dtype="bfloat16")
KERNEL = "__cudnn$fmha"


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says that it has cuDNN 9.10; nothing can be run on it."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    with jax.numpy_dtype_promotion("standard"):  # of jax's own attention
        yield


def lowered(function, *args, platform: str = "cuda") -> str:
    return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def inputs(queries: int, slots: int, width: int, dtype=jnp.bfloat16) -> list[jax.ShapeDtypeStruct]:
    q, k, v = ((2, queries, 4, width), (2, 2, slots, width), (2, 2, slots, width))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in (q, k, v)]
    return [*arrays, jax.ShapeDtypeStruct((2, queries, slots), jnp.bool_)]


def taken_by_jax(*args) -> bool:
    """Return whether jax's cuDNN attention has a gradient for such inputs."""

    def loss(q, k, v, mask):
        k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
        out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=1.0, implementation="cudnn")
        return jnp.sum(out.astype(jnp.float32))

    try:
        return KERNEL in lowered(jax.grad(loss, (0, 1, 2)), *args)
    except (NotImplementedError, ValueError):
        return False


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("queries", "slots"), [(16, 16), (4, 8), (15, 16), (16, 15), (15, 15), (1, 1)])
def test_lengths_go_to_cudnn_where_it_has_a_gradient_for_them(queries, slots):
    def loss(q, k, v, mask):
        return jnp.sum(attend(q, k, v, mask, scale=1.0, softcap=None, by="cudnn").astype(jnp.float32))

    args = inputs(queries, slots, 8)
    assert cudnn_takes(queries, slots) == taken_by_jax(*args)
    assert (KERNEL in lowered(jax.grad(loss, (0, 1, 2)), *args)) == cudnn_takes(queries, slots)


@pytest.mark.usefixtures("gpu")
def test_the_limits_of_shapes_are_those_of_jax(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)  # Hopper's, and later
    for width, dtype in [(8, "bfloat16"), (256, "float16"), (12, "bfloat16"), (264, "bfloat16"), (8, "float32")]:
        try:
            SHAPE(head_dim=width, compute_dtype=dtype)
            taken = True
        except ValueError as error:
            assert "attention = 'cudnn' does not support" in str(error) and "set attention to 'xla'" in str(error)
            taken = False
        assert taken == taken_by_jax(*inputs(4, 4, width, jnp.dtype(dtype))), (width, dtype)
    with pytest.raises(ValueError, match=r"does not support attention_softcap = 50.0"):
        SHAPE(attention_softcap=50.0)


@pytest.mark.usefixtures("gpu")
def test_training_prefill_and_decoding_use_it():
    network = PolicyNetwork(SHAPE(n_layers=1, remat=True), VOCAB, SUPPRESSED)
    params = jax.eval_shape(network.init, jax.eval_shape(lambda: jax.random.key(0)))
    tokens, mask = jax.ShapeDtypeStruct((2, 6), jnp.int32), jax.ShapeDtypeStruct((2, 6), jnp.bool_)

    def loss(params, tokens, mask):
        return jnp.sum(network.sequence_stats(params, TokenBatch(tokens, mask, mask)).logprobs)

    assert KERNEL + "ScaleBiasSoftmaxBackward" in lowered(jax.grad(loss), params, tokens, mask)
    start = functools.partial(network.start, slots=9)
    assert KERNEL not in lowered(start, params, tokens, mask)  # 9 slots
    start = functools.partial(network.start, slots=8)
    assert KERNEL in lowered(start, params, tokens, mask)
    _, cache = jax.eval_shape(start, params, tokens, mask)
    assert KERNEL in lowered(
        functools.partial(network.step, slot=6), params, jax.ShapeDtypeStruct((2,), jnp.int32), cache
    )


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_programs_for_other_devices_do_without_it(platform):
    def loss(q, k, v, mask, by):
        return jnp.sum(attend(q, k, v, mask, scale=1.0, softcap=None, by=by).astype(jnp.float32))

    def text(by, on):
        return lowered(jax.grad(functools.partial(loss, by=by), (0, 1, 2)), *inputs(16, 16, 8), platform=on)

    assert KERNEL in text("cudnn", "cuda")
    assert KERNEL not in text("cudnn", platform)
    assert text("cudnn", platform).count("dot_general") == text("xla", platform).count("dot_general") > 0
