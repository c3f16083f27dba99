"""The transformer against a slow one in NumPy, one unpadded row at a time, and the policy's functions of it."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from rlhf_jax.core.sequences import joined
from rlhf_jax.models.lora import LoraConfig
from rlhf_jax.models.model_config import Rope
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.transformer import EMPTY, Transformer
from rlhf_jax.types import PreferenceBatch, TokenBatch
from tests.support.networks import (
    CONFIG,
    POLICY,
    SUPPRESSED,
    VOCAB,
    config,
    padded,
    random_params,
    random_tokens,
    uneven_rollout,
)

ACTIVATIONS = {
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def slow_norm(x, scale):
    return np.stack([row / math.sqrt(sum(v * v for v in row) / len(row) + 1e-6) * scale for row in x])


def slow_rotation(x, position):
    """One head's vector at one position: channel i turns together with channel i + K/2, as a complex number."""
    half = len(x) // 2
    turned = [complex(x[i], x[i + half]) * np.exp(1j * position / 10_000 ** (i / half)) for i in range(half)]
    return np.array([z.real for z in turned] + [z.imag for z in turned])


def slow_attention(x, weights, n_heads):
    q, k, v = (np.einsum("sd,dhk->hsk", x, weights[name]["kernel"]) for name in "qkv")
    out = np.zeros_like(x)
    for head in range(n_heads):
        for i in range(len(x)):
            query = slow_rotation(q[head, i], i)
            scores = [query @ slow_rotation(k[head, j], j) / math.sqrt(len(query)) for j in range(i + 1)]
            probabilities = np.exp(scores) / sum(np.exp(scores))
            mixed = sum(p * v[head, j] for j, p in enumerate(probabilities))
            out[i] += mixed @ weights["o"]["kernel"][head]
    return out


