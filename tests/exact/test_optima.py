r"""Stages run to their end on a space of responses that can be listed: they stop at the optimum in closed form.

A word tokenizer with three words leaves four tokens that a policy emits; SFT makes the reference. A response's worth w
is 1 or 3, its reward log w. Under Bradley-Terry a response of worth 3 then wins 3 of 4 comparisons with one of worth 1,
so that four rows a pair are the population, without sampling noise.

Distances are in total variation, and may be 0.002. DPO and IPO take all pairs at once, so that nothing but the decay of
the rate keeps them from the optimum. RLOO and PPO sample, but where every response has the same reward less penalty,
as at the optimum, their gradient has no noise. Each test checks that a beta 10 % off would be seen.
"""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from rlhf_jax.core.logprobs import sequence_logprobs
from rlhf_jax.core.sequences import joined
from rlhf_jax.data.padding import pad_right
from rlhf_jax.loading.stage_models import load_stage_policy
from rlhf_jax.types import Rollout
from tests.support import experiments

CLOSE = 0.002
WORDS, PROMPT = ("a", "b", "c"), ""  # none of the words: one layer hardly tells a word from its repetition
MODEL = {
    "d_model": 32,
    "n_layers": 1,
    "n_heads": 2,
    "d_ff": 64,
    "activation": "gelu",
    "tied": False,
    "param_dtype": "float32",
    "compute_dtype": "float32",
}
REWARD = """import math

WORTH = {worth!r}


def reward(completions):
    return [math.log(WORTH[text.strip()]) for text in completions]
"""


class Space(NamedTuple):
    """Every response of at most `longest` tokens, the reference's probabilities, and where its stage was run."""

    directory: Path
    longest: int
    responses: list[tuple[str, ...]]  # the first is empty; those of `longest` words are cut off
    worth: np.ndarray  # float64[N]
    reference: np.ndarray  # float64[N]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each response, EOS included."""
        return np.minimum([len(words) + 1 for words in self.responses], self.longest)

    def train(self, name: str, section: dict[str, Any]) -> np.ndarray:
        """Runs a stage from the reference; returns its policy's probabilities, float64[N]."""
        run(self.directory, self.longest, {"sft": SFT, name: section})
        return probabilities(self.directory / "work" / name, self.responses, self.longest)


def optimizer(rate: float) -> dict[str, Any]:
    return {
        "learning_rate": rate,
        "schedule": "linear",
        "warmup_steps": 5,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }


LOOP = {"steps_per_call": 10, "checkpoint_every": 10_000}
SFT: dict[str, Any] = {
    "kind": "sft",
    "tokenizer": {"kind": "word", "vocab_size": 7},
    "model": MODEL,
    "optimizer": optimizer(3e-3),
    "batch_size": 44,
    "epochs": 4.0,
    "sample_prompts": 1,
    "eval_every": 10_000,
    "loop": LOOP,
}


def run(directory: Path, longest: int, stages: dict[str, dict[str, Any]]) -> None:
    data = experiments.data_config(directory / "pairs.jsonl")
    data = dataclasses.replace(data, text_prompt_tokens=(1, 1), max_prompt_tokens=2, max_response_tokens=longest)
    experiments.run(directory / "work", data, stages)


def probabilities(stage: Path, responses: list[tuple[str, ...]], longest: int) -> np.ndarray:
    """A stage's policy's probability of every response, float64[N]."""
    policy = load_stage_policy(stage, seed=0, step=None)
    tokenizer = policy.tokenizer
    ids = [tokenizer.end(tokenizer.encode(" ".join(words)))[:longest] for words in responses]
    tokens, mask = pad_right(ids, longest)
    prompt = np.tile(np.array(tokenizer.begin(tokenizer.encode(PROMPT)), np.int32), (len(ids), 1))

    def logprobs(params: Any, rollout: Rollout) -> jax.Array:
        stats = policy.network.response_stats(params, joined(rollout), temperature=1.0)
        return sequence_logprobs(stats.logprobs, rollout.response_mask)

    rollout = jax.tree.map(jnp.asarray, Rollout(prompt, np.ones(prompt.shape, bool), tokens, mask))
    found = np.exp(np.asarray(jax.jit(logprobs)(policy.params, rollout), np.float64))
    np.testing.assert_allclose(found.sum(), 1, atol=1e-5)
    return found


