"""KTO: the reference point from responses to other prompts, on several devices and over micro-batches, and its data."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.core.metrics import values
from rlhf_jax.data.ragged import Ragged, RaggedSequences, RowWidths
from rlhf_jax.methods.offline import Updates
from rlhf_jax.runtime.programs import make_placement
from rlhf_jax.stages import kto
from rlhf_jax.types import RlhfError, Rollout, UnpairedBatch
from tests.support import experiments, tiny
from tests.support.programs import PLACEMENTS, QUICK, assert_close, learn, log_ratios

ROWS, BETA = 16, 0.3
WEIGHTED = kto.UnpairedLossConfig(desirable_weight=1.7, undesirable_weight=0.6)
APO = dataclasses.replace(WEIGHTED, loss="apo_zero_unpaired")


def labelled(seed: int) -> kto.Labelled:
    """Responses of uneven lengths to different prompts, a quarter of them good."""
    prompts, chosen = tiny.prompts(ROWS, seed), tiny.preferences(ROWS, seed).chosen
    mask = prompts.mask.copy()
    mask[:, -3:] = True
    assert len(np.unique(prompts.tokens[:, -3:], axis=0)) == ROWS
    label = np.random.default_rng(seed).permutation(ROWS) < ROWS // 4
    rollout = Rollout(prompts.tokens, mask, chosen.response, chosen.response_mask)
    return kto.Labelled(RaggedSequences.of_rollout(rollout), label)


def batch_of(config: kto.UnpairedLossConfig, data: kto.Labelled) -> UnpairedBatch[np.ndarray]:
    """All rows as one batch, padded beyond the longest."""
    table, rows = kto.make_table(config, data), np.arange(ROWS)
    return table.padded(rows, RowWidths(tiny.PROMPT + tiny.RESPONSE + 2, tiny.RESPONSE))


def make_update(config=WEIGHTED, where=tiny.ONE_DEVICE, micro_batch=None):
    """One update, on a batch by its seed, of a policy far from its reference: parameters after, metrics before."""
    placement = make_placement(where, seeds=1)
    optimizer = dataclasses.replace(tiny.OPTIMIZER, micro_batch=micro_batch)
    frozen = placement.put_frozen({"reference": tiny.policy_params(2), "beta": jnp.float32(BETA)})
    step = kto.make_step(Updates(tiny.POLICY, optimizer, 3, placement.axes), config)
    program = placement.compile(step, placement.put_state(tiny.dpo_state()))

    def update(seed):
        state = placement.put_state(tiny.dpo_state())
        state, metrics, _ = program(state, frozen, tiny.several([batch_of(config, labelled(seed))]), jax.random.key(0))
        return jax.device_get((placement.whole(state).params, jax.tree.map(lambda leaf: leaf[0], metrics)))

    return update


@pytest.fixture(scope="module")
def update():
    return make_update()


logprobs = jax.jit(kto.response_logprobs, static_argnums=0)


def expected(config, seed):
    """The metrics by the paper's formulas, in float64, a row at a time."""
    batch, models = labelled(seed), (tiny.policy_params(), tiny.policy_params(2))
    widths = RowWidths(tiny.PROMPT + tiny.RESPONSE, tiny.RESPONSE)

    def ratio(prompt, response):
        row = batch.sequences.padded(np.array([prompt]), np.array([response]), widths)
        own, reference = (logprobs(tiny.POLICY, model, row) for model in models)
        return float(own[0]), float(own[0]) - float(reference[0])

    drift = np.mean([ratio(i, (i - 1) % ROWS)[1] for i in range(ROWS)])
    point = max(0.0, drift) if config.loss == "kto" else 0.0
    losses, rewards, own = [], {True: [], False: []}, {True: [], False: []}
    for i, good in enumerate(batch.label.tolist()):
        logprob, log_ratio = ratio(i, i)
        value = BETA * (log_ratio - point) * (1 if good else -1)
        weight = config.desirable_weight if good else config.undesirable_weight
        losses.append(weight * (1 - 1 / (1 + np.exp(-value))))
        rewards[good].append(BETA * log_ratio)
        own[good].append(logprob)
    return drift, {
        "loss": np.mean(losses),
        "rewards/chosen": np.mean(rewards[True]),
        "rewards/rejected": np.mean(rewards[False]),
        "rewards/margins": np.mean(rewards[True]) - np.mean(rewards[False]),
        "logps/chosen": np.mean(own[True]),
        "logps/rejected": np.mean(own[False]),
    } | ({"kl": point} if config.loss == "kto" else {})


