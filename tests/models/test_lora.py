"""LoRA: an adapter beside a frozen base, in every function of both networks."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.core.sequences import joined
from rlhf_jax.models import lora
from rlhf_jax.models.lora import Adapted, LoraConfig, layers_of
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.types import PreferenceBatch, RlhfError, TokenBatch
from tests.support.networks import SUPPRESSED, VOCAB, config, random_params, random_tokens, uneven_rollout

GROUPED = config(n_kv_heads=1, gated=True, activation="silu", qkv_bias=True, mlp_bias=True, out_bias=True)
EACH = LoraConfig(rank=3, alpha=5.0, targets=("attention/[qkvo]", "up|gate|down"))
TOGETHER = LoraConfig(rank=2, alpha=1.5, targets=("attention/qkv", "attention/o", "gate_up", "down"))
POLICY = PolicyNetwork(GROUPED, VOCAB, SUPPRESSED, EACH)
SHARING = dataclasses.replace(POLICY, lora=TOGETHER)
NETWORKS = {
    "each": POLICY,
    "sharing": SHARING,
    "plain MLP": PolicyNetwork(config(parallel=True), VOCAB, SUPPRESSED, EACH),
    "some": PolicyNetwork(GROUPED, VOCAB, SUPPRESSED, LoraConfig(1, 4.0, ("block_1/attention/q", "block_0/down"))),
    "remat": PolicyNetwork(dataclasses.replace(GROUPED, remat=True), VOCAB, SUPPRESSED, TOGETHER),
}
ROLLOUT = jax.tree.map(jnp.asarray, uneven_rollout())
QUICK = ("each",)
every_network = pytest.mark.parametrize(
    "network",
    [pytest.param(NETWORKS[name], id=name, marks=() if name in QUICK else pytest.mark.nightly) for name in NETWORKS],
)


@functools.cache
def adapted(network, seed=1):
    """Parameters with an adapter that does something."""
    rng, base = np.random.default_rng(seed), random_params(network)
    adapter = network.init_adapter(base, jax.random.key(seed))
    return Adapted(base, jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), x.dtype), adapter))


def pairs_of(rejected, rejected_mask):
    other = ROLLOUT._replace(response=rejected, response_mask=rejected_mask)
    return PreferenceBatch(joined(ROLLOUT), joined(other))


@functools.partial(jax.jit, static_argnums=0)
def outputs(network, params):
    """Everything that a network computes, decoding with a cache included."""
    rollout = ROLLOUT
    if isinstance(network, ScalarNetwork):
        return network.scores(params, joined(rollout)), network.values(params, joined(rollout))
    tokens = TokenBatch(rollout.response, rollout.response_mask, rollout.response_mask)
    pairs = pairs_of(rollout.response[::-1], rollout.response_mask[::-1])
    logits, cache = network.start(params, rollout.prompt, rollout.prompt_mask, 6)
    more, _ = network.step(params, rollout.response[:, 0], cache, 4)
    return (
        network.response_stats(params, joined(rollout), temperature=0.7),
        network.sequence_stats(params, tokens),
        network.pair_stats(params, pairs),
        jnp.delete(logits, jnp.array(SUPPRESSED), axis=1, assume_unique_indices=True),
        jnp.delete(more, jnp.array(SUPPRESSED), axis=1, assume_unique_indices=True),
    )


def without_adapter(network):
    """The network without adapter and rematerialisation: one, compiled once, for all that differ in these alone."""
    return dataclasses.replace(network, config=dataclasses.replace(network.config, remat=False), lora=None)


@functools.partial(jax.jit, static_argnums=0)
def logprobs_of(network, params):
    return network.response_stats(params, joined(ROLLOUT), temperature=0.7).logprobs


def sine_loss(network, params):
    stats = network.response_stats(params, joined(ROLLOUT), temperature=1.0)
    return jnp.sum(jnp.where(ROLLOUT.response_mask, jnp.sin(stats.logprobs), 0))


@functools.partial(jax.jit, static_argnums=0)
def gradient_of(network, params):
    return jax.grad(functools.partial(sine_loss, network))(params)


def assert_close(got, expected, atol=1e-5):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=1e-5)


def all_close(got, expected):
    return all(
        np.allclose(x, y, atol=1e-3) for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    )


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


# ---- what an adapter is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets, expected",
    [
        (("attention/[qv]",), {f"block_{i}/attention/{x}" for i in (0, 1) for x in "qv"}),
        (("up|down",), {f"block_{i}/{x}" for i in (0, 1) for x in ("up", "down")}),
        (("block_1/.*/o", "block_0/gate"), {"block_1/attention/o", "block_0/gate"}),
        (("attention/qkv",), {f"block_{i}/attention/qkv" for i in (0, 1)}),
        (("q", "attention/q"), {f"block_{i}/attention/q" for i in (0, 1)}),  # twice the same is once
        (("gate_up", "attention/o"), {f"block_{i}/{x}" for i in (0, 1) for x in ("gate_up", "attention/o")}),
    ],
)
def test_targets_are_patterns_on_the_last_parts_of_a_path(targets, expected):
    network = dataclasses.replace(POLICY, lora=LoraConfig(2, 1.0, targets))
    adapter = network.init_adapter(random_params(POLICY), jax.random.key(0))
    assert {layer.group for layer in layers_of(adapter).values()} == expected
    assert {path.split("/B")[0] for path in flat(adapter) if "/B" in path} == expected


@pytest.mark.parametrize(
    "targets, message",
    [
        (("attention/x",), r"'attention/x' matches no linear layer. block_0 to block_1 each have attention/k, "),
        (("attention/q", "embedding"), "'embedding' matches no linear layer"),
        (("head",), "'head' matches no linear layer"),
        (("p",), "'p' matches no linear layer"),  # the end of a name is no name
        (("block_7/up",), "'block_7/up' matches no"),
        ((".*",), "is matched twice, by .* and by block_0/"),
        (("attention/qkv", "attention/v"), "attention/v is matched twice"),
    ],
)
def test_targets_that_cannot_be_are_refused(targets, message):
    with pytest.raises(RlhfError, match=message):
        dataclasses.replace(POLICY, lora=LoraConfig(2, 1.0, targets)).init_adapter(
            random_params(POLICY), jax.random.key(0)
        )


def test_gate_up_is_no_layer_where_the_mlp_has_no_gate():
    network = dataclasses.replace(NETWORKS["plain MLP"], lora=TOGETHER)
    with pytest.raises(RlhfError, match=r"'gate_up' matches no linear layer.*attention/v, down, up$"):
        network.init_adapter(random_params(network), jax.random.key(0))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rank": 0}, "rank = 0 must be at least 1"),
        ({"alpha": 0.0}, r"alpha = 0\.0 must be above 0"),
        ({"dropout": 1.0}, r"dropout = 1\.0 must be below 1"),
        ({"dropout": -0.1}, r"dropout = -0\.1 must be"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": ("attention/[qv",)}, r"targets: 'attention/\[qv' is not a regular expression"),
        ({"targets": ("q)|(v",)}, r"targets: 'q\)\|\(v' is not a regular expression"),
    ],
)
def test_configs_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(EACH, **change)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "network",
    [
        POLICY,
        pytest.param(SHARING, marks=pytest.mark.nightly),
        pytest.param(ScalarNetwork(GROUPED, VOCAB, "mean", lora=TOGETHER), marks=pytest.mark.nightly),
    ],
    ids=["each", "sharing", "scalars"],
)
def test_a_new_adapter_is_the_base(network):
    base = random_params(network)
    adapter = network.init_adapter(base, jax.random.key(0))
    got, expected = outputs(network, Adapted(base, adapter)), outputs(without_adapter(network), base)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)
    assert not all_close(outputs(network, adapted(network)), expected)


def test_a_is_uniform_by_the_number_of_inputs_and_b_is_0_and_both_are_float32():
    wide = config(d_model=64, n_heads=2, head_dim=50, d_ff=256, param_dtype="bfloat16")
    network = PolicyNetwork(wide, VOCAB, (), LoraConfig(8, 1.0, ("attention/qkv|attention/o|up|down",)))
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    adapter = flat(network.init_adapter(shapes, jax.random.key(3)))
    assert len(adapter) == 2 * (2 * 3 + 4)
    for path, leaf in adapter.items():
        assert leaf.dtype == jnp.float32
        if not path.endswith("/A"):
            np.testing.assert_array_equal(leaf, 0)
            continue
        inputs = leaf.size // 8
        assert np.abs(leaf).max() <= inputs**-0.5
        np.testing.assert_allclose(np.std(leaf), (3 * inputs) ** -0.5, rtol=0.1)
    assert adapter["block_0/attention/o/A"].shape == (2, 50, 8) and adapter["block_0/down/A"].shape == (256, 8)
    assert adapter["block_0/attention/qkv/B/k"].shape == (8, 2, 50) and adapter["block_0/down/B"].shape == (8, 64)
    drawn = [np.asarray(leaf).ravel()[:20].tolist() for path, leaf in adapter.items() if path.endswith("/A")]
    assert len({tuple(values) for values in drawn}) == len(drawn)
    other = flat(network.init_adapter(shapes, jax.random.key(4)))
    assert np.all(other["block_0/up/A"] != adapter["block_0/up/A"])


# ---- what it computes ----------------------------------------------------------------------------------------------


@every_network
def test_merged_parameters_compute_the_same(network):
    params = adapted(network)
    plain = without_adapter(network)
    assert_close(outputs(plain, network.merge(params)), outputs(network, params))
    assert not all_close(outputs(network, params), outputs(plain, params.base))


@every_network
def test_merging_adds_alpha_by_rank_times_the_product(network):
    params = adapted(network)
    base, merged, layers = flat(params.base), flat(network.merge(params)), layers_of(params.adapter)
    assert merged.keys() == base.keys()
    for path in base:
        layer = layers.get(path.removesuffix("/kernel")) if path.endswith("kernel") else None
        if layer is None:
            assert merged[path] is base[path], path
            continue
        a = np.asarray(layer.a, np.float64).reshape(-1, network.lora.rank)
        b = np.asarray(layer.b, np.float64).reshape(network.lora.rank, -1)
        change = (network.lora.alpha / network.lora.rank * a @ b).reshape(base[path].shape)
        np.testing.assert_allclose(merged[path], np.asarray(base[path], np.float64) + change, atol=1e-6)


def test_rank_stabilised_scaling_is_by_the_root_of_the_rank():
    plain = adapted(POLICY)
    rule = dataclasses.replace(EACH, use_rslora=True)
    stable = dataclasses.replace(POLICY, lora=rule)
    same = dataclasses.replace(POLICY, lora=dataclasses.replace(EACH, alpha=EACH.alpha * EACH.rank**0.5))
    assert rule.scale == pytest.approx(5 / 3**0.5)
    assert_close(logprobs_of(stable, plain), logprobs_of(same, plain))
    assert_close(logprobs_of(without_adapter(stable), stable.merge(plain)), logprobs_of(stable, plain))
    assert not all_close(logprobs_of(stable, plain), logprobs_of(POLICY, plain))


@pytest.mark.parametrize(("use_rslora", "expected"), [(True, 1.0), (False, 1 / 16)])
def test_what_a_first_step_changes_does_not_shrink_with_the_rank_where_scaling_is_rank_stabilised(use_rslora, expected):
    """B starts at 0, and its first gradient is s x A g: the output then moves by s^2 |x A|^2 g, which goes as r s^2."""
    moved = []
    for rank in (4, 64):
        rule = LoraConfig(rank, 2.0, ("up",), use_rslora=use_rslora)
        adapter = lora.init_adapter(rule, {"block_0": {"up": {"kernel": jnp.zeros((512, 8))}}}, jax.random.key(0))
        x = np.random.default_rng(0).normal(size=(64, 512))
        down = x @ np.asarray(adapter["block_0"]["up"]["A"], np.float64)
        moved.append(rule.scale**2 * np.sum(down**2, axis=1).mean())
    assert moved[1] / moved[0] == pytest.approx(expected, rel=0.15)


def test_merging_keeps_dtypes_and_refuses_the_adapter_of_another_network():
    half = PolicyNetwork(dataclasses.replace(GROUPED, param_dtype="bfloat16"), VOCAB, (), EACH)
    params = Adapted(random_params(half), adapted(POLICY).adapter)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.merge(params))} == {jnp.dtype(jnp.bfloat16)}
    shallow = dataclasses.replace(POLICY, config=dataclasses.replace(GROUPED, n_layers=1))
    with pytest.raises(RlhfError, match="the network has no layer block_1/attention/k"):
        shallow.merge(Adapted(random_params(shallow), params.adapter))


def test_adapters_are_computed_in_the_compute_dtype():
    """One layer has no error but bfloat16's rounding, 2^-8 of the terms of each sum."""
    rng = np.random.default_rng(0)
    x, kernel, a, b = (rng.normal(size=shape) for shape in ((6, 16), (16, 16), (16, 4), (4, 16)))
    dense = nn.Sequential([nn.Dense(16, use_bias=False, dtype=jnp.bfloat16)])
    rule, scale = LoraConfig(4, 12.0, ("up",)), 12.0 / 4
    to_float32 = functools.partial(jax.tree.map, lambda leaf: jnp.asarray(leaf, jnp.float32))
    params = Adapted(*map(to_float32, ({"layers_0": {"kernel": kernel}}, {"layers_0": {"A": a, "B": b}})))

    def layer(p):
        return lora.apply(dense, p, rule, jnp.asarray(x, jnp.float32), method=None, dropout_keys=None)

    program = jax.make_jaxpr(layer)(params)
    products = [str(eqn.outvars[0].aval.dtype) for eqn in program.eqns if eqn.primitive.name == "dot_general"]
    assert products == ["bfloat16"] * 3
    terms = np.abs(x) @ np.abs(kernel) + scale * np.abs(x) @ np.abs(a) @ np.abs(b)
    error = np.abs(np.asarray(layer(params), np.float64) - (x @ kernel + scale * x @ a @ b))
    assert np.all(error < 2**-8 * terms)