def make_space(directory: Path, longest: int) -> Space:
    responses = [words for length in range(longest + 1) for words in itertools.product(WORDS, repeat=length)]
    worth = np.random.default_rng(0).choice([1, 3], len(responses))
    directory.mkdir()
    rows = []
    for (one, first), (other, second) in itertools.combinations(zip(responses[1:], worth[1:], strict=True), 2):
        wins = round(4 * first / (first + second))  # data have no empty answers
        rows += [(one, other)] * wins + [(other, one)] * (4 - wins)
    pairs = [
        {"prompt": PROMPT, "chosen": " ".join(chosen), "rejected": " ".join(rejected)} for chosen, rejected in rows
    ]
    (directory / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    table = {" ".join(words): int(value) for words, value in zip(responses, worth, strict=True)}
    (directory / "worth.py").write_text(REWARD.format(worth=table))
    run(directory, longest, {"sft": SFT})
    reference = probabilities(directory / "work" / "sft", responses, longest)
    return Space(directory, longest, responses, worth.astype(np.float64), reference)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Space:
    """Responses of at most two tokens: 13 of them."""
    return make_space(tmp_path_factory.mktemp("two") / "space", 2)


@pytest.fixture(scope="module")
def larger_space(tmp_path_factory: pytest.TempPathFactory) -> Space:
    """Responses of at most three tokens: 40 of them."""
    return make_space(tmp_path_factory.mktemp("three") / "space", 3)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Total variation."""
    return float(0.5 * np.abs(one - other).sum())


def normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def dpo(space: Space, beta: float, **fields: Any) -> dict[str, Any]:
    rows = 4 * len(list(itertools.combinations(space.responses[1:], 2)))
    return {
        "kind": "dpo",
        "policy": "sft",
        "preferences": None,
        "beta": beta,
        "optimizer": optimizer(1e-2),
        "batch_size": rows,
        "epochs": 120.0,
        "sample_prompts": 1,
        "eval_every": 10_000,
        "loop": LOOP,
        **fields,
    }


def assert_optimal_for_dpo(space: Space, found: np.ndarray, beta: float) -> None:
    """Rafailov et al. 2023, eq. 4, of responses that pairs are made of: the loss leaves the empty one free."""

    def optimum(beta: float) -> np.ndarray:
        return normalised((space.reference * space.worth ** (1 / beta))[1:])

    assert distance(normalised(space.reference[1:]), optimum(beta)) > 0.2
    assert distance(optimum(1.1 * beta), optimum(beta)) > 3 * CLOSE
    assert distance(normalised(found[1:]), optimum(beta)) < CLOSE


@pytest.mark.nightly
def test_dpo_ends_at_the_reference_times_the_exponential_reward(space):
    assert_optimal_for_dpo(space, space.train("dpo", dpo(space, 0.5)), 0.5)


@pytest.mark.nightly
def test_dpo_ends_there_also_where_a_third_token_is_to_be_chosen(larger_space):
    found = larger_space.train("dpo", dpo(larger_space, 0.5, epochs=900.0))
    assert_optimal_for_dpo(larger_space, found, 0.5)


@pytest.mark.nightly
def test_ipo_ends_where_each_responses_log_ratio_a_token_is_how_often_it_is_preferred(space):
    r"""$\rho / |y| = E[p(y \succ y')] / \tau$ but for a constant: Azar et al. 2023, section 5, by the token."""
    beta = 0.5
    wins = space.worth[:, None] / (space.worth[:, None] + space.worth[None, 1:])
    found = space.train("ipo", dpo(space, beta, loss={"losses": ("ipo",)}))

    def optimum(beta: float) -> np.ndarray:
        """With what the policy leaves to the empty response, of which the loss says nothing."""

        def shifted(constant: float) -> np.ndarray:
            return (space.reference * np.exp(space.lengths * (wins.mean(axis=1) / beta + constant)))[1:]

        def excess(constant: float) -> float:
            return float(shifted(constant).sum() - (1 - found[0]))

        return shifted(float(scipy.optimize.root_scalar(excess, bracket=(-20, 20)).root))

    assert distance(space.reference[1:], optimum(beta)) > 0.1
    assert distance(optimum(1.1 * beta), optimum(beta)) > 3 * CLOSE
    assert distance(found[1:], optimum(beta)) < CLOSE


def rl(space: Space, beta: float, **fields: Any) -> dict[str, Any]:
    return {
        "policy": "sft",
        "reward_model": {"functions": (f"{space.directory / 'worth.py'}:reward",)},
        "kl_coef": beta,
        "iterations": 150,
        "batch_size": 256,
        "minibatches": 1,
        "epochs": 1,
        "temperature": 1.0,
        "optimizer": optimizer(1e-2),
        "samples_every": 10_000,
        "samples_written": 1,
        "loop": {"steps_per_call": 1, "checkpoint_every": 10_000},
        **fields,
    }


def assert_optimal_for_rl(space: Space, found: np.ndarray, beta: float) -> None:
    def optimum(beta: float) -> np.ndarray:
        return normalised(space.reference * space.worth ** (1 / beta))

    assert distance(space.reference, optimum(beta)) > 0.2
    assert distance(optimum(1.1 * beta), optimum(beta)) > 3 * CLOSE
    assert distance(found, optimum(beta)) < CLOSE
    objective = found @ (np.log(space.worth) - beta * np.log(found / space.reference))
    best = beta * np.log(space.reference @ space.worth ** (1 / beta))
    assert best - 1e-3 < objective < best + 1e-6


def rloo(space: Space, beta: float, **fields: Any) -> dict[str, Any]:
    return rl(space, beta, kind="group_rl", method="rloo", num_generations=4, **fields)


@pytest.mark.nightly
def test_rloo_ends_at_the_reference_times_the_exponential_reward(space):
    section = rloo(space, 0.5, iterations=120, batch_size=128)
    assert_optimal_for_rl(space, space.train("rloo", section), 0.5)


@pytest.mark.nightly
def test_rloo_ends_there_also_where_a_third_token_is_to_be_chosen(larger_space):
    found = larger_space.train("rloo", rloo(larger_space, 0.5, iterations=1500))
    assert_optimal_for_rl(larger_space, found, 0.5)


@pytest.mark.nightly
def test_ppo_ends_at_the_reference_times_the_exponential_reward(space):
    beta = 0.5
    section = rl(
        space,
        beta,
        kind="ppo",
        gamma=1.0,
        gae_lambda=1.0,
        clip_ratio=0.2,
        value_clip=None,
        vf_coef=1.0,
        whiten_advantages=False,
        value_trunk="policy",
    )
    assert_optimal_for_rl(space, space.train("ppo", section), beta)
