"""Tiny experiments of stages that start from checkpoints, so that nothing need be trained before what is tested."""

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from rich.console import Console

from rlhf_jax import experiment
from rlhf_jax.data.pipeline import DataConfig
from rlhf_jax.interop import hf
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.runtime.checkpoints import steps_of
from rlhf_jax.runtime.workdir import Workdir
from rlhf_jax.text.tokenizer import BOS, EOS, PAD, UNKNOWN, train_word_tokenizer
from tests.support import checkpoints, tokenizer_files

OPTIMIZER = {
    "learning_rate": 3e-3,
    "schedule": "constant",
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "epsilon": 1e-5,
    "max_grad_norm": 1.0,
}
LOOP = {"steps_per_call": 4, "checkpoint_every": 100}
RUNTIME = {
    "strategy": "jit",
    "data": 1,
    "fsdp": 1,
    "tensor": 1,
    "inference_batch": 32,
    "deterministic": False,
    "compile_quickly": True,
}
WORDS = ("the", "film", "is", "good", "bad", "dull")
TEMPLATE = (
    "{% for message in messages %}{{ message.content }} "
    "{{ eos_token if message.role == 'assistant' else ':' }}{% endfor %}"
)
SHAPE = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 11,
}


def models(directory: Path) -> tuple[str, str]:
    """A random language model of chats in a few words, and a random reward model.

    Tokens that are no text have next to no probability, and scores depend on all words alike: what is read again, as
    text, is what was scored.
    """
    backend = train_word_tokenizer([" ".join(WORDS) + " :"], SHAPE["vocab_size"])
    names = {"eos_token": EOS, "pad_token": PAD, "bos_token": BOS, "unk_token": UNKNOWN}
    silent = jnp.array([backend.token_to_id(token) for token in (PAD, BOS, UNKNOWN)])
    config = checkpoints.CONFIG | SHAPE
    shape = checkpoints.shape(config)
    policy = PolicyNetwork(shape, SHAPE["vocab_size"], ()).init(jax.random.key(0))
    policy["embedding"] = policy["embedding"].at[:, 0].set(4 * jnp.std(policy["embedding"]))
    policy["head"] = 3 * policy["head"].at[silent].set(-jnp.eye(1, shape.d_model)[0])
    reward = ScalarNetwork(shape, SHAPE["vocab_size"], "last", bias=False).init(jax.random.key(1))
    attention = reward["body"]["block_0"]["attention"]
    for name, scale in (("q", 0), ("o", 10)):
        attention[name]["kernel"] = scale * attention[name]["kernel"]
    places = directory / "model", directory / "judge"
    hf.save_pretrained(places[0], "policy", policy, config)
    hf.save_pretrained(places[1], "reward", reward, config | checkpoints.REWARD)
    for place in places:
        tokenizer_files.save(place, backend, TEMPLATE, **names)
    return str(places[0]), str(places[1])


def questions(path: Path, rows: int) -> Path:
    """Prompts that are chats of one message."""
    rng = np.random.default_rng(rows)
    lines = [
        json.dumps({"prompt": [{"role": "user", "content": " ".join(rng.choice(WORDS, rng.integers(1, 4)))}]}) + "\n"
        for _ in range(rows)
    ]
    path.write_text("".join(lines))
    return path


def data_config(data: Path | str) -> DataConfig:
    return DataConfig(
        train=str(data),
        eval=str(data),
        test=None,
        limit=None,
        text_prompt_tokens=(1, 2),
        max_prompt_tokens=24,
        max_response_tokens=8,
    )


def run(
    workdir: Path,
    data: Path | DataConfig,
    stages: dict[str, dict[str, Any]],
    *,
    console: io.StringIO | None = None,
    **common: Any,
) -> Workdir:
    """Runs stages, sections by name, on `data` for training and evaluation; returns the work directory.

    Args: console takes what a person would see.
    """
    config = {
        "seed": 0,
        "seeds": 1,
        "stages": tuple(stages),
        "data": dataclasses.asdict(data_config(data) if isinstance(data, Path) else data),
        "runtime": RUNTIME,
        **stages,
        **common,
    }
    place = Workdir(workdir)
    experiment.run(experiment.parse(ConfigDict(config)), place, None, Console(file=console or io.StringIO()))
    return place


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def assert_resumes(whole: Path, data: Path | DataConfig, stages: dict[str, dict[str, Any]], **common: Any) -> None:
    """A process that dies after its last step, before that is saved, leaves nothing behind but what is done again.

    Args: the work directory of a run of one stage with two checkpoints; how it was run.
    """
    (name,) = stages
    other = whole.parent / f"{whole.name} again"
    shutil.copytree(whole, other)
    stage, again = whole / name, other / name
    before, last = steps_of(stage / "checkpoints")[-2:]
    shutil.rmtree(again / "checkpoints" / str(last))
    for file in ("complete.json", "summary.json"):
        (again / file).unlink()
    for file in ("metrics.jsonl", "samples.jsonl"):
        written = rows(again / file)
        undone = [json.dumps(row | {"loss": 7.5} if row["step"] > before else row) for row in written]
        (again / file).write_text("\n".join([*undone, '{"step": 1']))
    run(other, data, stages, **common)
    assert without_clock(again / "metrics.jsonl") == without_clock(stage / "metrics.jsonl")
    assert (again / "samples.jsonl").read_bytes() == (stage / "samples.jsonl").read_bytes()
    assert_same_bits(final_state(again), final_state(stage))


def without_clock(path: Path) -> list[dict[str, Any]]:
    """Rows of a file without wall time, and without the seconds that evaluations give for each stage."""
    clock = ("time/", "seconds")
    return [{key: value for key, value in row.items() if not key.startswith(clock)} for row in rows(path)]


def final_state(stage_directory: Path) -> tuple[int, dict[str, Any]]:
    """The step of a stage's last checkpoint, and all that it holds."""
    with ocp.CheckpointManager(stage_directory / "checkpoints") as manager:
        step = manager.latest_step()
        names = [path.name for path in (stage_directory / "checkpoints" / str(step)).iterdir()]
        here = ocp.args.StandardRestore(fallback_sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        items = {name: here for name in names if not name.startswith(("_", "commit"))}
        return step, dict(manager.restore(step, args=ocp.args.Composite(**items)).items())


def assert_same_bits(one: Any, other: Any) -> None:
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    assert len(leaves) == len(others) > 5
    for leaf, twin in zip(leaves, others, strict=True):
        first, second = np.asarray(leaf), np.asarray(twin)
        assert first.dtype == second.dtype and first.tobytes() == second.tobytes()


def preference_rows(path: Path) -> Path:
    """Pairs of chats of one message each."""
    rng = np.random.default_rng(0)

    def say(role):
        return [{"role": role, "content": " ".join(rng.choice(WORDS, rng.integers(1, 6)))}]

    rows = [{"prompt": say("user"), "chosen": say("assistant"), "rejected": say("assistant")} for _ in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dpo_section(policy: str, **changes: Any) -> dict[str, Any]:
    """A DPO stage of twelve updates on `preference_rows`."""
    return {
        "kind": "dpo",
        "policy": policy,
        "preferences": None,
        "beta": 0.3,
        "optimizer": OPTIMIZER,
        "batch_size": 8,
        "epochs": 4.0,
        "sample_prompts": 0,
        "eval_every": 4,
        "loop": LOOP,
        **changes,
    }
