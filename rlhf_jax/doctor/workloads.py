"""Speed of sampling, DPO and PPO on a device, beside the least time that its measured rates allow."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from ml_collections import ConfigDict

from rlhf_jax import experiment
from rlhf_jax.doctor.rates import Rates
from rlhf_jax.planning.compiling import compile_program
from rlhf_jax.planning.machines import Chip, Machine
from rlhf_jax.planning.outlines import Outlines
from rlhf_jax.planning.stage_outlines import ProgramOutline, RunOutline
from rlhf_jax.planning.stage_programs import outline
from rlhf_jax.runtime.programs import MeshPlacement, make_placement

SHAPES = {
    "tiny": {"d_model": 128, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 256, "vocab_size": 4096},
    "S": {"d_model": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "d_ff": 1536, "vocab_size": 49152},
    "L": {"d_model": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "d_ff": 8192, "vocab_size": 128256},
}
"""Shapes of models: `S` is SmolLM2-135M's, `L` Llama-3.2-1B's. Weights are random."""


class Workload(NamedTuple):
    """A stage at a size."""

    stage: str  # sampling, dpo or ppo
    shape: str
    rows: int  # responses, or pairs
    prompt: int  # tokens of every prompt
    response: int  # tokens of every response


class Speed(NamedTuple):
    """Measured speed of a workload."""

    seconds: float  # of a call: a batch of samples, an update, or an iteration
    tokens: int  # of a call: sampled, or of all sequences
    share: float  # of the time that the measured rates allow, 1 at best
    bound: str  # rate that binds
    peak: int  # bytes of memory, as compiled
    compile_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def measure(workload: Workload, device: jax.Device, rates: Rates, seconds: float) -> Speed | None:
    """Compile a workload, and run it for some seconds; None if it does not fit."""
    machine = Machine(f"{device.platform}:1", chip_of(device, rates))
    programs, row_tokens = programs_of(workload, device)
    measured, spent, needed = [], 0.0, 0
    for program in programs:
        compiled = compile_program(program, machine, 1)
        limit = machine.memory
        if compiled.memory is None or (limit is not None and compiled.memory.peak > limit):
            return None
        needed = max(needed, compiled.memory.peak)
        measured.append((compiled, _seconds(program, seconds / len(programs))))
        spent += compiled.seconds
    total = sum(elapsed for _, elapsed in measured)
    least = [compiled.times(machine, "bfloat16") for compiled, _ in measured]
    bounds = [max(times, key=lambda name, times=times: times[name]) for times in least]
    share = sum(times[bound] for times, bound in zip(least, bounds, strict=True)) / total
    tokens = workload.rows * row_tokens
    return Speed(total, tokens, share, " and ".join(dict.fromkeys(bounds)), needed, spent)


def chip_of(device: jax.Device, rates: Rates) -> Chip:
    """Return the device with its measured rates."""
    stats = device.memory_stats() or {}
    platform: Any = device.platform
    return Chip(
        platform,
        rates.products["bfloat16"],
        rates.products["float32"],
        rates.memory,
        rates.links or 1.0,
        stats.get("bytes_limit"),
    )


def programs_of(workload: Workload, device: jax.Device) -> tuple[tuple[ProgramOutline, ...], int]:
    """Return the programs of a workload, and the tokens of a row that count."""
    checked = experiment.parse(config_of(workload))
    placement = make_placement(checked.runtime, 1, [device])
    assert isinstance(placement, MeshPlacement)
    run = RunOutline(Outlines(checked.stages), checked.stages, checked.data, checked.runtime, placement)
    found = outline(run, workload.stage)
    assert found is not None
    whole = workload.prompt + workload.response
    return found.programs, {"sampling": workload.response, "dpo": 2 * whole, "ppo": whole}[workload.stage]


def _seconds(program: ProgramOutline, budget: float) -> float:
    """Fastest call within some seconds, after one that compiles; at least two are timed."""
    args, times = filled(program.args), []
    found = jax.block_until_ready(program.function(*args))
    end = time.perf_counter() + budget
    while len(times) < 2 or time.perf_counter() < end:
        if program.name != "generate":
            args = (found[0], *args[1:])  # the state was donated
        start = time.perf_counter()
        found = jax.block_until_ready(program.function(*args))
        times.append(time.perf_counter() - start)
    return min(times)


def filled(shapes: PyTree) -> PyTree:
    """Arrays of some shapes: small numbers, tokens that do not end a response, and masks that are True everywhere."""

    def fill(x: Any) -> jax.Array:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        value = 0.02 if jnp.issubdtype(x.dtype, jnp.floating) else 1
        return jnp.full(x.shape, value, x.dtype)

    places = jax.tree.map(lambda x: x.sharding, shapes)
    return jax.jit(lambda: jax.tree.map(fill, shapes), out_shardings=places)()


def config_of(workload: Workload) -> ConfigDict:
    """Experiment whose stage has the sizes of a workload: bfloat16 products, float32 weights."""
    shape = dict(SHAPES[workload.shape])
    vocabulary = shape.pop("vocab_size")
    precision = {"param_dtype": "float32", "compute_dtype": "bfloat16"}
    model = {**shape, **precision, "activation": "silu", "gated": True}
    optimizer = {
        "learning_rate": 1e-6,
        "schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    }
    training = {"optimizer": optimizer, "loop": {"steps_per_call": 1, "checkpoint_every": 100}}
    offline = {**training, "batch_size": workload.rows, "epochs": 1.0, "eval_every": 100}
    sections = {
        "sft": {
            "kind": "sft",
            "tokenizer": {"kind": "word", "vocab_size": vocabulary},
            "model": model,
            "sample_prompts": 0,
            **offline,
        },
        "reward_model": {
            "kind": "reward_model",
            "policy": "sft",
            "preferences": None,
            "model": model,
            "pooling": "last",
            **offline,
        },
        "sampling": {
            "kind": "best_of_n",
            "policy": "sft",
            "reward_model": "reward_model",
            "judge": None,
            "prompts": workload.rows,
            "pool": 1,
            "temperature": 1.0,
        },
        "dpo": {"kind": "dpo", "policy": "sft", "preferences": None, "beta": 0.1, "sample_prompts": 0, **offline},
        "ppo": {
            "kind": "ppo",
            "policy": "sft",
            "reward_model": "reward_model",
            "iterations": 100,
            "batch_size": workload.rows,
            "minibatches": 1,
            "epochs": 1,
            "temperature": 1.0,
            "kl_coef": 0.05,
            "gamma": 1.0,
            "gae_lambda": 0.95,
            "clip_ratio": 0.2,
            "value_clip": 0.2,
            "vf_coef": 0.1,
            "samples_every": 100,
            "samples_written": 0,
            **training,
        },
    }
    return ConfigDict(
        {
            "seed": 0,
            "seeds": 1,
            "stages": ("sft", "reward_model", workload.stage),
            "data": {
                "train": "none",
                "eval": "none",
                "test": None,
                "limit": None,
                "text_prompt_tokens": (1, 1),
                "max_prompt_tokens": workload.prompt,
                "max_response_tokens": workload.response,
            },
            "runtime": {
                "strategy": "jit",
                "data": 1,
                "fsdp": 1,
                "tensor": 1,
                "inference_batch": workload.rows,
                "deterministic": True,
                "compile_quickly": False,
            },
            **sections,
        }
    )