def two_to_a_prompt(data: kto.Labelled) -> kto.Labelled:
    """The rows as pairs are taken apart: rows 2i and 2i + 1 share a prompt."""
    prompts = data.sequences.prompts.take(np.arange(ROWS) // 2 * 2)
    return data._replace(sequences=RaggedSequences(prompts, data.sequences.responses))


def test_the_evaluations_reference_point_is_of_responses_to_other_prompts():
    data, models = two_to_a_prompt(labelled(AHEAD)), (tiny.policy_params(), tiny.policy_params(2))
    got = kto.evaluate(WEIGHTED, tiny.POLICY, models, data, BETA, batch_size=8, widths=2)

    def drift(shift):
        rows, widths = np.arange(ROWS), RowWidths(tiny.PROMPT + tiny.RESPONSE, tiny.RESPONSE)
        others = data.sequences.padded(rows, (rows - shift) % ROWS, widths)
        own, reference = (np.asarray(logprobs(tiny.POLICY, model, others)) for model in models)
        return float(np.mean(own - reference))

    assert abs(drift(1) - drift(2)) > 0.1  # every second response would stand under its own prompt
    np.testing.assert_allclose(got["eval/kl"], max(0, drift(2)), rtol=1e-4)


@pytest.mark.parametrize(
    ("prompts", "clashes"),
    [
        ("abcdefgh", 0),
        ("aabbccdd", 0),
        ("aaaabbbb", 0),
        ("abababab", 0),
        ("aabacbda", 0),
        ("aaaaabcd", 2),  # of eight rows, five have one prompt: two of them must get each other's
        ("aaaaaaaa", 8),
    ],
)
def test_no_response_goes_to_its_own_prompt_where_that_can_be(prompts, clashes):
    first = np.array([prompts.index(prompt) for prompt in prompts])
    rows = kto.mismatched_rows(first)
    assert sorted(rows) == list(range(len(prompts)))  # each response is read once
    assert sum(first == first[rows]) == clashes
    if prompts == "abcdefgh":
        np.testing.assert_array_equal(rows, np.roll(np.arange(8), 1))  # as in TRL


def test_a_batch_of_few_prompts_is_put_to_other_prompts():
    data = two_to_a_prompt(labelled(AHEAD))
    batch = batch_of(WEIGHTED, data)
    others = batch.mismatched
    assert others is not None
    np.testing.assert_array_equal(others.response, np.roll(batch.sequences.response, 2, axis=0))
    np.testing.assert_array_equal(others.response_mask, np.roll(batch.sequences.response_mask, 2, axis=0))
    np.testing.assert_array_equal(others.start, batch.sequences.start)
    for row, before in enumerate(others.start):
        np.testing.assert_array_equal(others.tokens[row, :before], batch.sequences.tokens[row, :before])
    assert batch_of(APO, data).mismatched is None


AHEAD, BEHIND = 9, 2
"""Batches whose responses, put to other prompts, are likelier and less likely than under the reference.

Their labels are spread unevenly over micro-batches.
"""


@pytest.mark.parametrize("seed", [AHEAD, BEHIND])
def test_a_step_is_the_papers(update, seed):
    drift, metrics = expected(WEIGHTED, seed)
    assert drift > 0.1 if seed == AHEAD else drift < -0.1
    assert_metrics(update(seed)[1], metrics)


def test_apo_zero_has_no_reference_point():
    batch = jax.tree.map(jnp.asarray, batch_of(APO, labelled(AHEAD)))
    own, reference = (logprobs(tiny.POLICY, tiny.policy_params(seed), batch.sequences) for seed in (0, 2))
    loss, metrics = kto.unpaired_loss(APO, own, reference, batch.label, None, beta=BETA, axes=())
    assert_metrics(values(metrics) | {"loss": loss}, expected(APO, AHEAD)[1])
    frozen = {"reference": tiny.policy_params(2), "beta": jnp.float32(BETA)}
    step = kto.make_step(Updates(tiny.POLICY, tiny.OPTIMIZER, 3, ()), APO)
    assert "kl" not in jax.eval_shape(step, tiny.dpo_state(), frozen, batch, jax.random.key(0))[1]


def assert_metrics(got, metrics):
    for name, value in metrics.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["pmap=8", "micro-batches"])
def test_devices_and_micro_batches_change_nothing(name, update):
    other = make_update(where=PLACEMENTS[name]) if name in PLACEMENTS else make_update(micro_batch=4)
    assert_close(other(AHEAD), update(AHEAD))


