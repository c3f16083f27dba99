"""Rewards of several parts: a model, Python functions, or both, wherever a stage names what it scores by."""

import dataclasses
import itertools
import json
import math
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import FunctionSource, ModelSource
from rlhf_jax.data import pipeline
from rlhf_jax.data.padding import pad_right
from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.pretrained import load_checkpoint
from rlhf_jax.loading.stage_models import load_stage_policy, load_stage_reward_model
from rlhf_jax.models.reward_ensemble import EnsembleConfig
from rlhf_jax.rewards.functions import load_function
from rlhf_jax.rewards.scorers import joins_program, make_scorer
from rlhf_jax.rewards.sources import Reward, RewardConfig, name_of, names_of, recombined
from rlhf_jax.sampling.batches import score_all
from rlhf_jax.types import RlhfError, Rollout
from tests.support import experiments, tiny

DATA = experiments.data_config("unread")
RLOO = {
    "kind": "group_rl",
    "method": "rloo",
    "num_generations": 4,
    "iterations": 2,
    "batch_size": 16,
    "minibatches": 1,
    "epochs": 1,
    "temperature": 1.0,
    "kl_coef": 0.05,
    "optimizer": experiments.OPTIMIZER,
    "samples_every": 1,
    "samples_written": 4,
    "trim_padding": False,  # one program
    "loop": {"steps_per_call": 1, "checkpoint_every": 100},
}
FUNCTIONS = """
from rlhf_jax.data import pipeline
from rlhf_jax.data.padding import pad_left, pad_right
from rlhf_jax.sampling.batches import score_all
from rlhf_jax.loading.pretrained import load_checkpoint
from rlhf_jax.types import Rollout
from tests.support import experiments

JUDGE = load_checkpoint({judge!r})
DATA = experiments.data_config("unread")

def by_judge(prompts, completions, completion_ids, **columns):
    assert all(chat[-1]["role"] == "user" for chat in prompts)
    assert all(chat[0]["role"] == "assistant" for chat in completions)
    examples, _ = pipeline.encode_pairs(prompts, completions, JUDGE.tokenizer, DATA)
    read = Rollout(
        *pad_left([example.prompt for example in examples], 24),
        *pad_right(completion_ids, 8),
    )
    return score_all(JUDGE.network, JUDGE.params, read, 32).tolist()

def right(completions, answer, **columns):
    return [float(a in chat[0]["content"]) if a else None for a, chat in zip(answer, completions)]

def tokens(completion_ids):
    return [len(ids) for ids in completion_ids]

def never(completions):
    return [None] * len(completions)
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sources")
    model, judge = experiments.models(directory)
    (directory / "mine.py").write_text(FUNCTIONS.format(judge=judge))
    return directory, model, judge


@pytest.mark.nightly
def test_both_paths_give_the_same_learning_step(places):
    """The same network, within the compiled iteration and as a Python function between its two halves."""
    directory, model, judge = places
    section = {**RLOO, "policy": model}
    best = {"kind": "best_of_n", "policy": model, "judge": None, "prompts": 8, "pool": 2, "temperature": 1.0}
    sources = (judge, {"functions": (f"{directory / 'mine.py'}:by_judge",)})
    shortest = {**best, "reward_model": {"functions": (f"{directory / 'mine.py'}:tokens",), "weights": (-1.0,)}}
    data = experiments.questions(directory / "questions.jsonl", 16)
    stages = [{"rl": {**section, "reward_model": source}} for source in sources]
    stages[1]["best"] = shortest
    runs = [experiments.run(directory / f"run_{i}", data, each) for i, each in enumerate(stages)]
    one, other = (experiments.rows(run.find("rl") / "metrics.jsonl") for run in runs)
    assert len(one) == len(other) == 2
    for ours, theirs in zip(one, other, strict=True):
        assert theirs.keys() - ours.keys() == {"rewards/by_judge/mean", "rewards/by_judge/std"}
        assert theirs["rewards/by_judge/mean"] == pytest.approx(theirs["reward"], rel=1e-5)
        for name, value in ours.items():
            if not name.startswith("time/"):
                np.testing.assert_allclose(theirs[name], value, rtol=1e-3, atol=1e-4, err_msg=name)
    assert one[0]["reward_std"] > 0.01
    for ours, theirs in zip(*(experiments.rows(run.find("rl") / "samples.jsonl") for run in runs), strict=True):
        assert ours["completion"] == theirs["completion"]
    inputs = json.loads((runs[1].find("rl") / "config.json").read_text())["inputs"]
    assert f"{directory / 'mine.py'}:by_judge" in inputs
    spec = json.loads((runs[1].find("rl") / "model.json").read_text())
    earlier = {key: value for key, value in spec.items() if key not in ("lora", "hf_config", "base")}
    (runs[1].find("rl") / "model.json").write_text(json.dumps(earlier))
    assert (
        load_stage_policy(runs[1].find("rl"), seed=0, step=None).network.lora is None
    )  # what an earlier version wrote
    curve = experiments.rows(runs[1].find("best") / "curve.jsonl")
    assert curve[0]["proxy"] < curve[-1]["proxy"] < 0  # the shortest of two


@pytest.fixture(scope="module")
def loaded(places):
    policy, judge = (load_checkpoint(place) for place in places[1:])
    assert isinstance(policy, Policy) and isinstance(judge, RewardModel)
    return policy, judge


ROWS = [
    {"prompt": [{"role": "user", "content": "the film"}], "answer": "good", "id": 1},
    {"prompt": [{"role": "user", "content": "is bad"}], "answer": "", "id": 2},
    {"prompt": [{"role": "user", "content": "the film"}], "answer": "good", "id": 3},
]


@pytest.mark.parametrize("chats", [False, True])
def test_a_response_that_was_cut_off_is_scored_without_an_end_by_any_tokenizer(places, loaded, chats):
    """A judge whose tokenizer differs in its template alone reads the same tokens, and so gives the same scores."""
    policy, judge = loaded
    texts = ["the film", "is bad", "good"]
    rows = [{"prompt": [{"role": "user", "content": text}] if chats else text} for text in texts]
    prompts = pipeline.prompts(rows, policy.tokenizer, DATA)
    ids = [policy.tokenizer.encode(f" {text}") for text in ("good film", "good film", "dull")]
    answers = [ids[0], [*ids[1], policy.tokenizer.eos_id], ids[2]]
    given = Rollout(*prompts, *pad_right(answers, 8))
    scores = make_scorer(judge, policy, rows, DATA, 4)(given)

    elsewhere = places[0] / f"other judge {chats}"
    shutil.copytree(places[2], elsewhere)
    (template,) = elsewhere.glob("*.jinja")
    template.write_text(template.read_text() + "{# another #}")
    other = load_checkpoint(str(elsewhere))
    assert isinstance(other, RewardModel) and not joins_program(other, policy)
    np.testing.assert_allclose(make_scorer(other, policy, rows, DATA, 4)(given), scores, rtol=1e-5)
    assert abs(scores[2] - score_all(judge.network, judge.params, _with_end(given, policy), 4)[2]) > 0.01


def _with_end(given: Rollout[np.ndarray], policy: Policy) -> Rollout[np.ndarray]:
    """The rollout with EOS after its last response."""
    response, mask = given.response.copy(), given.response_mask.copy()
    length = mask[-1].sum()
    response[-1, length], mask[-1, length] = policy.tokenizer.eos_id, True
    return given._replace(response=response, response_mask=mask)


def rollout(policy) -> Rollout[np.ndarray]:
    prompts = pipeline.take(pipeline.prompts(ROWS, policy.tokenizer, DATA), np.array([1, 0, 0]))
    answers = [[*policy.tokenizer.encode(text), policy.tokenizer.eos_id] for text in ("good", "is good", "dull bad")]
    return Rollout(*prompts, *pad_right(answers, 8))


def reward(places, model, names, weights) -> Reward:
    functions = tuple(load_function(f"{places[0] / 'mine.py'}:{name}") for name in names)
    return Reward(model, functions, weights, (*(["rm"] if model else []), *names))


def test_parts_are_weighted_and_functions_see_the_columns_of_their_prompts(places, loaded):
    policy, judge = loaded
    given = rollout(policy)
    plain = score_all(judge.network, judge.params, given, 4)
    source = reward(places, judge, ("right", "tokens"), (2.0, 10.0, 1.0))
    scores = make_scorer(source, policy, ROWS, DATA, 4)(given)
    # The first answer is to the prompt of which the function says nothing.
    np.testing.assert_allclose(scores, 2 * plain + [0, 10, 0] + [2, 3, 3], rtol=1e-5)
    assert scores.dtype == np.float32
    assert joins_program(judge, policy) and not joins_program(source, policy)


@pytest.mark.nightly
def test_means_that_are_logged_are_of_the_rows_to_which_a_reward_applies(places):
    """Compute scores by hand: the first function scores half of the prompts, the second all of them."""
    directory, model, _ = places
    asked = {"the film": "good", "is": "", "bad bad": "dull", "film film film": ""}
    data = directory / "mixed.jsonl"
    rows = [{"prompt": [{"role": "user", "content": text}], "answer": answer} for text, answer in asked.items()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = tuple(f"{directory / 'mine.py'}:{name}" for name in ("right", "tokens", "never"))
    source = {"functions": mine, "weights": (10.0, 0.5, 1.0)}
    section = {**RLOO, "policy": model, "iterations": 1, "samples_written": 16, "reward_model": source}
    run = experiments.run(directory / "mixed", data, {"rl": section})
    samples = experiments.rows(run.find("rl") / "samples.jsonl")
    (metrics,) = experiments.rows(run.find("rl") / "metrics.jsonl")
    right, tokens = [], []
    for row in samples:
        answer = asked[row["prompt"].replace(":", "").strip()]
        own = [float(answer in row["completion"])] if answer else []
        right, tokens = right + own, [*tokens, row["length"]]
        assert row["score"] == pytest.approx(10 * sum(own) + 0.5 * row["length"])
    assert len(samples) == 16 and 0 < len(right) < 16 and len(set(right)) == 2
    for name, values in (("right", right), ("tokens", tokens)):
        assert metrics[f"rewards/{name}/mean"] == pytest.approx(sum(values) / len(values))
        assert metrics[f"rewards/{name}/std"] == pytest.approx(np.std(values, ddof=1))
    assert metrics["rewards/never/mean"] is metrics["rewards/never/std"] is None
    assert metrics["reward"] == pytest.approx(np.mean([row["score"] for row in samples]), rel=1e-5)


def test_a_reward_that_applies_to_no_answer_names_the_row(places, loaded):
    policy, _ = loaded
    with pytest.raises(
        RlhfError, match=r"no reward applies to the completion .*' good'.* of the prompt .*'is bad'.*mine"
    ):
        make_scorer(reward(places, None, ("right",), (1.0,)), policy, ROWS, DATA, 4)(rollout(policy))


def test_a_model_that_diverged_is_no_part_that_does_not_apply(places, loaded):
    policy, judge = loaded
    broken = judge._replace(params=jax.tree.map(lambda leaf: leaf * jnp.nan, judge.params))
    with pytest.raises(RlhfError, match=r"the reward model gave nan to the completion .* its training has diverged"):
        make_scorer(reward(places, broken, ("tokens",), (1.0, 1.0)), policy, ROWS, DATA, 4)(rollout(policy))


def test_columns_in_which_rows_with_one_prompt_differ_are_not_given(places, loaded):
    policy, _ = loaded
    rows = [row | {"answer": f"{row['id']}"} for row in ROWS]
    with pytest.raises(RlhfError, match=r"mine.py:right needs answer, but only prompts, completions"):
        make_scorer(reward(places, None, ("right",), (1.0,)), policy, rows, DATA, 4)(rollout(policy))


def test_sections_that_cannot_be_are_refused():
    function = FunctionSource("mine.py:f")
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "a reward needs at least one of them"),
        ({"functions": (function,), "weights": (1.0, 2.0)}, "must have one weight for each of 1 parts"),
        ({"functions": (function,), "combine": "wco"}, "needs a model"),
        ({"functions": (function,), "weights": (math.nan,)}, "must be finite"),
        ({"functions": (function, function)}, "has a duplicate"),
        ({"model": ModelSource("rm"), "variance_coefficient": 0.1}, "no other combination uses it"),
    )
    for fields, message in cases:
        with pytest.raises(ValueError, match=message):
            RewardConfig(**fields)
    assert name_of(RewardConfig((function,), ModelSource("rm"))) == "rm + mine.py:f"
    alike = FunctionSource("other.py:f"), FunctionSource("mine.py:g")
    assert names_of(RewardConfig((function, *alike), ModelSource("/a/rm"))) == ("rm", "mine.py:f", "other.py:f", "g")


def test_a_stage_may_combine_an_ensemble_otherwise(loaded):
    _, judge = loaded
    source = RewardConfig(model=ModelSource("rm"), combine="wco")
    with pytest.raises(RlhfError, match=r"config.ppo.combine = 'wco': rm is a single model"):
        recombined(judge, source, "config.ppo")
    params = jax.tree.map(
        lambda *leaves: np.stack(leaves),
        *(jax.tree.map(lambda leaf, k=k: k * leaf, tiny.reward_params()) for k in (1, -2, 3)),
    )
    model = RewardModel(dataclasses.replace(tiny.REWARD, ensemble=EnsembleConfig(3, "mean")), params, judge.tokenizer)
    prompts, rows = tiny.prompts(4), tiny.preferences(4).chosen
    given = Rollout(prompts.tokens, prompts.mask, rows.response, rows.response_mask)
    each = np.stack([score_all(one.network, one.params, given, 4) for one in model.members()])
    worst = recombined(model, source, "config.ppo")
    np.testing.assert_allclose(score_all(worst.network, worst.params, given, 4), each.min(axis=0), atol=1e-5)
    np.testing.assert_allclose(score_all(model.network, model.params, given, 4), each.mean(axis=0), atol=1e-5)


@pytest.mark.nightly
def test_an_ensemble_of_adapters_scores_within_the_compiled_iteration(places):
    """Trained beside one frozen checkpoint, normalised on its samples, combined otherwise by the stage it serves."""
    directory, model, _ = places
    rng = np.random.default_rng(0)
    data = directory / "pairs.jsonl"

    def said(role: str, most: int) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(rng.choice(experiments.WORDS, rng.integers(1, most)))}]

    rows = [
        {"prompt": said("user", 3), "chosen": said("assistant", 5), "rejected": said("assistant", 5)} for _ in range(32)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lora = {"rank": 2, "alpha": 4.0, "targets": ("attention/[qv]",), "dropout": 0.1}
    common = {"optimizer": experiments.OPTIMIZER, "loop": experiments.LOOP, "batch_size": 16}
    reward_stage = {
        "kind": "reward_model",
        "policy": None,
        "preferences": None,
        "model": {"init": model, "lora": lora},
        "pooling": "last",
        "epochs": 4.0,
        "eval_every": 100,
        "ensemble": {"members": 2, "combine": "mean"},
        "normalise": {"policy": model, "prompts": 32},
        **common,
    }
    rl = {
        **RLOO,
        "policy": model,
        "reward_model": {"model": "reward", "combine": "wco"},
        "iterations": 1,
    }
    workdir = experiments.run(directory / "adapters", data, {"reward": reward_stage, "rl": rl})
    found = load_stage_reward_model(workdir.find("reward"), find=workdir.find)
    assert found.network.lora is None and found.network.bias and found.network.ensemble == EnsembleConfig(2, "mean")
    base, (one, other) = load_checkpoint(model), found.members()
    assert isinstance(base, Policy)
    q = [p["block_0"]["attention"]["q"]["kernel"] for p in (base.params, one.params["body"], other.params["body"])]
    assert min(float(np.abs(a - b).max()) for a, b in itertools.combinations(q, 2)) > 1e-4
    np.testing.assert_array_equal(one.params["body"]["embedding"], base.params["embedding"])
    for row in experiments.rows(workdir.find("rl") / "samples.jsonl")[:4]:
        assert math.isfinite(row["score"])
    given = rollout(Policy(base.network, base.params, base.tokenizer))
    each = [score_all(member.network, member.params, given, 4) for member in (one, other)]
    np.testing.assert_allclose(score_all(found.network, found.params, given, 4), np.mean(each, axis=0), atol=1e-5)
