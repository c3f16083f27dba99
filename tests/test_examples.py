"""The examples of examples/, run through the command line."""

import json
import shutil

import jax
import numpy as np
import pytest

from rlhf_jax.interop import hf
from rlhf_jax.interop.families import USER_FAMILY
from rlhf_jax.loading.export import export
from rlhf_jax.loading.pretrained import load_policy
from rlhf_jax.main import main
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.reports.run import Run
from rlhf_jax.types import RlhfError
from tests.support import checkpoints, experiments, tokenizer_files
from tests.support.commands import fails, succeeds
from tests.support.own_data import PREFERENCES, ROOT, chat_arguments, files


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory of a user's own, with a copy of the examples."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    checkpoints.reward_model(tmp_path / "judge")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_stage_of_ones_own(place, capsys):
    fields = {"kind": "examples/stage.py:Confirm", "preferences": "None", "reward_model": "judge"}
    flags = [PREFERENCES, *files(place), *(f"--config.confirmed.{key}={value}" for key, value in fields.items())]
    flags += ["--config.sft.demonstrations=confirmed", "--config.stages=('confirmed', 'sft')"]
    assert main([*flags, "--workdir=run"]) == 0
    rows = [json.loads(line) for line in (place / "run" / "confirmed" / "preferences.jsonl").read_text().splitlines()]
    summary = json.loads((place / "run" / "confirmed" / "summary.json").read_text())
    assert 0 < len(rows) < 64 and summary["preferences.jsonl"] == {"read": 64, "kept": len(rows)}
    assert all(row["margin"] >= 0 for row in rows)
    assert "examples/stage.py:Confirm" in (place / "run" / "report.html").read_text()
    capsys.readouterr()

    assert main([*flags, "--workdir=run"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*flags, "--workdir=new", "--inputs=run", "--config.sft.epochs=2"]) == 0
    assert not (place / "new" / "confirmed").exists(), "read from run"
    assert Run("new", "run").stages == ["confirmed", "sft"]

    assert "margin: 0.0 there, 9.0 now" in fails(capsys, *flags, "--workdir=run", "--config.confirmed.margin=9")
    message = fails(capsys, *flags, "--workdir=other", "--config.confirmed.margin=1e6")
    assert "config.confirmed.margin = 1000000.0 leaves no pair for preferences.jsonl: lower it" in message
    assert "Did you mean 'margin'?" in fails(capsys, *flags, "--workdir=run", "--config.confirmed.margins=9")
    file = place / "examples" / "stage.py"
    file.write_text(file.read_text().replace("margin >= config.margin", "margin > config.margin"))
    assert "examples/stage.py:Confirm" in fails(capsys, *flags, "--workdir=run")


def test_fields_of_a_stage_of_ones_own(place, capsys):
    printed = succeeds(capsys, "fields", "examples/stage.py:Confirm")
    assert printed.startswith(
        "examples/stage.py:Confirm: Keep the preference pairs whose labels a reward model\nconfirms"
    )
    assert "\nmargin = 0.0   number >= 0\n      Least margin: score of the chosen response minus" in printed
    assert "is a function: make it a rlhf_jax.stages.kinds.Kind" in fails(capsys, "fields", "examples/stage.py:run")


FAMILY = "examples/family.py:STARCODER2"


@pytest.fixture
def starcoder(place):
    """A checkpoint of a family that the package does not cover."""
    config = {
        "architectures": ["Starcoder2ForCausalLM"],
        "model_type": "starcoder2",
        "vocab_size": 420,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "sliding_window": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    ours = config | {USER_FAMILY: FAMILY}
    shape, vocab_size = hf.read_shape(ours, param_dtype="float32", compute_dtype="float32")
    params = PolicyNetwork(shape, vocab_size, ()).init(jax.random.key(0))
    hf.save_pretrained(place / "coder", "policy", params, ours)
    tokenizer_files.chatml(place / "coder")
    return place


@pytest.mark.nightly
def test_a_model_family_of_ones_own(starcoder, capsys):
    flags = [*chat_arguments("coder", starcoder), "--workdir=run", "--stage=sft"]
    message = fails(capsys, *flags)
    assert "model_type = 'starcoder2' is not supported" in message and "write a Family as in" in message
    flags += [f"--config.sft.model.family={FAMILY}"]
    assert main(flags) == 0
    policy = Run("run").load_policy("sft")
    assert policy.network.config.norm == "layer" and policy.network.config.windows == (8, 8)
    export(policy, "out")
    written = json.loads((starcoder / "out" / "config.json").read_text())
    assert written["model_type"] == "starcoder2" and USER_FAMILY not in written
    again = load_policy("out", family=FAMILY)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, policy.params))

    capsys.readouterr()
    sample = ["sample", "--model=out", "--prompt=film", "--max-new-tokens=2"]
    assert "is not supported" in fails(capsys, *sample)
    assert succeeds(capsys, *sample, f"--family={FAMILY}")
    file = starcoder / "examples" / "family.py"
    file.write_text(file.read_text() + "\n# changed\n")
    assert FAMILY in fails(capsys, *flags)