def slow_hidden(params, shape, tokens):
    """Hidden states [S, D] of one sequence without padding, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.stack([params["embedding"][token] for token in tokens])
    for i in range(shape.n_layers):
        block = params[f"block_{i}"]
        x = x + slow_attention(slow_norm(x, block["attention_norm"]["scale"]), block["attention"], shape.n_heads)
        inner = slow_norm(x, block["mlp_norm"]["scale"]) @ block["up"]["kernel"]
        x = x + np.vectorize(ACTIVATIONS[shape.activation])(inner) @ block["down"]["kernel"]
    return slow_norm(x, params["final_norm"]["scale"])


def slow_logits(params, shape, tokens):
    return slow_hidden(params, shape, tokens) @ np.asarray(params["embedding"], np.float64).T


def slow_log_softmax(params, shape, tokens, temperature=1.0):
    logits = slow_logits(params, shape, tokens)
    logits[:, list(SUPPRESSED)] = -np.inf
    return scipy.special.log_softmax(logits / temperature, axis=-1)


@functools.partial(jax.jit, static_argnums=0)
def body(network, params, tokens, mask):
    return Transformer(network.config, network.vocab_size).apply({"params": params}, tokens, mask)


@functools.partial(jax.jit, static_argnums=(0, 4))
def start(network, params, tokens, mask, slots):
    return network.start(params, tokens, mask, slots)


@functools.partial(jax.jit, static_argnums=0)
def step(network, params, tokens, cache, slot):
    return network.step(params, tokens, cache, slot)


PARAMS = random_params(POLICY)
WIDTH = 9
ROWS = [random_tokens(i, length) for i, length in enumerate((9, 6, 4, 1, 5))]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "gelu", "n_heads": 4, "d_ff": 7},
        {"activation": "silu", "n_heads": 1, "n_layers": 3, "d_model": 12},
    ],
    ids=str,
)
def test_equals_a_slow_implementation(changes):
    shape = config(**changes)
    network = PolicyNetwork(shape, VOCAB, SUPPRESSED)
    params = random_params(network)
    tokens, mask = padded(ROWS, [0] * len(ROWS), WIDTH)
    hidden = body(network, params, tokens, mask)
    assert hidden.dtype == jnp.float32
    for row, ours in zip(ROWS, hidden, strict=True):
        np.testing.assert_allclose(ours[: len(row)], slow_hidden(params, shape, row), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "both", "within"])
def test_padding_takes_up_no_position(side):
    free = [WIDTH - len(row) for row in ROWS]
    if side == "within":
        rng = np.random.default_rng(0)
        places = [np.sort(rng.choice(WIDTH, len(row), replace=False)) for row in ROWS]
    else:
        places = [(n if side == "left" else n // 2) + np.arange(len(row)) for n, row in zip(free, ROWS, strict=True)]
    tokens, mask = np.full((len(ROWS), WIDTH), 7, np.int32), np.zeros((len(ROWS), WIDTH), bool)
    for i, (row, place) in enumerate(zip(ROWS, places, strict=True)):
        tokens[i, place], mask[i, place] = row, True
    hidden = np.asarray(body(POLICY, PARAMS, tokens, mask))
    for i, row in enumerate(ROWS):
        np.testing.assert_allclose(hidden[i, mask[i]], slow_hidden(PARAMS, CONFIG, row), rtol=1e-5, atol=1e-5)


def masked_sum_and_gradients(tokens, mask):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(*tokens.shape, CONFIG.d_model)), jnp.float32)

    def loss(params):
        hidden = body(POLICY, params, tokens, mask)
        return jnp.sum(jnp.where(mask[..., None], hidden, 0) * weights), hidden

    return jax.value_and_grad(loss, has_aux=True)(PARAMS)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_content_of_padding_changes_neither_values_nor_gradients(side):
    free = [WIDTH - len(row) for row in ROWS]
    before = {"left": free, "right": [0] * len(ROWS), "both": [n // 2 for n in free]}[side]
    tokens, mask = padded(ROWS, before, WIDTH)
    evaluate = jax.jit(masked_sum_and_gradients)
    (_, hidden), grads = evaluate(tokens, mask)
    for filling in (random_tokens(9, *tokens.shape), np.full_like(tokens, VOCAB - 1)):
        (_, other_hidden), other_grads = evaluate(np.where(mask, tokens, filling), mask)
        np.testing.assert_array_equal(np.asarray(hidden)[mask], np.asarray(other_hidden)[mask])
        jax.tree.map(np.testing.assert_array_equal, grads, other_grads)
    is_used = np.isin(np.arange(VOCAB), np.concatenate(ROWS))
    np.testing.assert_array_equal(np.any(grads["embedding"], axis=1), is_used)


def test_a_token_changes_nothing_before_it_and_everything_from_it_on():
    row = random_tokens(0, WIDTH)
    changed = np.where(np.eye(WIDTH, dtype=bool), (row + 1) % VOCAB, row).astype(np.int32)  # row t differs at t
    before = np.asarray(body(POLICY, PARAMS, row[None], np.ones((1, WIDTH), bool)))[0]
    after = np.asarray(body(POLICY, PARAMS, changed, np.ones((WIDTH, WIDTH), bool)))
    moved = np.abs(after - before).max(axis=-1)  # [changed token, position]
    np.testing.assert_allclose(moved[np.tril_indices(WIDTH, -1)], 0, atol=1e-6)
    assert np.all(moved[np.triu_indices(WIDTH)] > 1e-3)


def test_decoding_with_a_cache_equals_the_whole_pass():
    rollout = uneven_rollout(filling=9)
    prompt_length, length = rollout.prompt.shape[1], 5
    response = random_tokens(1, 4, length)
    logits, cache = start(POLICY, PARAMS, rollout.prompt, rollout.prompt_mask, prompt_length + length)
    decoded = [logits]
    for t in range(length - 1):
        logits, cache = step(POLICY, PARAMS, response[:, t], cache, prompt_length + t)
        decoded.append(logits)
    for i in range(4):
        prompt = rollout.prompt[i, rollout.prompt_mask[i]]
        expected = slow_logits(PARAMS, CONFIG, [*prompt, *response[i]])[len(prompt) - 1 : -1]
        expected[:, list(SUPPRESSED)] = np.finfo(np.float32).min / 2
        np.testing.assert_allclose(np.stack(decoded, axis=1)[i], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(
        cache.positions[:, :-1] >= 0, np.hstack([rollout.prompt_mask, np.ones((4, length - 1), bool)])
    )
    assert np.all(cache.positions[:, -1] == EMPTY)


def test_a_cache_takes_chunks_with_padding_of_their_own():
    tokens, mask = padded([row[:4] for row in ROWS[:3]], [0, 1, 2], 6, filling=9)
    mask[0, 4:], mask[2, :2] = False, False
    _, cache = start(POLICY, PARAMS, tokens[:, :3], mask[:, :3], 8)

    @jax.jit
    def extend(*arguments):
        return Transformer(CONFIG, VOCAB).apply({"params": PARAMS}, *arguments, method="extend")

    hidden, _ = extend(tokens[:, 3:], mask[:, 3:], cache, 3)
    whole = body(POLICY, PARAMS, tokens, mask)
    np.testing.assert_allclose(hidden[mask[:, 3:]], whole[:, 3:][mask[:, 3:]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_response_stats_are_those_of_each_token_given_all_before_it(temperature):
    rollout = uneven_rollout()
    stats = jax.jit(lambda p, r: POLICY.response_stats(p, joined(r), temperature=temperature))(PARAMS, rollout)
    for i in range(4):
        prompt, response = rollout.prompt[i, rollout.prompt_mask[i]], rollout.response[i, rollout.response_mask[i]]
        exact = slow_log_softmax(PARAMS, CONFIG, [*prompt, *response], temperature)[len(prompt) - 1 : -1]
        at = np.arange(len(response))
        np.testing.assert_allclose(stats.logprobs[i, at], exact[at, response], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(stats.entropy[i, at], scipy.special.entr(np.exp(exact)).sum(1), rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(stats.correct[i, at], exact.argmax(axis=1) == response)


def test_sequence_stats_predict_every_token_but_the_first():
    tokens, mask = padded(ROWS, [0] * len(ROWS), WIDTH)
    tokens[0, 3] = SUPPRESSED[2]
    stats = jax.jit(POLICY.sequence_stats)(PARAMS, TokenBatch(tokens, mask, mask))
    assert stats.logprobs.shape == (len(ROWS), WIDTH - 1)
    for i, row in enumerate(ROWS):
        row = tokens[i, : len(row)]
        exact = slow_log_softmax(PARAMS, CONFIG, row)[np.arange(len(row) - 1), row[1:]]
        exact[np.isin(row[1:], SUPPRESSED)] = 0
        np.testing.assert_allclose(stats.logprobs[i, : len(row) - 1], exact, rtol=1e-4, atol=1e-4)


def test_pairs_are_each_response_after_the_same_prompt():
    chosen, rejected = uneven_rollout(0), uneven_rollout(1)
    rejected = chosen._replace(response=rejected.response, response_mask=rejected.response_mask)
    pairs = jax.jit(POLICY.pair_stats)(PARAMS, PreferenceBatch(joined(chosen), joined(rejected)))
    for stats, rollout in zip(pairs, (chosen, rejected), strict=True):
        mask = rollout.response_mask
        for i in range(4):
            prompt, response = rollout.prompt[i, rollout.prompt_mask[i]], rollout.response[i, mask[i]]
            exact = slow_log_softmax(PARAMS, CONFIG, [*prompt, *response])[len(prompt) - 1 : -1]
            got = stats.logprobs[i, mask[i]]
            np.testing.assert_allclose(got, exact[np.arange(len(response)), response], rtol=1e-4, atol=1e-5)


def promoting(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return wrapper


@pytest.fixture
def library_promotes(monkeypatch):
    """Lets two functions of libraries that we call promote bfloat16 to float32 within themselves; ours may not."""

    def intercept(method, args, kwargs, context):
        return (promoting(method) if isinstance(context.module, nn.RMSNorm) else method)(*args, **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", promoting(jax.nn.dot_product_attention))
    with nn.intercept_methods(intercept):
        yield


@pytest.mark.usefixtures("library_promotes")
@pytest.mark.parametrize("param_dtype", [pytest.param("float32", marks=pytest.mark.nightly), "bfloat16"])
def test_bfloat16_computes_near_float32_and_reduces_in_float32(param_dtype):
    exact_network = PolicyNetwork(config(n_layers=1), VOCAB, SUPPRESSED)
    shape = config(n_layers=1, param_dtype=param_dtype, compute_dtype="bfloat16")
    network = PolicyNetwork(shape, VOCAB, SUPPRESSED)
    params = jax.tree.map(lambda leaf: leaf.astype(param_dtype), random_params(exact_network))
    drawn = jax.eval_shape(network.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(drawn)} == {jnp.dtype(param_dtype)}
    rollout = uneven_rollout()

    def loss(params, rollout):
        stats = network.response_stats(params, joined(rollout), temperature=0.7)
        return jnp.sum(jnp.where(rollout.response_mask, stats.logprobs, 0)), stats

    _, stats = jax.jit(loss)(params, rollout)
    assert stats.logprobs.dtype == stats.entropy.dtype == jnp.float32
    grads, _ = promoting(jax.jit(jax.grad(loss, has_aux=True)))(params, rollout)  # attention's is the library's
    for grad, param in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        assert grad.dtype == param.dtype and jnp.all(jnp.isfinite(grad)) and jnp.any(grad != 0)
    exact_stats = jax.jit(lambda p, r: exact_network.response_stats(p, joined(r), temperature=0.7))
    exact = exact_stats(random_params(exact_network), rollout)
    difference = np.abs(np.asarray(stats.logprobs - exact.logprobs))[rollout.response_mask]
    assert 0 < difference.max() < 0.3

    logits, cache = start(network, params, rollout.prompt, rollout.prompt_mask, 6)
    logits, cache = step(network, params, rollout.response[:, 0], cache, 4)
    assert cache.keys[0].dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    assert body(network, params, rollout.prompt, rollout.prompt_mask).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 0}, "d_model = 0 must be at least 1"),
        ({"n_layers": 0}, "n_layers = 0 must be at least 1"),
        ({"n_heads": -1}, "n_heads = -1 must be at least 1"),
        ({"d_ff": 0}, "d_ff = 0 must be at least 1"),
        ({"d_model": 18, "n_heads": 3, "n_layers": 1}, None),
        ({"d_model": 15, "n_heads": 3}, "a head has an odd number of them, 5 "),
        ({"n_heads": 16}, "a head has an odd number of them, 1 .d_model = 16, n_heads = 16, head_dim = None."),
    ],
    ids=str,
)
def test_impossible_shapes_are_named(changes, message):
    if message is None:
        config(**changes)
    else:
        with pytest.raises(ValueError, match=message):
            config(**changes)


def test_remat_keeps_less_and_changes_nothing():
    tokens = random_tokens(3, 4, 12)
    batch = TokenBatch(jnp.asarray(tokens), jnp.ones(tokens.shape, bool), jnp.ones(tokens.shape, bool))

    def loss(network):
        return lambda params: jnp.sum(network.sequence_stats(params, batch).logprobs)

    def kept(network):
        """Numbers that the forward pass keeps for the backward pass."""
        pullback = jax.eval_shape(lambda params: jax.vjp(loss(network), params)[1], PARAMS)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    inputs, products = (PolicyNetwork(config(remat=remat), VOCAB, SUPPRESSED) for remat in (True, "dots"))
    assert kept(inputs) < 0.8 * kept(products) and kept(products) < 0.9 * kept(POLICY)
    expected, *others = (jax.jit(jax.grad(loss(network)))(PARAMS) for network in (POLICY, inputs, products))
    for got in others:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


PERIODIC = {"windows": (3, None, 3, None), "local_rope": Rope(theta=100.0)}


@pytest.mark.nightly
@pytest.mark.parametrize("changes", [{}, pytest.param(PERIODIC, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_layers_in_a_loop_compute_the_same_in_a_program_of_constant_size(changes, remat):
    tokens = jnp.asarray(random_tokens(3, 4, 12))
    batch = TokenBatch(tokens, jnp.ones(tokens.shape, bool), jnp.ones(tokens.shape, bool))

    def gradient_of(layers, loop):
        windows = changes["windows"] * (layers // 4) if changes else None
        shape = config(n_layers=layers, scan_layers=loop, remat=remat, **{**changes, "windows": windows})
        network = PolicyNetwork(shape, VOCAB, SUPPRESSED)
        return network, jax.jit(jax.grad(lambda params: jnp.sum(network.sequence_stats(params, batch).logprobs)))

    def products(layers, loop):
        network, gradient = gradient_of(layers, loop)
        return gradient.lower(jax.eval_shape(network.init, jax.random.key(0))).as_text().count("stablehlo.dot_general")

    network, gradient = gradient_of(4, False)
    params = random_params(network)
    expected, got = gradient(params), gradient_of(4, True)[1](params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)
    assert products(8, True) == products(4, True) < products(4, False) < products(8, False)


def test_layers_in_a_loop_have_no_adapter():
    with pytest.raises(ValueError, match="scan_layers = True does not support adapters: set it to False"):
        PolicyNetwork(config(scan_layers=True), VOCAB, SUPPRESSED, LoraConfig(2, 1.0, ("up",)))
