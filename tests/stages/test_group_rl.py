"""Methods without a value function: each learns, and what each config field does."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from rlhf_jax import config as configs
from rlhf_jax.core.advantages import overlong_penalty
from rlhf_jax.core.kl import ESTIMATORS
from rlhf_jax.core.policy_losses import AGGREGATIONS
from rlhf_jax.core.sequences import joined
from rlhf_jax.methods import two_steps
from rlhf_jax.methods.dynamic_sampling import DynamicSampling
from rlhf_jax.methods.kl_controller import AdaptiveKL
from rlhf_jax.methods.policy_parts import Networks, OnlineBatch, Sampled
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.runtime.programs import SEED_AXIS, make_placement
from rlhf_jax.runtime.two_programs import Scored, TwoPrograms, Widths
from rlhf_jax.stages import group_rl
from rlhf_jax.types import RlhfError, Rollout
from tests.support import tiny
from tests.support.programs import assert_close, runtime

FIELDS = tiny.GROUP_RL
ROWS, GROUP, ITERATIONS = FIELDS["batch_size"], FIELDS["num_generations"], FIELDS["iterations"]
config_of = tiny.group_config


def frozen():
    return {"reference": tiny.policy_params(), "reward": tiny.reward_params()}


def state_of(config):
    return tiny.iteration(config).init_state({"policy": tiny.policy_params()})


def host_steps(config):
    """Steps of an iteration, at full width, and the rounds of dynamic sampling."""
    no_scores = Scored(np.zeros(0), {})
    steps = two_steps.scored_on_host(tiny.iteration(config), lambda rollout: no_scores, two_steps.MAXIMUM)
    assert steps.host is not None
    at_full_width = steps.learn(Widths(tiny.PROMPT + tiny.RESPONSE, tiny.RESPONSE))

    def learn(state, frozen, found, run_key):
        return at_full_width(state, frozen, (found, None), run_key)

    return steps.sample(tiny.PROMPT), learn, steps.host.rounds


@functools.cache
def sample_and_score():
    """Sampling is every method's, and compiled once."""
    sample, reward = host_steps(config_of("grpo"))[0], tiny.REWARD.scores
    return jax.jit(sample), jax.jit(reward)


