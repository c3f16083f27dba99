"""Our side of the training benchmark: a stage of `experiments/preferences.py`, run as `rlhf-jax` runs it.

The stage's progress bar, which is updated after every step, is replaced by the clock of the benchmark.
"""

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from rich.console import Console

from experiments.benchmarks import training_turns
from experiments.benchmarks.generation import seconds
from experiments.benchmarks.training_turns import BETA, KL_COEF, LEARNING_RATE, Finished, Turns, Work, read_work
from rlhf_jax import experiment
from rlhf_jax.api import load_config
from rlhf_jax.loading.context import Context
from rlhf_jax.runtime import provenance
from rlhf_jax.runtime.files import read_rows
from rlhf_jax.runtime.huge_pages import restart_with_huge_pages
from rlhf_jax.runtime.progress import Bar, Display
from rlhf_jax.runtime.workdir import Workdir
from rlhf_jax.stages.kinds import find_kind

NEVER = 10**9
MATRIX = 1024
COMPILED = "/jax/core/compile/backend_compile_duration"
"""JAX's event of a compiled program."""


class Clock(Bar):
    """Progress bar that counts steps and shows nothing."""

    def __init__(self, turns: Turns) -> None:
        """Add a bar to a display without output."""
        progress = Display(Console(quiet=True)).progress
        super().__init__(progress, progress.add_task("", details=[]), "")
        self._turns = turns

    def update(self, done: int, total: int, figures: Mapping[str, float]) -> None:
        """Count a step."""
        self._turns.step()


def matrix_rate() -> dict[str, float]:
    """FLOPs per second of products of matrices."""
    x, multiply = jnp.ones((MATRIX, MATRIX)), jax.jit(jnp.matmul)
    return {"matrix_flops_per_second": 2 * MATRIX**3 / min(seconds(lambda: multiply(x, x)) for _ in range(6))}


def config_of(work: Work) -> ConfigDict:
    """Make the config of an experiment with one stage, named after the kind of work."""
    config = load_config(f"preferences:init={work.policy}").unlock()
    config.stages = (work.kind,)
    config.data.update({"train": work.train, "eval": work.eval, "text_prompt_tokens": (1, 1)})
    config.data.update({"max_prompt_tokens": work.prompt, "max_response_tokens": work.response})
    config.reward_model.model.init = config.ppo.reward_model = work.reward_model
    config.dpo.update({"policy": work.policy, "beta": BETA})
    config.ppo.update({"policy": work.policy, "kl_coef": KL_COEF, "missing_eos_penalty": 0.0})
    config.kto = ConfigDict({**config.dpo.to_dict(), "kind": "kto"})
    ppo_alone = ("gamma", "gae_lambda", "clip_ratio", "value_clip", "vf_coef")
    config.grpo = ConfigDict(
        {name: value for name, value in config.ppo.items() if name not in ppo_alone}
        | {"kind": "group_rl", "method": "grpo", "num_generations": work.group}
        | {"reward_model": {"functions": (f"{training_turns.__file__}:score",)}}
    )
    stage, epochs = config[work.kind], work.rounds + 1
    stage.batch_size = work.batch
    stage.optimizer.update({"learning_rate": LEARNING_RATE, "schedule": "constant", "warmup_steps": 0})
    stage.loop.update({"steps_per_call": 1, "checkpoint_every": NEVER})
    if "iterations" in stage:
        stage.update({"iterations": work.steps * epochs, "minibatches": 1, "epochs": 1, "samples_every": NEVER})
    else:  # a stage evaluates after its last step, which is one more than the benchmark lets it run
        stage.update({"epochs": epochs + 1 / work.steps, "eval_every": NEVER})
    if "sample_prompts" in stage:
        stage.sample_prompts = 0
    return config


def main() -> None:
    """Run the stage until the last round, and report tokens and compile time."""
    work, compiled = read_work(), []
    turns = Turns(work, matrix_rate)

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    parsed = experiment.parse(config_of(work))
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(
            workdir=Workdir(Path(scratch)),
            stages=tuple(parsed.stages),
            name=work.kind,
            seed=parsed.seed,
            seeds=parsed.seeds,
            data=parsed.data,
            runtime=parsed.runtime,
            bar=Clock(turns),
        )
        context.directory.mkdir()
        stage = parsed.stages[work.kind]
        with contextlib.suppress(Finished):
            find_kind(stage.kind, work.kind).run(stage, context)
        tokens = [row["num_tokens"] for row in read_rows(context.directory / "metrics.jsonl")]
    here = provenance.environment()
    turns.report(tokens=turns.per_round(tokens), compile_seconds=sum(compiled), environment=here, packages={})


if __name__ == "__main__":
    restart_with_huge_pages()  # as rlhf-jax does
    main()