def test_a_family_without_a_tensor_is_named(starcoder, capsys):
    file = starcoder / "examples" / "family.py"
    file.write_text(file.read_text().replace('*linear(f"{LAYER}mlp.c_fc", "up"),', ""))
    message = fails(capsys, "sample", "--model=coder", "--prompt=film", f"--family={FAMILY}")
    assert "model family 'starcoder2' has no tensor for block_0/up/bias, block_0/up/kernel" in message


def test_a_family_is_the_checkpoints_and_a_family(starcoder, capsys):
    sample = ["sample", "--prompt=film"]
    checkpoints.policy(starcoder / "llama")
    assert "'llama', but examples" in fails(capsys, *sample, "--model=llama", f"--family={FAMILY}")
    assert "is a function" in fails(capsys, *sample, "--model=coder", "--family=examples/family.py:fields")
    assert "there is none: leave it out" in fails(capsys, *sample, "--workdir=run", f"--family={FAMILY}")


def test_a_checkpoint_does_not_choose_the_code_that_reads_it(starcoder, capsys):
    file = starcoder / "coder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {USER_FAMILY: FAMILY}))
    assert "is not supported" in fails(capsys, "sample", "--model=coder", "--prompt=film")


@pytest.mark.nightly
def test_a_reward_loss_of_ones_own(place):
    """At a scale at which no pair is beyond the hinge, the loss is the scale plus the margins that are left."""
    name, file = "examples/reward_loss.py:hinge", place / "examples" / "reward_loss.py"
    file.write_text(file.read_text().replace("scale: float = 1.0", "scale: float = 100.0"))
    data = experiments.preference_rows(place / "pairs.jsonl")
    data.write_text(data.read_text().replace("}\n", ', "margin": 0.5}\n'))
    section = {
        "kind": "reward_model",
        "policy": None,
        "preferences": None,
        "model": {"init": str(place / "judge")},
        "pooling": "last",
        "loss": {"name": name},
        "optimizer": experiments.OPTIMIZER,
        "batch_size": 8,
        "epochs": 1.0,
        "eval_every": 4,
        "loop": experiments.LOOP,
    }
    done = experiments.run(place / "run", data, {"reward": section})
    first = experiments.rows(done.find("reward") / "metrics.jsonl")[0]
    np.testing.assert_allclose(first["loss"], 100.5 - first["margin"], rtol=1e-5)
    file.write_text(file.read_text().replace("scale: float = 100.0", "scale: float = 50.0"))
    with pytest.raises(RlhfError, match=r"examples/reward_loss\.py"):
        experiments.run(place / "run", data, {"reward": section})
    file.write_text("def hinge(chosen, rejected): ...\n")
    with pytest.raises(
        RlhfError, match=r"signature .*: write `def hinge\(chosen_scores, rejected_scores, \*, \.\.\.\)`"
    ):
        experiments.run(place / "other", data, {"reward": section})
    file.write_text("def hinge(chosen_scores, rejected_scores): return chosen_scores.mean()\n")
    with pytest.raises(RlhfError, match=r"returned the shape \(\): return one number per pair"):
        experiments.run(place / "other", data, {"reward": section})


@pytest.mark.nightly
def test_a_preference_loss_of_ones_own(place):
    """In a sum with a built-in loss; at the first step the policy is the reference, and only the lengths differ."""
    name = "examples/preference_loss.py:r_dpo"
    loss = {"losses": [name, "sft"], "loss_weights": [2.0, 0.1]}
    section = experiments.dpo_section(experiments.models(place / "models")[0], loss=loss, epochs=1.0)
    data = experiments.preference_rows(place / "pairs.jsonl")
    done = experiments.run(place / "run", data, {"dpo": section})
    first = experiments.rows(done.find("dpo") / "metrics.jsonl")[0]
    assert 1e-6 < abs(first[f"loss/{name}"] - np.log(2)) < 0.1
    np.testing.assert_allclose(first["loss"], 2 * first[f"loss/{name}"] + 0.1 * first["loss/sft"], rtol=1e-5)
    file = place / "examples" / "preference_loss.py"
    file.write_text(file.read_text().replace("length_penalty: float = 0.01", "length_penalty: float = 0.02"))
    with pytest.raises(RlhfError, match=r"examples/preference_loss\.py"):
        experiments.run(place / "run", data, {"dpo": section})


def test_a_reward_of_ones_own(place):
    """Best-of-N by brevity: the best of two answers is shorter than the first, and scores count words."""
    name, file = "examples/reward.py:brevity", place / "examples" / "reward.py"
    section = {
        "kind": "best_of_n",
        "policy": experiments.models(place / "models")[0],
        "reward_model": {"functions": (name,)},
        "judge": None,
        "prompts": 8,
        "pool": 2,
        "temperature": 1.0,
    }
    data = experiments.questions(place / "questions.jsonl", 16)
    done = experiments.run(place / "run", data, {"best": section})
    one, two = (row["proxy"] for row in experiments.rows(done.find("best") / "curve.jsonl"))
    assert -0.8 <= one < two <= 0, "at most eight tokens, each at most a word"
    file.write_text(file.read_text().replace("/ 10", "/ 20"))
    with pytest.raises(RlhfError, match=r"examples/reward\.py"):
        experiments.run(place / "run", data, {"best": section})