def test_a_network_in_bfloat16_is_as_near_to_float32_with_an_adapter_as_its_rounding_allows():
    """Rounding adds up over two layers and a softmax at temperature 0.7: 4 % of what the adapter does."""
    full = logprobs_of(POLICY, adapted(POLICY))
    effect = rms(full - logprobs_of(without_adapter(POLICY), adapted(POLICY).base))
    half = dataclasses.replace(POLICY, config=dataclasses.replace(GROUPED, compute_dtype="bfloat16"))
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention needs it for bfloat16
        got = logprobs_of(half, adapted(half))
        merged = logprobs_of(without_adapter(half), half.merge(adapted(half)))
    assert rms(merged - full) < 0.03 * effect
    assert rms(got - full) < 0.06 * effect


def rms(x):
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


@every_network
def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule(network):
    """With G the gradient of W + s A B, that of A is s G B^T, summed over the layers that share A, and of B s A^T G."""
    params = adapted(network)
    got = flat(jax.jit(jax.grad(lambda a: sine_loss(network, Adapted(params.base, a))))(params.adapter))
    of_merged = flat(gradient_of(without_adapter(network), network.merge(params)))
    scale, rank = network.lora.alpha / network.lora.rank, network.lora.rank
    expected = {path: 0.0 for path in got}
    for path, layer in layers_of(params.adapter).items():
        a, b = (np.asarray(x, np.float64) for x in (layer.a, layer.b))
        g = np.asarray(of_merged[f"{path}/kernel"], np.float64).reshape(a.size // rank, -1)
        assert np.abs(g).max() > 1e-3
        part = path.rpartition("/")[2]
        name = f"{layer.group}/B" if f"{layer.group}/B" in got else f"{layer.group}/B/{part}"
        expected[f"{layer.group}/A"] += scale * (g @ b.reshape(rank, -1).T).reshape(a.shape)
        expected[name] += scale * (a.reshape(-1, rank).T @ g).reshape(b.shape)
    for path in got:
        np.testing.assert_allclose(got[path], expected[path], rtol=1e-3, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("network", [POLICY, SHARING], ids=["each", "sharing"])
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_pass(network):
    params, tokens = adapted(network), random_tokens(5, 2, 9)
    mask = np.ones_like(tokens, bool)
    start, step = jax.jit(network.start, static_argnums=3), jax.jit(network.step)
    logits, cache = start(params, tokens[:, :4], mask[:, :4], 9)
    for t in range(4, 9):
        padding = ((0, 0), (9 - t, 0))
        whole, _ = start(params, np.pad(tokens[:, :t], padding), np.pad(mask[:, :t], padding), 9)
        np.testing.assert_allclose(logits, whole, atol=1e-4, rtol=1e-5)
        logits, cache = step(params, tokens[:, t], cache, t)


def test_without_an_adapter_nothing_is_added_to_the_program():
    plain, rollout = dataclasses.replace(POLICY, lora=None), ROLLOUT

    def program(network):
        return str(
            jax.make_jaxpr(lambda p: network.response_stats(p, joined(rollout), temperature=1.0))(random_params(plain))
        )

    assert program(POLICY) == program(plain)


def test_adapted_parameters_need_a_config():
    with pytest.raises(TypeError, match="no LoraConfig"):
        outputs(dataclasses.replace(POLICY, lora=None), adapted(POLICY))


# ---- reward models and value functions -----------------------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_adapter_of_a_scalar_network_has_the_head_whole(pooling):
    network = ScalarNetwork(GROUPED, VOCAB, pooling, lora=SHARING.lora)
    params = adapted(network)
    assert params.adapter["head"].keys() == params.base["head"].keys()
    assert_close(outputs(without_adapter(network), network.merge(params)), outputs(network, params))
    np.testing.assert_array_equal(network.merge(params)["head"]["kernel"], params.adapter["head"]["kernel"])
    other_head = {**params.base, "head": jax.tree.map(lambda x: x + 1, params.base["head"])}
    jax.tree.map(
        np.testing.assert_array_equal, outputs(network, params), outputs(network, Adapted(other_head, params.adapter))
    )
    grads = jax.jit(jax.grad(lambda a: jnp.sum(network.scores(Adapted(params.base, a), joined(ROLLOUT)))))(
        params.adapter
    )
    assert all(np.abs(grad).max() > 0 for grad in jax.tree.leaves(grads))


def test_a_value_function_can_be_an_adapter_of_the_reward_model():
    network = ScalarNetwork(GROUPED, VOCAB, "last", lora=EACH)
    reward = random_params(network)
    adapter = network.init_adapter(network.init_value(reward), jax.random.key(0))
    np.testing.assert_array_equal(jax.jit(network.values)(Adapted(reward, adapter), joined(ROLLOUT)), 0)


# ---- dropout -------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two layers of one input, which come to nothing but what their adapters add."""

    @nn.compact
    def __call__(self, x):
        zeros = nn.initializers.zeros
        return tuple(nn.Dense(x.shape[-1], use_bias=False, kernel_init=zeros, name=name)(x) for name in ("gate", "up"))


EYE = jnp.eye(16)
IDENTITIES = {name: {"A": EYE, "B": EYE} for name in ("gate", "up")}
SHARED_IDENTITY = {"gate_up": {"A": EYE, "B": {"gate": EYE, "up": EYE}}}


def dropped(x, keys, adapter=IDENTITIES, rate=0.25):
    """Adapters that are identities show their input, less what was dropped of it."""
    base = Two().init(jax.random.key(0), x)["params"]
    rule = LoraConfig(16, 16.0, ("up",), dropout=rate)
    return lora.apply(Two(), Adapted(base, adapter), rule, x, method=None, dropout_keys=keys)


def test_dropout_drops_at_its_rate_and_scales_up_the_rest():
    x = 1 + jax.random.uniform(jax.random.key(0), (40, 60, 16))
    for y in dropped(x, jax.random.split(jax.random.key(1), 40)):
        kept = np.asarray(y != 0)
        np.testing.assert_allclose(np.asarray(y)[kept], np.asarray(x)[kept] / 0.75, rtol=1e-5)
        assert abs(np.mean(kept) - 0.75) < 0.01  # of 38,400: four standard deviations
        for axis in range(3):  # rows, places and channels alike
            others = tuple({0, 1, 2} - {axis})
            shares = kept.mean(axis=others)
            assert np.std(shares) < 3 * np.sqrt(0.75 * 0.25 * len(shares) / kept.size)


def test_a_rows_mask_is_its_keys_and_layers_have_their_own_unless_they_share_an_a():
    x, keys = jnp.ones((6, 30, 16)), jax.random.split(jax.random.key(1), 6)
    gate, up = dropped(x, keys)
    assert np.mean(np.asarray(gate == up)) < 0.75
    assert np.mean(np.asarray(up[0] == up[1])) < 0.75
    order = np.array([4, 0, 5])
    np.testing.assert_array_equal(dropped(x[order], keys[order])[1], up[order])
    gate, up = dropped(x, keys, SHARED_IDENTITY)
    np.testing.assert_array_equal(gate, up)


def test_there_is_no_dropout_without_keys_or_without_a_rate():
    x, keys = jnp.ones((6, 30, 16)), jax.random.split(jax.random.key(1), 6)
    np.testing.assert_array_equal(dropped(x, None)[0], x)
    np.testing.assert_array_equal(dropped(x, keys, rate=0.0)[0], x)


@pytest.mark.nightly
def test_keys_reach_every_loss_side_function_and_only_the_adapter():
    rollout, keys = ROLLOUT, jax.random.split(jax.random.key(1), 4)
    pairs = pairs_of(rollout.response, rollout.response_mask)  # twice the same
    tokens = TokenBatch(rollout.response, rollout.response_mask, rollout.response_mask)
    policy = dataclasses.replace(POLICY, lora=dataclasses.replace(EACH, dropout=0.3))
    scalar = ScalarNetwork(GROUPED, VOCAB, "last", lora=policy.lora)
    functions = [
        (policy, lambda p, k: policy.response_stats(p, joined(rollout), temperature=0.7, dropout_keys=k).logprobs),
        (policy, lambda p, k: policy.sequence_stats(p, tokens, dropout_keys=k).logprobs),
        (
            policy,
            lambda p, k: jnp.stack([stats.logprobs.sum(1) for stats in policy.pair_stats(p, pairs, dropout_keys=k)]),
        ),
        (scalar, lambda p, k: scalar.scores(p, joined(rollout), dropout_keys=k)),
        (scalar, lambda p, k: scalar.values(p, joined(rollout), dropout_keys=k)),
    ]
    results = []
    for network, function in functions:
        params, function = adapted(network), jax.jit(function)
        results.append(function(params, keys))
        assert not np.allclose(results[-1], function(params, keys[::-1]), atol=1e-3)
    params = adapted(policy)
    assert not np.allclose(results[0], logprobs_of(policy, params), atol=1e-3)
    np.testing.assert_array_equal(
        jax.jit(functions[0][1])(params.base, keys), logprobs_of(without_adapter(policy), params.base)
    )
    chosen, rejected = results[2]
    assert np.all(np.abs(chosen - rejected) > 1e-3)  # each has a mask of its own


@pytest.mark.nightly
def test_what_is_computed_again_is_computed_with_the_same_mask():
    rollout, keys = ROLLOUT, jax.random.split(jax.random.key(1), 4)
    policy = dataclasses.replace(POLICY, lora=dataclasses.replace(EACH, dropout=0.3))
    again = dataclasses.replace(policy, config=dataclasses.replace(GROUPED, remat=True))
    base, adapter = adapted(policy)

    def logprobs(network, adapter):
        stats = network.response_stats(Adapted(base, adapter), joined(rollout), temperature=1.0, dropout_keys=keys)
        return jnp.sum(stats.logprobs), stats.logprobs

    ((_, once), grads), ((_, twice), others) = (
        jax.jit(jax.value_and_grad(functools.partial(logprobs, network), has_aux=True))(adapter)
        for network in (policy, again)
    )
    np.testing.assert_allclose(once, twice, atol=1e-5)
    assert_close(grads, others, atol=1e-3)


# ---- training ------------------------------------------------------------------------------------------------------


def loss_of(network, adapter, base, rollout):
    return -jnp.mean(network.response_stats(Adapted(base, adapter), joined(rollout), temperature=1.0).logprobs)


def test_only_the_adapter_is_trained_and_it_learns():
    base, rollout, optimizer = random_params(POLICY), ROLLOUT, optax.adam(3e-2)
    before = jax.tree.map(np.array, base)
    adapter = POLICY.init_adapter(base, jax.random.key(0))
    state = optimizer.init(adapter)
    assert len(jax.tree.leaves(state)) == 1 + 2 * len(jax.tree.leaves(adapter))
    assert sum(x.size for x in jax.tree.leaves(adapter)) < sum(x.size for x in jax.tree.leaves(base)) / 2

    @jax.jit
    def update(adapter, state):
        loss, grads = jax.value_and_grad(functools.partial(loss_of, POLICY))(adapter, base, rollout)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, loss

    losses, start = [], adapter
    for _ in range(30):
        adapter, state, loss = update(adapter, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2
    assert all(np.any(x != y) for x, y in zip(jax.tree.leaves(adapter), jax.tree.leaves(start), strict=True))
    jax.tree.map(np.testing.assert_array_equal, base, before)


@pytest.mark.nightly
def test_seeds_share_one_base():
    rollout, seeds = ROLLOUT, [adapted(POLICY, seed) for seed in (1, 2, 3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params.adapter for params in seeds))
    one = jax.value_and_grad(functools.partial(loss_of, POLICY))
    losses, grads = jax.jit(jax.vmap(one, in_axes=(0, None, None)))(stacked, seeds[0].base, rollout)
    for k, params in enumerate(seeds):
        loss, grad = jax.jit(one)(params.adapter, params.base, rollout)
        assert_close((losses[k], jax.tree.map(lambda x, k=k: x[k], grads)), (loss, grad), atol=1e-4)
    merged = jax.vmap(lambda adapter: POLICY.merge(Adapted(seeds[0].base, adapter)))(stacked)
    assert_close(jax.tree.map(lambda x: x[2], merged), POLICY.merge(seeds[2]))
