"""A hand-written loop learns, and its policy goes back into an evaluation."""

import dataclasses
import runpy

import jax
import numpy as np
import pytest

import rlhf_jax
from rlhf_jax import config as configs
from rlhf_jax.runtime.files import write_rows
from rlhf_jax.stages.evaluate import EvaluateConfig
from tests.support import workdirs
from tests.support.own_data import ROOT

EXAMPLE = ROOT / "examples" / "training_loop.py"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run whose pairs prefer `good` to `bad`."""
    root = tmp_path_factory.mktemp("run")
    workdirs.write_models(root)
    pairs = [{"prompt": prompt, "chosen": " good", "rejected": " bad"} for prompt in ("a", "film", "it is")] * 16
    directory = workdirs.write_stage(root, "preferences", {"kind": "preferences", "policy": "sft"}, inputs=("sft",))
    write_rows(directory / "preferences.jsonl", pairs)
    return root


def test_a_hand_written_loop_learns_and_its_policy_comes_back(workdir, tmp_path, capsys):
    out = tmp_path / "mine"
    table = runpy.run_path(str(EXAMPLE))["main"](str(workdir), str(out))
    assert table.index.tolist() == ["sft", "mine"] and table["kl"].iloc[0] == 0 != table["kl"].iloc[1]
    assert capsys.readouterr().out.splitlines()[0].endswith("loss 0.6931"), "log 2 where the policy is its reference"
    run = rlhf_jax.Run(workdir)
    start, trained = run.load_policy("sft"), rlhf_jax.load_policy(out)
    rows = [{"prompt": "film", "completion": word} for word in (" good", " bad")]
    margins = [np.subtract(*rlhf_jax.logprobs(policy, rows)["logprob"]) for policy in (start, trained)]
    assert margins[1] > margins[0] + 0.1
    assert not jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), start.params, trained.params))
    section = dict.fromkeys((field.name for field in dataclasses.fields(EvaluateConfig)), 1) | {
        "kind": "evaluate", "reference": "sft", "policies": ("ppo", str(out)), "best_of": (), "reward_model": "rm",
        "judge": None, "against": (), "temperature": 1.0, "bootstrap_rounds": 100,
    }  # fmt: skip
    config = configs.build(EvaluateConfig, section, "config.evaluate")
    assert configs.checkpoints(config, {"sft", "ppo", "rm"}) == (str(out),), "its hash is part of the identity"


def test_the_loop_is_about_thirty_lines():
    text = EXAMPLE.read_text()
    start, stop = text.index("def train_dpo"), text.index("def main")
    assert sum(bool(line.strip()) for line in text[start:stop].splitlines()) <= 32