def good_endings(seed: int) -> UnpairedBatch[np.ndarray]:
    """Label responses that end in token 5 as good."""
    sequences, label = labelled(seed)
    values = np.where(sequences.responses.values == 5, 6, sequences.responses.values)
    values[sequences.responses.ends[label] - 1] = 5
    responses = Ragged(values, sequences.responses.ends)
    return batch_of(kto.KTO, kto.Labelled(RaggedSequences(sequences.prompts, responses), label))


def test_kto_learns_what_is_good():
    reference = tiny.policy_params()
    params, frozen = {"policy": tiny.policy_params()}, {"reference": reference, "beta": jnp.float32(0.1)}
    batches = [good_endings(seed % 4) for seed in range(60)]
    params, metrics, _ = learn(kto.make_step(Updates(tiny.POLICY, QUICK, 60, ())), params, frozen, batches)
    np.testing.assert_allclose(metrics["loss"][0], 0.5, atol=1e-6)  # the policy is still its reference
    np.testing.assert_allclose(metrics["kl"][0], 0, atol=1e-5)
    assert metrics["loss"][-4:].mean() < 0.4
    assert metrics["rewards/margins"][-4:].mean() > 0.5
    assert np.all(metrics["kl"] >= 0)
    # Metrics would look as good with the labels exchanged, so compute log-probabilities separately.
    ratios = log_ratios(params["policy"], reference, batches[0].sequences)
    assert ratios[batches[0].label].mean() > ratios[~batches[0].label].mean() + 0.5 / 0.1


@pytest.mark.nightly
def test_an_experiment_on_labelled_chats(tmp_path):
    model, _ = experiments.models(tmp_path)
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": [{"role": "user", "content": " ".join(rng.choice(experiments.WORDS, 2))}],
            "completion": [{"role": "assistant", "content": "good good" if number % 3 else "dull dull"}],
            "label": bool(number % 3),
        }
        for number in range(48)
    ]
    data = tmp_path / "labelled.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {
        "kind": "kto",
        "policy": model,
        "preferences": None,
        "beta": 0.1,
        "optimizer": experiments.OPTIMIZER | {"learning_rate": 1e-2},
        "batch_size": 16,
        "epochs": 4.0,
        "sample_prompts": 2,
        "eval_every": 4,
        "loop": experiments.LOOP | {"checkpoint_every": 4},
        "tuning": {"lora": {"rank": 4, "alpha": 8.0, "targets": ("attention/[qv]", "up", "down")}},
    }
    directory = experiments.run(tmp_path / "run", data, {"kto": section}, seeds=2).find("kto")
    summary = json.loads((directory / "summary.json").read_text())
    assert (summary["desirable_rows"], summary["undesirable_rows"], summary["eval_rows"]) == (32, 16, 48)
    metrics, other = (
        [row for row in experiments.rows(directory / "metrics.jsonl") if row["seed"] == seed] for seed in (0, 1)
    )
    np.testing.assert_allclose(metrics[0]["loss"], 0.5, atol=1e-5)
    evaluated = [row["eval/rewards/margins"] for row in metrics if "eval/loss" in row]
    assert len(evaluated) == 3 and 0 < evaluated[0] < evaluated[-1]
    assert evaluated[-1] > 0.1 and metrics[-1]["eval/loss"] < 0.5
    assert len(experiments.rows(directory / "samples.jsonl")) == 3 * 2 * 2

    alone = experiments.run(tmp_path / "alone", data, {"kto": section}, seed=1).find("kto")
    rows = experiments.rows(alone / "metrics.jsonl")
    assert len(rows) == len(other) == len(metrics)
    for row, one in zip(other, rows, strict=True):
        for name in row:
            if not name.startswith("time/"):
                assert row[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    assert metrics[-1]["loss"] != other[-1]["loss"]
    experiments.assert_resumes(tmp_path / "alone", data, {"kto": section}, seed=1)


def test_one_label_alone_is_refused():
    row = {"prompt": "a", "completion": " b", "label": False}
    with pytest.raises(RlhfError, match=r"rows\.jsonl: all 2 rows have the label false"):
        kto.require_both_labels([row, row], "rows.jsonl")
    kto.require_both_labels([row, row | {"label": True}], "rows.jsonl")


def test_pairs_are_taken_apart():
    apart = kto.unpair([{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1.0}])
    assert apart == [
        {"prompt": "a", "completion": "b", "label": True},
        {"prompt": "a", "completion": "c", "label": False},
    ]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="desirable_weight = 0"):
        kto.UnpairedLossConfig(desirable_weight=0.0)