@functools.cache
def untrained():
    """Responses of the policy before training, and their scores, with the random numbers of every iteration."""
    (sample, reward), state, networks = sample_and_score(), state_of(config_of("grpo")), frozen()
    found = []
    for number in range(ITERATIONS):
        before = state._replace(step=jnp.int32(number))
        rollout = sample(before, networks, tiny.online(ROWS // GROUP), jax.random.key(0))[2].rollout
        found.append((rollout, reward(networks["reward"], joined(rollout))))
    return found


def objective(method, found):
    """Mean score over the last five iterations; DAPO's is lower where a response is long."""
    means = []
    for rollout, scores in found[-5:]:
        penalty = 0.0
        if method == "dapo":
            lengths = rollout.response_mask.sum(axis=1)
            penalty = overlong_penalty(lengths, max_tokens=tiny.RESPONSE, buffer=0.2 * tiny.RESPONSE)
        means.append(float(jnp.mean(scores + penalty)))
    return np.mean(means)


QUICK = ("grpo",)
"""The method that is trained in the quick tier.

The losses and advantages of all are compared with their formulas in tests/core, and the gradients in tests/exact.
"""


@pytest.mark.parametrize(
    "method", [name if name in QUICK else pytest.param(name, marks=pytest.mark.nightly) for name in group_rl.METHODS]
)
def test_every_method_pleases_the_reward_model(method):
    config = config_of(method)
    state, networks = state_of(config), frozen()
    sample, reward = sample_and_score()
    _, learn, rounds = host_steps(config)
    learn = jax.jit(learn)
    keep = jax.jit(rounds.collect) if rounds else None
    found, responses, rewarded = [], [], []
    for _ in range(ITERATIONS):
        state, _, sampled = sample(state, networks, tiny.online(ROWS // GROUP), jax.random.key(0))
        scored = (sampled, reward(networks["reward"], joined(sampled.rollout)))
        rewarded.append((sampled.rollout, scored[1]))
        if keep is not None:
            scored, _ = keep(None, scored)  # one round, whatever it brings
        state, metrics, _ = learn(state, networks, scored, jax.random.key(0))
        found.append(jax.device_get(metrics))
        responses.append(np.asarray(sampled.rollout.response))
    metrics = {name: np.array([row[name] for row in found]) for name in found[0]}
    # Scores of the reward model itself, against those without training: the spread of either mean is 0.02.
    assert objective(method, rewarded) > objective(method, untrained()) + 0.1
    # With one update an iteration, the learner is always the policy that sampled.
    np.testing.assert_allclose(metrics["val/ratio"], 1, atol=1e-5)
    np.testing.assert_allclose(metrics["policy/approxkl_avg"], 0, atol=1e-9)
    np.testing.assert_allclose(metrics["objective/kl"][0], 0, atol=1e-5)
    assert np.all(metrics["sampling/sampling_logp_difference/max"] < 1e-4)
    assert np.all(metrics["sampling/sampling_logp_difference/max"] > 0)  # two programs round differently
    # Iterations have the same prompts here, and not the same random numbers.
    assert np.mean(responses[0] != responses[1]) > 0.3


@pytest.mark.nightly
def test_old_logprobs_are_the_learners_or_the_samplers_and_their_difference_is_logged():
    """A sampler whose log-probabilities are off by 0.3 nats: the ratio has them or not, and both say by how much."""
    state, networks = state_of(config_of("grpo")), frozen()
    sample, reward = sample_and_score()
    sampled = sample(state, networks, tiny.online(ROWS // GROUP), jax.random.key(0))[2]
    mask = np.asarray(sampled.rollout.response_mask)
    noise = 0.3 * np.random.default_rng(0).normal(size=mask.shape)
    off = sampled._replace(logprobs=jnp.where(mask, sampled.logprobs + noise, jnp.nan).astype(jnp.float32))
    scored = (off, reward(networks["reward"], joined(sampled.rollout)))
    optimizer = dataclasses.replace(tiny.OPTIMIZER, learning_rate=1e-3, micro_batch=8)
    found, params = {}, {}
    for program in ("learner", "sampler"):
        config = config_of("grpo", old_logprobs=program, epochs=2, optimizer=optimizer)
        after, found[program], _ = jax.jit(host_steps(config)[1])(state, networks, scored, jax.random.key(0))
        params[program] = after.params
        difference = abs(np.where(mask, noise, 0))
        name = "sampling/sampling_logp_difference"
        np.testing.assert_allclose(found[program][f"{name}/mean"], difference[mask].mean(), rtol=1e-4)
        np.testing.assert_allclose(found[program][f"{name}/max"], difference.max(), rtol=1e-4)
    # Bounds of 0.2 are reached before the first update, if only the ratio says so.
    assert found["learner"]["policy/clipfrac_avg"] < 0.1 < 0.15 < found["sampler"]["policy/clipfrac_avg"]
    assert found["sampler"]["policy/approxkl_avg"] > 0.5 * np.mean(noise[mask] ** 2) / 2
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), *params.values())
    assert max(jax.tree.leaves(moved)) > 1e-4


def fixed_groups(scores, first_row):
    """Two tokens a response, of which the first names its row."""
    rows = len(scores)
    response = jnp.stack([first_row + jnp.arange(rows), jnp.full(rows, tiny.EOS)], axis=1).astype(jnp.int32)
    ones = jnp.ones((rows, 2), bool)
    return Sampled(Rollout(response, ones, response, ones), jnp.zeros((rows, 2)), None), jnp.asarray(scores)


@pytest.mark.nightly
def test_rounds_keep_the_first_groups_whose_scores_differ_until_there_are_enough():
    sampling = DynamicSampling(rounds=4, num_generations=3, batch_size=9)
    another = jax.jit(functools.partial(sampling.collect, axes=()))

    def after(*rounds):
        partial = sampling.empty(fixed_groups([0.0] * 9, 0)[0])
        for number, scores in enumerate(rounds):
            partial = another(partial, *fixed_groups(scores, 10 * number))
        sampled, scores, useful, metrics = sampling.responses(partial, ())
        assert useful is not None
        assert bool(partial.is_full(())) == bool(useful.all())
        names = ("rounds", "groups_missing", "informative_groups")
        rest = [float(metrics[f"dynamic_sampling/{name}"]) for name in names]
        return sampled.rollout.response[:, 0].tolist(), scores.tolist(), useful.tolist(), rest, metrics

    same, one, two, three = [1.0] * 3, [1.0, 0, 0], [2.0, 0, 2], [0, 0, 3.0]
    # What was sampled comes before nothing, and what teaches before what does not, each in the order sampled.
    rows, scores, useful, rest, metrics = after(same + one + same)
    assert rows == [3, 4, 5, 0, 1, 2, 6, 7, 8]
    assert (useful, rest) == ([True] * 3 + [False] * 6, [1, 2, pytest.approx(1 / 3)])
    rows, scores, useful, rest, metrics = after(same + one + same, same * 3)
    assert (rows, rest) == ([3, 4, 5, 0, 1, 2, 6, 7, 8], [2, 2, pytest.approx(1 / 6)])
    enough = (same + one + same, same + same + two, three + same + one)
    rows, scores, useful, rest, metrics = after(*enough)
    assert (rows, scores) == ([3, 4, 5, 16, 17, 18, 20, 21, 22], [*one, *two, *three])
    assert (all(useful), rest) == (True, [3, 0, pytest.approx(4 / 9)])
    flat = np.concatenate(enough)
    np.testing.assert_allclose([metrics["reward"], metrics["reward_std"]], [flat.mean(), flat.std()], rtol=1e-6)
    assert metrics["num_tokens"] == 2 * 27
    # A batch that is full stays as it is, and no later round is counted: another seed may have needed it.
    again = after(*enough, [9.0, 8, 7] * 3)
    assert again[:4] == (rows, scores, useful, rest)
    for name, value in metrics.items():
        assert again[4][name] == value


def test_an_all_wrong_group_of_different_lengths_teaches_nothing():
    """The paper's condition is on correctness: a score that only length lowered is not a right answer."""
    config = config_of("dapo", batch_size=9, num_generations=3, missing_eos_penalty=0.5)
    sampling = dataclasses.replace(tiny.build_method(config).dynamic_sampling, rounds=1)
    assert tiny.build_method(config).shaping.overlong_buffer > 0
    sampled, scores = fixed_groups([0.0] * 3 + [0.0, 1.0, 0.0] + [1.0] * 3, 4)
    lengths = jnp.array([1, 6, 5, 6, 6, 6, 2, 4, 6])
    mask = jnp.arange(6)[None] < lengths[:, None]
    tokens = jnp.where(mask, jnp.tile(sampled.rollout.response[:, :1], 6), tiny.EOS)
    sampled = Sampled(Rollout(tokens, mask, tokens, mask), jnp.zeros((9, 6)), None)
    partial = jax.jit(functools.partial(sampling.collect, axes=()))(sampling.empty(sampled), sampled, scores)
    _, kept, useful, metrics = sampling.responses(partial, ())
    assert useful is not None
    assert kept.tolist() == [0, 1, 0, 0, 0, 0, 1, 1, 1]
    assert useful.tolist() == [True] * 3 + [False] * 6
    np.testing.assert_allclose(metrics["dynamic_sampling/informative_groups"], 1 / 3, rtol=1e-6)


class Rare(ScalarNetwork):
    """One point for a response that begins with token 5: most groups have the same scores."""

    def scores(self, params, sequences, *, dropout_keys=None):
        del params, dropout_keys
        return (sequences.response[:, 0] == 5).astype(jnp.float32)


@pytest.mark.nightly
def test_seeds_devices_and_the_host_give_the_same_iterations():
    """Two iterations of two seeds that sample until full: under pmap, and scored by the host, against each alone."""
    controller, rounds, groups = AdaptiveKL(target=0.25, horizon=100.0), 4, ROWS // GROUP
    config = config_of(
        "dapo",
        dynamic_sampling_rounds=rounds,
        kl_coef=0.1,
        kl_controller=controller,
        minibatches=2,
        entropy_coef=0.01,
        overlong_buffer=0.0,
        old_logprobs="sampler",
    )
    reward = Rare(tiny.MODEL, tiny.VOCAB, "mean")
    keys = jnp.stack([jax.random.key(seed) for seed in (1, 2)])

    def prompts(seed):
        flat = tiny.prompts(groups * rounds, seed)
        return OnlineBatch(
            jax.tree.map(lambda leaf: leaf.reshape(rounds, groups, *leaf.shape[1:]).swapaxes(0, 1), flat)
        )

    batches = [[prompts(10 * seed + i) for i in range(2)] for seed in (1, 2)]
    per_iteration = tiny.several([tiny.several([batches[k][i] for k in range(2)]) for i in range(2)])

    def of_seeds(placement, program):
        state = placement.put_state(jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), state_of(config)))
        state, metrics, samples = program(state)(state, placement.put_frozen(frozen()), per_iteration, keys)
        return jax.device_get((placement.whole(state), metrics, samples.rollout.response))

    devices, alone = (
        make_placement(where, seeds=2) for where in (runtime("pmap", data=2, fsdp=1, tensor=1), tiny.ONE_DEVICE)
    )
    step = tiny.iteration(config, devices.axes, (SEED_AXIS,)).step(reward)

    def on_host(rollout):
        scores = np.asarray(reward.scores((), joined(rollout)))
        return Scored(scores, {"rewards/all": scores})

    by_host = two_steps.scored_on_host(tiny.iteration(config, loop_axes=(SEED_AXIS,)), on_host, two_steps.LONGEST)
    found = [
        of_seeds(devices, lambda state: devices.compile(step, state)),
        of_seeds(alone, lambda state: TwoPrograms(alone, by_host)),
    ]

    alone = make_placement(tiny.ONE_DEVICE, seeds=1)
    program = alone.compile(tiny.iteration(config).step(reward), alone.put_state(state_of(config)))
    for k in range(2):
        one = alone.put_state(state_of(config))
        one, expected, shown = program(one, frozen(), tiny.several(batches[k]), keys[k])
        for state, metrics, responses in found:
            np.testing.assert_array_equal(responses[:, k], shown.rollout.response)
            assert_close(jax.tree.map(lambda leaf, k=k: leaf[k], state.params), jax.device_get(one.params))
            assert_close({name: metrics[name][:, k] for name in expected}, jax.device_get(expected), 1e-4)
            np.testing.assert_allclose(state.controller["kl_coef"][k], one.controller["kl_coef"], rtol=1e-5)
    state, metrics, _ = found[0]
    np.testing.assert_allclose(metrics["objective/kl_coef"][0], [0.1, 0.1], rtol=1e-6)
    assert len(set(np.asarray(state.controller["kl_coef"]).tolist())) == 2
    assert "loss/kl_avg" in metrics
    # Of a seed's own rounds, whatever others need besides.
    np.testing.assert_allclose(found[1][1]["rewards/all/mean"], found[1][1]["reward"], rtol=1e-5)
    # Seeds that go on together need different numbers of rounds, and not every batch is full after the last.
    needed, missing = metrics["dynamic_sampling/rounds"], metrics["dynamic_sampling/groups_missing"]
    assert np.any(needed[:, 0] != needed[:, 1]) and needed.max() == rounds
    assert missing.min() == 0 < missing.max() < groups


def parse(**changes):
    section = {name: value for name, value in FIELDS.items() if name not in ("optimizer", "loop")}
    section |= {"optimizer": dataclasses.asdict(FIELDS["optimizer"]), "loop": dataclasses.asdict(FIELDS["loop"])}
    return configs.build(group_rl.GroupRLConfig, ConfigDict(section | changes), "config.grpo")


def test_a_method_sets_what_its_paper_sets_and_any_field_can_be_otherwise():
    grpo, dapo = (tiny.build_method(parse(method=name)) for name in ("grpo", "dapo"))
    assert (grpo.learner.aggregation, grpo.kl_coef) == (AGGREGATIONS["sequence"], 0.04)
    assert grpo.kl_estimator == grpo.learner.loss_penalty == ESTIMATORS["k3"]
    assert dapo.learner.policy_loss.keywords == {"clip_ratio": 0.2, "clip_ratio_high": 0.28, "dual_clip": np.inf}
    assert (dapo.learner.aggregation, dapo.shaping.overlong_buffer) == (AGGREGATIONS["token"], 0.2)
    assert (dapo.dynamic_sampling, grpo.dynamic_sampling) == (DynamicSampling(10, GROUP, ROWS), None)
    assert (dapo.kl_coef, dapo.learner.loss_penalty) == (0.0, None)
    other = tiny.build_method(parse(method="grpo", aggregation="token", kl_coef=0.0, clip_ratio=0.1))
    assert (other.learner.aggregation, other.kl_coef) == (AGGREGATIONS["token"], 0.0)
    assert options(method="grpo", clip_ratio=0.1)["clip_ratio"] == 0.1
    assert options(method="cispo") == {"clip_ratio_high": 4.0}
    assert options(method="grpo", policy_loss="reinforce") == {}


def options(**changes):
    return tiny.build_method(parse(**changes)).learner.policy_loss.keywords


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "rloo"}, r"method = 'rloo' leaves kl_coef to you"),
        ({"method": "grpo", "num_generations": 1}, r"num_generations = 1 must be at least 2"),
        ({"method": "grpo", "num_generations": 3}, r"16 responses do not divide into groups of num_generations = 3"),
        ({"method": "cispo", "clip_ratio": 0.2}, r"clip_ratio has no effect with policy_loss = 'cispo'"),
        ({"method": "cispo", "policy_loss": "ppo"}, r"policy_loss = 'ppo' needs clip_ratio"),
        ({"method": "dapo", "kl_in": "reward"}, r"kl_in = 'reward' says where the penalty is, and kl_coef is 0"),
        ({"method": "grpo", "kl_estimator": "k1"}, r"an expected gradient of 0: set kl_estimator to 'k2' or 'k3\+'"),
        ({"method": "rloo", "kl_coef": 0.1, "kl_estimator": "k3+"}, r"'k3\+' differs from 'k3' only in its gradient"),
        ({"method": "rloo", "kl_coef": 0.1, "kl_estimator": "k3_weighted"}, r"set kl_in to 'loss', or kl_estimator"),
        ({"method": "dapo", "kl_controller": {"target": 1.0, "horizon": 1.0}}, r"kl_controller multiplies kl_coef = 0"),
        ({"method": "grpo", "missing_eos_score": -1.0, "missing_eos_penalty": 1.0}, r"set only one of the two"),
        ({"method": "grpo", "importance_cap": 2.0, "old_logprobs": "sampler"}, r"importance_cap = 2.0 corrects for"),
        ({"method": "grpo", "policy_loss": "reinforce", "old_logprobs": "sampler"}, r"has no ratio, and does not read"),
        (
            {"method": "grpo", "minibatches": 2, "ptx": {"coef": 1.0, "batch_size": 3}},
            r"batch_size = 3 is not a multiple",
        ),
        ({"method": "grpo", "gamma": 1.0}, r"gamma has no effect with advantage = 'grpo': leave it out"),
        ({"method": "grpo", "gae_lambda": 1.0}, r"config.grpo.gae_lambda is not a field of GroupRLConfig"),
        ({"method": "cispo", "dual_clip": 3.0}, r"dual_clip has no effect with policy_loss = 'cispo'"),
        ({"method": "dapo", "dual_clip": 1.25}, r"dual_clip = 1.25 must be above 1 \+ clip_ratio_high = 1.28"),
        (
            {"method": "grpo", "importance_mode": "token_mask"},
            r"importance_mode = 'token_mask' needs importance_cap",
        ),
        ({"method": "grpo", "importance_floor": 0.5}, r"importance_floor = 0.5 needs importance_cap"),
        ({"method": "grpo", "importance_floor": 2.0, "importance_cap": 2.0}, r"must be below importance_cap = 2.0"),
        ({"method": "reinforce_plus_plus_baseline"}, r"'reinforce_plus_plus_baseline' leaves kl_coef to you"),
        ({"method": "grp"}, r"config.grpo.method = 'grp' should be one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_work_or_is_not_read_is_refused(changes, message):
    with pytest.raises(RlhfError, match=message):
        parse(**changes)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_an_estimator_whose_gradient_in_the_reward_is_not_the_divergences_warns(estimator):
    with pytest.warns(UserWarning, match=f"'{estimator}' in the reward does not have the gradient of the divergence"):
        parse(method="rloo", kl_coef=0.1, kl_estimator=estimator)
    # Nothing is penalised, or it is where the gradient is right: warnings are errors in these tests.
    parse(method="rloo", kl_coef=0.0, kl_estimator=estimator)
    parse(method="grpo", kl_estimator=estimator)


def test_a_discount_and_a_second_clip_reach_the_method():
    mask = jnp.ones((ROWS, 5), bool)
    rewards = jnp.zeros((ROWS, 5)).at[:, -1].set(jnp.arange(ROWS, dtype=jnp.float32))

    def of_rows(**changes):
        method = tiny.build_method(config_of("reinforce_plus_plus", **changes))
        return np.asarray(method.learner.advantages(rewards, 0 * rewards, mask, mask, ()).advantages)

    np.testing.assert_array_equal(of_rows(), of_rows(gamma=1.0))
    np.testing.assert_allclose(of_rows(), of_rows()[:, :1].repeat(5, axis=1), rtol=1e-5)
    discounted = 0.5 ** np.arange(4, -1, -1)[None] * np.arange(ROWS)[:, None]
    expected = (discounted - discounted.mean()) / discounted.std()
    np.testing.assert_allclose(of_rows(gamma=0.5), expected, rtol=1e-4, atol=1e-5)
    assert options(method="grpo", dual_clip=3.0)["dual_clip"] == 3.0


def test_weights_for_the_sampler_are_those_of_the_mode():
    """Compute weights with the training function, for two responses with sampler errors of 0.5 and 0.2 nats."""
    networks = Networks(tiny.GivenPolicy(tiny.MODEL, tiny.VOCAB, tiny.SUPPRESSED), None, (tiny.EOS,), 2)
    sampled, _ = fixed_groups([0.0, 0.0], 4)
    logprobs = sampled.logprobs - jnp.array([[-0.5], [0.2]])

    def weights(**changes):
        config = config_of("grpo", **changes)
        old = tiny.iteration(config, networks=networks).old_policy(
            {"policy": logprobs}, joined(sampled.rollout), sampled.logprobs
        )
        names = [f"sampling/importance_sampling_ratio/{name}" for name in ("min", "mean", "max")]
        assert (names[0] in old.metrics) == (old.weights is not None)
        if old.weights is None:
            return []
        np.testing.assert_allclose(
            [old.metrics[name].value for name in names],
            [old.weights.min(), old.weights.mean(), old.weights.max()],
            rtol=1e-6,
        )
        return old.weights[:, 0].tolist()

    high, low = np.exp([0.5, -0.2])
    assert weights() == []
    np.testing.assert_allclose(weights(importance_cap=2.0), [high, low], rtol=1e-6)
    np.testing.assert_allclose(weights(importance_cap=1.5), [1.5, low], rtol=1e-6)
    np.testing.assert_allclose(weights(importance_cap=1.5, importance_floor=0.9), [1.5, 0.9], rtol=1e-6)
    found = weights(importance_cap=1.5, importance_floor=0.9, importance_mode="token_mask")
    np.testing.assert_allclose(found, [0, 0])
    np.testing.assert_allclose(weights(importance_cap=2.0, importance_mode="sequence_truncate"), [2, low**2], rtol=1e-6)
    np.testing.assert_allclose(weights(importance_cap=2.0, importance_mode="sequence_mask"), [0, low**2], rtol=1e-6)
