"""The head's statistics, and its backward pass written by hand, against core's functions of the whole logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from rlhf_jax.core import logprobs as core
from rlhf_jax.core.row_sharding import ROWS
from rlhf_jax.models import head
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.runtime import program_costs
from rlhf_jax.runtime.programs import make_placement
from tests.support import networks
from tests.support.layouts import DEVICES, LAYOUTS

BATCH, LENGTH, WIDTH, VOCAB = 3, 5, 6, 11
ALLOWED = np.ones(VOCAB, bool)
ALLOWED[[0, 4, VOCAB - 1]] = False
SLICES = {"one": BATCH * LENGTH * VOCAB, "three, the last one smaller": BATCH * 2 * VOCAB, "one a position": 1}


def draw(seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    hidden, embedding = rng.normal(size=(BATCH, LENGTH, WIDTH)), scale * rng.normal(size=(VOCAB, WIDTH))
    tokens = rng.permuted(np.resize(np.arange(VOCAB), (BATCH, LENGTH)).ravel()).reshape(BATCH, LENGTH)
    return jnp.asarray(hidden, jnp.float32), jnp.asarray(embedding, jnp.float32), jnp.asarray(tokens, jnp.int32)


HIDDEN, EMBEDDING, TOKENS = draw(0)


def ours(hidden, embedding, tokens=TOKENS, *, temperature, softcap=None):
    return head.token_stats(hidden, embedding, jnp.asarray(ALLOWED), tokens, temperature=temperature, softcap=softcap)


def whole(hidden, embedding, tokens=TOKENS, *, temperature, softcap=None):
    """The same of the logits of the allowed tokens alone, all at one time, without a rule for the derivative."""
    logits = jnp.einsum("btd,vd->btv", hidden, embedding[ALLOWED])
    logits = (logits if softcap is None else softcap * jnp.tanh(logits / softcap)) / temperature
    names = jnp.asarray(np.cumsum(ALLOWED, dtype=np.int32) - 1)[tokens]
    emitted = jnp.asarray(ALLOWED)[tokens]
    logprobs = jnp.where(emitted, core.token_logprobs(logits, jnp.where(emitted, names, 0)), 0)
    correct = emitted & (jnp.argmax(logits, axis=-1).astype(jnp.int32) == names)
    squares = jnp.log(jnp.sum(jnp.square(jax.nn.softmax(logits)), axis=-1))
    without_gradient = map(jax.lax.stop_gradient, (core.entropy(logits), jnp.where(emitted, squares, 0)))
    entropy, log_sum_sq_probs = without_gradient
    return head.TokenStats(logprobs, entropy, correct, log_sum_sq_probs)


def pulled_back(function, temperature, wrap=lambda f: f, softcap=None):
    """Statistics, and gradients of all of their float parts with random weights."""
    weights = np.random.default_rng(1).normal(size=(2, BATCH, LENGTH)).astype(np.float32)

    def evaluate(hidden, embedding):
        def loss(hidden, embedding):
            stats = wrap(functools.partial(function, temperature=temperature, softcap=softcap))(hidden, embedding)
            return jnp.sum(stats.logprobs * weights[0] + (stats.entropy + stats.log_sum_sq_probs) * weights[1]), stats

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(hidden, embedding)

    return evaluate


@functools.cache  # one compilation for all tests
def exact(temperature):
    return jax.jit(pulled_back(whole, temperature))


def assert_all_close(got, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected)


@pytest.mark.parametrize("temperature", [0.7, 2.5])
@pytest.mark.parametrize("size", SLICES.values(), ids=SLICES)
def test_equals_core_in_values_and_gradients(monkeypatch, size, temperature):
    monkeypatch.setattr(head, "LOGIT_SLICE", size)
    expected = exact(temperature)(HIDDEN, EMBEDDING)
    assert 0 < np.mean(expected[1].correct) < 1
    got = jax.jit(pulled_back(ours, temperature))(HIDDEN, EMBEDDING)
    assert_all_close(got, expected)
    np.testing.assert_array_equal(got[1].correct, expected[1].correct)
    (d_hidden, d_embedding), _ = got
    assert d_hidden.dtype == HIDDEN.dtype and d_embedding.shape == EMBEDDING.shape


@pytest.mark.parametrize("temperature", [0.7, 2.5])
def test_capped_logits_equal_core_in_values_and_gradients(temperature):
    hidden, embedding, _ = draw(5, 3.0)
    expected = jax.jit(pulled_back(whole, temperature, softcap=2.0))(hidden, embedding)
    assert_all_close(jax.jit(pulled_back(ours, temperature, softcap=2.0))(hidden, embedding), expected)


@pytest.mark.parametrize("size", [BATCH * LENGTH * VOCAB, BATCH * 2 * VOCAB], ids=["one slice", "several"])
def test_backward_pass_is_the_derivative_of_the_forward_pass(monkeypatch, size):
    monkeypatch.setattr(head, "LOGIT_SLICE", size)
    logprobs = jax.jit(lambda hidden, embedding: ours(hidden, embedding, temperature=0.6).logprobs)
    check_grads(logprobs, (HIDDEN, EMBEDDING), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("size", [BATCH * LENGTH * VOCAB, BATCH * 2 * VOCAB], ids=["one slice", "several"])
@pytest.mark.parametrize("wrap", [jax.checkpoint, lambda f: jax.checkpoint(jax.jit(f))], ids=["checkpoint", "both"])
def test_gradients_survive_checkpoint_and_jit(monkeypatch, size, wrap):
    monkeypatch.setattr(head, "LOGIT_SLICE", size)
    expected = exact(0.7)(HIDDEN, EMBEDDING)
    assert_all_close(jax.jit(pulled_back(ours, 0.7, wrap))(HIDDEN, EMBEDDING), expected)


@pytest.mark.parametrize("size", [BATCH * LENGTH * VOCAB, BATCH * 2 * VOCAB], ids=["one slice", "several"])
@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0)], ids=str)
def test_vmap_gives_each_its_own(monkeypatch, size, axes):
    monkeypatch.setattr(head, "LOGIT_SLICE", size)
    pairs = zip(draw(2)[:2], draw(3)[:2], strict=True)
    arrays = [jnp.stack(pair) if axis == 0 else pair[0] for pair, axis in zip(pairs, axes, strict=True)]
    got = jax.jit(jax.vmap(pulled_back(ours, 0.7), in_axes=axes))(*arrays)
    for i in range(2):
        own = [array if axis is None else array[i] for array, axis in zip(arrays, axes, strict=True)]
        assert_all_close(jax.tree.map(lambda leaf, i=i: leaf[i], got), exact(0.7)(*own))


@pytest.mark.parametrize("temperature, softcap", [(0.7, None), (2.5, 2.0)], ids=str)
def test_entropy_has_its_own_gradient_where_it_is_asked_for(monkeypatch, temperature, softcap):
    monkeypatch.setattr(head, "LOGIT_SLICE", BATCH * 2 * VOCAB)

    def asked(hidden, embedding, tokens=TOKENS, *, temperature, softcap):
        allowed = jnp.asarray(ALLOWED)
        return head.token_stats_with_entropy(
            hidden, embedding, allowed, tokens, temperature=temperature, softcap=softcap
        )

    def whole_entropy(hidden, embedding, *, temperature, softcap):
        logits = jnp.einsum("btd,vd->btv", hidden, embedding[ALLOWED])
        logits = (logits if softcap is None else softcap * jnp.tanh(logits / softcap)) / temperature
        stats = whole(hidden, embedding, temperature=temperature, softcap=softcap)
        return stats._replace(entropy=core.entropy(logits))

    expected = jax.jit(pulled_back(whole_entropy, temperature, softcap=softcap))(HIDDEN, EMBEDDING)
    assert_all_close(jax.jit(pulled_back(asked, temperature, softcap=softcap))(HIDDEN, EMBEDDING), expected)


def test_entropy_and_squares_carry_no_gradient():
    def others(*x):
        stats = ours(*x, temperature=0.7)
        return jnp.sum(stats.entropy + stats.log_sum_sq_probs)

    grads = jax.jit(jax.grad(others, argnums=(0, 1)))(HIDDEN, EMBEDDING)
    assert not any(np.any(grad) for grad in grads)


# At 0.3 what is ruled out would, divided, be minus infinity.
@pytest.mark.parametrize("temperature", [1.0, 0.3, 1e-3])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30], ids=str)
def test_suppressed_tokens_count_for_nothing_and_all_is_finite(temperature, scale):
    hidden, embedding, _ = draw(4, scale)
    only = jnp.where(jnp.asarray(ALLOWED)[TOKENS], 0, TOKENS)  # suppressed tokens, and token 0 for all others

    def loss(hidden, embedding, tokens):
        stats = ours(hidden, embedding, tokens, temperature=temperature)
        return jnp.sum(stats.logprobs), stats

    (_, stats), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, embedding, TOKENS)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((stats.logprobs, stats.entropy, grads)))
    assert not np.any(stats.logprobs[~ALLOWED[TOKENS]]) and not np.any(stats.correct[~ALLOWED[TOKENS]])
    assert np.all(stats.entropy >= 0) and np.all(stats.entropy <= np.log(ALLOWED.sum()) + 1e-6)
    assert not np.any(grads[1][~ALLOWED])
    assert not np.any(grads[0][~ALLOWED[TOKENS]])

    (_, stats), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, embedding, only)
    assert not np.any(stats.logprobs) and not np.any(stats.correct)
    assert not any(np.any(grad) for grad in grads)


@pytest.mark.parametrize("scale", [1e4, -1e4, -1e30])
def test_suppressed_tokens_have_probability_0_however_low_all_others_are(scale):
    hidden, embedding = scale * jnp.abs(HIDDEN), jnp.abs(EMBEDDING)
    logits = head.logits(hidden, embedding, jnp.asarray(ALLOWED), softcap=None)
    assert logits.dtype == jnp.float32 and np.all(np.isfinite(logits))
    assert not np.any(jax.nn.softmax(logits)[..., ~ALLOWED])
    np.testing.assert_allclose(logits[..., ALLOWED], np.asarray(hidden) @ np.asarray(embedding)[ALLOWED].T, rtol=1e-4)


def test_bfloat16_is_reduced_in_float32_and_gets_its_gradients_in_bfloat16():
    low = HIDDEN.astype(jnp.bfloat16), EMBEDDING.astype(jnp.bfloat16)
    (d_hidden, d_embedding), stats = pulled_back(ours, 0.7)(*low)
    assert stats.logprobs.dtype == stats.entropy.dtype == jnp.float32
    assert d_hidden.dtype == d_embedding.dtype == jnp.bfloat16
    expected_grads, expected = exact(0.7)(*(x.astype(jnp.float32) for x in low))
    assert_all_close(stats, expected)
    got_grads = [grad.astype(jnp.float32) for grad in (d_hidden, d_embedding)]
    assert_all_close(got_grads, list(expected_grads), tolerance=0.05)


@pytest.mark.parametrize("count", [1, 16, 256])
def test_the_heads_gradient_is_summed_in_float32_over_slices(monkeypatch, count):
    rows, length, vocab = 2, 256, 40
    config = networks.config(compute_dtype="bfloat16", d_model=WIDTH, n_heads=1)
    network = PolicyNetwork(config, vocab, ())
    rng = np.random.default_rng(6)
    hidden = jnp.asarray(1 + rng.normal(size=(rows, length, WIDTH)), jnp.bfloat16)
    embedding = jnp.asarray(rng.normal(size=(vocab, WIDTH)), jnp.bfloat16).astype(jnp.float32)
    tokens = jnp.asarray(rng.integers(0, vocab, (rows, length)), jnp.int32)

    def loss(embedding, network, hidden):
        return jnp.sum(network.hidden_stats({"embedding": embedding}, hidden, tokens, temperature=1.0).logprobs)

    exact = PolicyNetwork(dataclasses.replace(config, compute_dtype="float32"), vocab, ())
    expected = jax.jit(jax.grad(loss), static_argnums=1)(embedding, exact, hidden.astype(jnp.float32))
    monkeypatch.setattr(head, "LOGIT_SLICE", rows * length * vocab // count)
    got = jax.jit(jax.grad(loss), static_argnums=1)(embedding, network, hidden)
    assert got.dtype == jnp.float32
    assert np.linalg.norm(got - expected) < 1e-3 * np.linalg.norm(expected)


def test_no_more_than_one_slice_of_logits_exists_or_is_kept(monkeypatch):
    monkeypatch.setattr(head, "LOGIT_SLICE", BATCH * 2 * VOCAB)
    evaluate = functools.partial(ours, temperature=1.0)
    jaxpr = jax.make_jaxpr(evaluate)(HIDDEN, EMBEDDING).jaxpr
    shapes = [variable.aval.shape for equation in equations(jaxpr) for variable in equation.outvars]
    sizes = [np.prod(shape) for shape in shapes if VOCAB in shape]
    assert max(sizes) == BATCH * 2 * VOCAB
    pullback = jax.eval_shape(lambda *x: jax.vjp(lambda *x: evaluate(*x).logprobs, *x)[1], HIDDEN, EMBEDDING)
    assert all(leaf.shape[2:] != (VOCAB,) for leaf in jax.tree.leaves(pullback))


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("of_logits", [head.token_stats, head.token_stats_with_entropy])
def test_greedy_decoding_has_no_log_probabilities(of_logits):
    with pytest.raises(ValueError, match=r"temperature = 0\.0 must be above 0"):
        of_logits(HIDDEN, EMBEDDING, jnp.asarray(ALLOWED), TOKENS, temperature=0.0, softcap=None)


def test_slices_gather_the_head_once_and_reduce_its_gradient_once(monkeypatch):
    """Four slices of two tokens of a device's two rows; three products, as the backward pass recomputes the logits."""
    rows, length, width, vocab = 16, 8, 32, 64
    monkeypatch.setattr(head, "LOGIT_SLICE", 2 * (rows // DEVICES) * vocab)
    mesh = make_placement(LAYOUTS["fsdp=8"], seeds=1).mesh  # type: ignore[union-attr]
    rng = np.random.default_rng(0)
    hidden, embedding = rng.normal(size=(rows, length, width)), rng.normal(size=(vocab, width))
    tokens = rng.integers(0, vocab, (rows, length))

    def loss(hidden, embedding, tokens):
        options = {"temperature": 1.0, "softcap": None}
        return jnp.sum(head.token_stats(hidden, embedding, jnp.ones(vocab, bool), tokens, **options).logprobs)

    def gradient(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.grad(loss, (0, 1))(*args)

    args = jnp.float32(hidden), jnp.float32(embedding), jnp.int32(tokens)
    where, split = NamedSharding(mesh, ROWS), NamedSharding(mesh, P("tensor", "fsdp"))
    on_mesh = jax.jit(gradient, in_shardings=(where, split, where), out_shardings=(where, split))
    compiled = on_mesh.lower(*args).compile()
    costs = program_costs.of_compiled(compiled)
    assert costs.flops * DEVICES == 3 * 2 * rows * length * width * vocab
    assert costs.bytes["all-gather"] == costs.bytes["all-reduce"] == embedding.size * 4
    assert '"known_trip_count":{"n":"4"' in str(compiled.as_text())
    for found, expected in zip(on_mesh(*args), jax.jit(jax.grad(loss, (0, 1)))(*args), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
