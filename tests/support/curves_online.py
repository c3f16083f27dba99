"""Whole runs of PPO, GRPO and RLOO on given rollouts, to compare with those of TRL's trainers.

Only the first step of an iteration, sampling, is replaced: numpy draws the responses, so that both sides learn from
the same ones. Scores, advantages and updates are the stage's.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.methods.policy_gradient import Iteration
from rlhf_jax.methods.policy_parts import Sampled
from rlhf_jax.types import Rollout
from tests.support import curves, experiments
from tests.support.curves import BATCH, EOS, MOST_PROMPT, MOST_RESPONSE, VOCABULARY, Curve, World

ITERATIONS, EPOCHS, GROUP = 50, 2, 4
UPDATES = ITERATIONS * EPOCHS
OPTIMIZER = curves.OPTIMIZER | {"learning_rate": 2e-3}
KL_COEF, CLIP = 0.05, 0.2
PPO = {"gamma": 0.95, "gae_lambda": 0.9, "clip_ratio": CLIP, "value_clip": 0.3, "vf_coef": 0.5, "kl_coef": KL_COEF}
MISSING_EOS_PENALTY = 0.7
SECTIONS = ("grpo", "rloo", "ppo")
NETWORKS = {"grpo": ("policy",), "rloo": ("policy",), "ppo": ("policy", "value")}  # that are trained


class Rollouts(NamedTuple):
    """The prompts and responses of all iterations, unpadded; the rows of a group share their prompt."""

    prompts: list[list[list[int]]]  # [ITERATIONS][BATCH][tokens]
    responses: list[list[list[int]]]


def rollouts(name: str) -> Rollouts:
    """Draw prompts, and responses of 1 to MOST_RESPONSE tokens that end with EOS or are cut off.

    PPO's responses all have MOST_RESPONSE tokens. TRL gives the score of a shorter one to the position after EOS, and
    also fits the value there; our stage gives it to EOS. In responses without padding both give it to the last token.
    """
    rng = np.random.default_rng(2)
    prompts, responses = [], []
    for _ in range(ITERATIONS):
        rows = [rng.integers(2, VOCABULARY, rng.integers(1, MOST_PROMPT + 1)).tolist() for _ in range(BATCH // GROUP)]
        prompts.append([row for row in rows for _ in range(GROUP)])
        responses.append([])
        for _ in range(BATCH):
            length = MOST_RESPONSE if name == "ppo" else rng.integers(1, MOST_RESPONSE + 1)
            response = rng.integers(2, VOCABULARY, length).tolist()
            if length < MOST_RESPONSE or rng.random() < 0.5:
                response[-1] = EOS
            responses[-1].append(response)
    return Rollouts(prompts, responses)


def score(completions: list[str], **columns: Any) -> list[float]:
    """Reward words by their numbers."""
    return [sum(map(int, re.findall(r"w(\d+)", text))) / 20 for text in completions]


def run(name: str, world: World, directory: Path, *, trim_padding: bool = False) -> Curve:
    """Run the stage that `section` describes; losses and norms are means over an iteration's updates.

    Args: trim_padding packs the rows, as stages do by default, in two programs instead of one.
    """
    given = rollouts(name)
    data = directory / "prompts.jsonl"
    texts = [" ".join(f"w{token}" for token in row) for rows in given.prompts for row in rows[::GROUP]]
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    table = _padded(given)

    def sample(self: Any, state: Any, frozen: Any, batch: Any, run_key: Any, prompt_width: int) -> Sampled:
        rollout = jax.tree.map(lambda leaf: jnp.asarray(leaf)[state.step], table)
        return Sampled(rollout, jnp.zeros(rollout.response.shape), None)

    with mock.patch.object(Iteration, "sample", sample):
        place = experiments.run(
            directory / "run", data, {name: section(name, world) | {"trim_padding": trim_padding}}
        ).find(name)
    clipped = [row["policy/clipfrac_avg"] for row in experiments.rows(place / "metrics.jsonl")]
    assert 0 < max(clipped) < 1  # the bounds on the ratio are part of the run
    weights = experiments.final_state(place)[1]
    return curves.read_metrics(place, ITERATIONS, curves.paths({key: weights[key] for key in NETWORKS[name]}))


def over_iterations(run: Curve) -> Curve:
    """Average the updates of each iteration, as our stages do in their metrics."""
    loss, grad_norm = (values.reshape(ITERATIONS, EPOCHS).mean(axis=1) for values in run[:2])
    return run._replace(loss=loss, grad_norm=grad_norm)


def section(name: str, world: World) -> dict[str, Any]:
    """A stage's config."""
    common = {
        "policy": str(world.policy),
        "iterations": ITERATIONS,
        "batch_size": BATCH,
        "minibatches": 1,
        "epochs": EPOCHS,
        "temperature": 1.0,
        "optimizer": OPTIMIZER,
        "samples_every": ITERATIONS,
        "samples_written": 1,
        "loop": {"steps_per_call": 10, "checkpoint_every": ITERATIONS},
    }
    if name == "ppo":
        return common | {
            "kind": "ppo",
            "reward_model": str(world.judge),
            "value_head": "reward_model",
            "missing_eos_penalty": MISSING_EOS_PENALTY,
            # TRL's PPOTrainer does not clip gradients.
            "optimizer": OPTIMIZER | {"max_grad_norm": 1e9},
            **PPO,
        }
    reward = {"functions": (f"{__name__}:score",)}
    own = {"kind": "group_rl", "method": name, "num_generations": GROUP, "kl_coef": KL_COEF, "reward_model": reward}
    return common | own


def _padded(given: Rollouts) -> Rollout[np.ndarray]:
    """All rollouts as arrays [ITERATIONS, BATCH, ...]."""
    shape = (ITERATIONS, BATCH)
    prompt, response = np.zeros((*shape, MOST_PROMPT), np.int32), np.zeros((*shape, MOST_RESPONSE), np.int32)
    prompt_mask, response_mask = prompt.astype(bool), response.astype(bool)
    for place in np.ndindex(*shape):
        before, after = given.prompts[place[0]][place[1]], given.responses[place[0]][place[1]]
        prompt[place][-len(before) :], prompt_mask[place][-len(before) :] = before, True
        response[place][: len(after)], response_mask[place][: len(after)] = after, True
    return Rollout(prompt, prompt_mask, response, response_mask)
