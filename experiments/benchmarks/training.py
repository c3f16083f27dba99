r"""Benchmark of training: tokens/s, memory, and model FLOPs utilisation, of ours and of TRL's trainers in turns.

    python -m experiments.benchmarks.training --kind sft dpo --shape m
    python -m experiments.benchmarks.training --kind reward_model --shape tiny --data pairs.jsonl --response 224 \
        --peer trl --peer-python .venv-parity/bin/python --out experiments/benchmarks/results/training.jsonl
    python -m experiments.benchmarks.training --kind ppo --shape m --peer trl \
        --peer-python .venv-parity/venv-trl-1.12.0/bin/python

Kinds are SFT, a reward model, DPO, KTO, and one iteration (one epoch, one update) of PPO and of GRPO. The shape tiny
has 2 layers of width 128, m has 6 of width 256, S is SmolLM2-135M's and L Llama-3.2-1B's; weights are random. All runs
are in float32 on the CPU.

Without `--data`, prompts and responses are random tokens of the maximum lengths, and no sampled response ends early.
`--data` names a file of preference pairs. A byte-level BPE tokenizer is trained on it, longer texts are truncated, and
sampled responses end at random, with a probability of 2 / `--response` at every token. SFT trains on the chosen
responses and KTO on both; PPO and GRPO read the prompts.

Our side is a stage of `experiments/preferences.py`, run as `rlhf-jax` runs it. `--peer trl` also runs TRL's trainers on
the same weights, tokenizer and rows, with and without grouping rows by length if TRL's trainer can group them. Each
side has a process with `--threads` threads, and they take turns: each trains for an epoch while the others wait. The
first epoch of each side is not timed. Of the others, the row has the median and every value.

- `tokens`: tokens of prompts and responses in an epoch, without padding; for PPO and GRPO, of sampled responses only.
  The benchmark fails unless both sides see all tokens of all rows.
- `seconds`, `cpu_seconds`: of an epoch, by the clock, and of all threads of the process together.
- `first_step_seconds`: from the start of the process, without imports, to the end of the first step.
- `compile_seconds`: of all programs that XLA compiled.
- `peak_bytes`: peak resident memory of the process.
- `utilisation`: model FLOPs utilisation, `flops` / `seconds` / `matrix_flops_per_second`. The rate is that of XLA's
  products of float32 matrices, 1024 x 1024, measured after each epoch of ours. `flops` are those that the algorithm
  needs. A forward pass of s tokens takes 2 s N + 2 s^2 A, for N weights in the matrices of the layers and
  A = layers x heads x head width (attention is causal), and 2 t D V for the logits of t response tokens. A backward
  pass takes twice as much. `PASSES` in `training_work.py` has the number of passes. Padding and recomputation do not
  count. Sampled responses are taken to have their mean length.
- `ratio`: seconds per token of a side over ours.
"""

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import generation
from experiments.benchmarks.training_work import ONLINE, PASSES, Prepared, model_flops, prepare
from rlhf_jax.types import RlhfError

ROOT = Path(__file__).parents[2]
GROUPED = ("sft", "reward_model", "dpo")
"""Kinds whose trainer in TRL can group rows by length."""


def reports(side: str, command: list[str], environment: dict[str, str]) -> Generator[dict[str, Any], None, None]:
    """Yield the reports of a side, which trains for a round before each of them."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
            process.stdin.write("\n")
            process.stdin.flush()
    raise RlhfError(f"{side} ended with exit status {process.returncode}: see its message above")


def commands(kind: str, args: argparse.Namespace, work: Path) -> dict[str, list[str]]:
    """Commands of the sides, by name."""
    ours, trl = (f"experiments.benchmarks.training_{side}" for side in ("ours", "trl"))
    found = {"ours": [sys.executable, "-m", ours, str(work)]}
    if args.peer == "trl":
        found["trl"] = [args.peer_python, "-m", trl, str(work)]
        if kind in GROUPED and args.data is not None:
            found["trl, grouped"] = [*found["trl"], "grouped"]
    return found


def measure(kind: str, shape: str, args: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    """Measure all sides, and return a row for each."""
    prepared = prepare(kind, shape, args, directory)
    work, path = prepared.work, directory / "work.json"
    path.write_text(json.dumps(dataclasses.asdict(work)))
    environment = {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PJRT_NPROC": str(args.threads),  # XLA's threads
        "OMP_NUM_THREADS": str(args.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }
    sides = {name: reports(name, command, environment) for name, command in commands(kind, args, path).items()}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(args.rounds + 1):
        for name, side in sides.items():
            rounds[name].append(next(side))
    last = {name: next(side) for name, side in sides.items()}
    for side in sides.values():
        side.close()
    here, rates = last["ours"]["environment"], [found["matrix_flops_per_second"] for found in rounds["ours"]]
    common = {
        "kind": kind,
        "shape": shape,
        "data": None if args.data is None else Path(args.data).name,
        **{name: getattr(work, name) for name in ("batch", "prompt", "response", "steps", "rounds", "threads")},
        "matrix_flops_per_second": statistics.median(rates),
        "commit": here["source"]["commit"],
        "clean": here["source"]["clean"],
        "machine": here["machine"],
        "date": here["date"],
    }
    figures = {name: summarise(name, prepared, rounds[name], last[name]) for name in sides}
    per_token = {name: np.divide(found["seconds_all"], found["tokens_all"]) for name, found in figures.items()}
    return [
        common
        | {"side": name, "packages": here["packages"] | last[name]["packages"]}
        | found
        | {
            "utilisation": found["flops"] / found["seconds"] / common["matrix_flops_per_second"],
            "ratio": float(np.median(per_token[name] / per_token["ours"])),
        }
        for name, found in figures.items()
    ]


def summarise(side: str, prepared: Prepared, rounds: list[dict[str, Any]], last: dict[str, Any]) -> dict[str, Any]:
    """Summarise the rounds of a side after the first. Raises RlhfError if it has not seen the tokens of all rows."""
    kind, lengths, tokens = prepared.work.kind, prepared.lengths, last["tokens"]
    if kind in ONLINE:
        of_round = [[(prompt, count / len(lengths)) for prompt, _ in lengths] for count in tokens[1:]]
    else:
        prompts, responses = (int(sum(column)) for column in zip(*lengths, strict=True))
        expected = responses if side == "ours" else prompts + responses  # our stages log response tokens
        if set(tokens) != {expected}:
            raise RlhfError(f"{side} saw {tokens} tokens in its rounds of {expected}: the sides' rows differ")
        tokens, of_round = [prompts + responses] * len(tokens), [lengths] * (len(tokens) - 1)
    flops = [model_flops(kind, prepared.config, prepared.vocab_size, found) for found in of_round]
    seconds = [found["seconds"] for found in rounds[1:]]
    return {
        "tokens": statistics.median(tokens[1:]),
        "tokens_all": tokens[1:],
        "seconds": statistics.median(seconds),
        "seconds_all": seconds,
        "cpu_seconds": statistics.median(found["cpu_seconds"] for found in rounds[1:]),
        "tokens_per_second": float(np.median(np.divide(tokens[1:], seconds))),
        "first_step_seconds": rounds[0]["first_step_seconds"],
        "compile_seconds": last["compile_seconds"],
        "peak_bytes": last["peak_bytes"],
        "flops": statistics.median(flops),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        **{name: (name, str) for name in ("kind", "shape", "side")},
        "tokens_per_second": ("tokens/s", "{:,.0f}".format),
        "seconds": ("s", "{:.2f}".format),
        "first_step_seconds": ("start", "{:.1f}".format),
        "compile_seconds": ("compile", "{:.1f}".format),
        "peak_bytes": ("GiB", lambda value: f"{value / 2**30:.2f}"),
        "utilisation": ("MFU", "{:.0%}".format),
        "ratio": ("ratio", "{:.2f}".format),
    }
    table = Table(*(header for header, _ in columns.values()))
    for row in rows:
        table.add_row(*(form(row[name]) for name, (_, form) in columns.items()))
    (console := Console()).print(table)
    rate = statistics.median(row["matrix_flops_per_second"] for row in rows)
    console.print(
        "s, start, compile: seconds of an epoch, until the end of the first step, and of compilation. MFU: FLOPs of "
        f"the algorithm / seconds / {rate / 1e9:,.0f} GFLOP/s, the rate of matrix products in this run. ratio: seconds "
        "per token / ours."
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--shape", nargs="+", choices=generation.SIZES, default=["tiny"])
    parser.add_argument("--data", metavar="FILE", help="preference pairs; without it, random tokens of full length")
    parser.add_argument("--rows", type=int, help="pairs of an epoch; by default four batches, or the whole file")
    parser.add_argument("--batch", type=int, default=32, help="pairs, or responses for sft, kto, ppo and grpo")
    parser.add_argument("--group", type=int, default=4, help="responses per prompt for grpo")
    parser.add_argument("--prompt", type=int, default=64, help="maximum tokens of a prompt, BOS included")
    parser.add_argument("--response", type=int, default=64, help="maximum tokens of a response, EOS included")
    parser.add_argument("--rounds", type=int, default=3, help="timed epochs, after one for warm-up")
    parser.add_argument("--threads", type=int, default=2, help="threads of each side")
    parser.add_argument("--peer", choices=["none", "trl"], default="none")
    parser.add_argument("--peer-python", default=sys.executable, help="Python interpreter that has TRL")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines, appended")
    args = parser.parse_args(arguments)
    for name, least in {"rounds": 1, "threads": 1, "prompt": 2, "response": 3, "batch": 1, "group": 2}.items():
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    if "kto" in args.kind and args.batch % 2:
        parser.error("--batch must be even for kto, which trains on both responses of each pair")
    if "grpo" in args.kind and args.batch % args.group:
        parser.error(f"--batch={args.batch} does not divide into groups of --group={args.group} for grpo")
    if args.peer == "trl":
        version = trl_version(args.peer_python)
        if version is None:
            parser.error(f"--peer=trl: {args.peer_python} has no TRL: name another interpreter with --peer-python")
        if "ppo" in args.kind and not version.startswith("1.12."):
            parser.error(f"ppo needs TRL 1.12, the last with a PPOTrainer, and {args.peer_python} has {version}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    return args


def trl_version(python: str) -> str | None:
    """Version of TRL that an interpreter has."""
    if shutil.which(python) is None:
        return None
    command = [python, "-c", "import importlib.metadata; print(importlib.metadata.version('trl'))"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure every kind and shape, and return the rows."""
    args, rows = parse(arguments), []
    for kind, shape in itertools.product(args.kind, args.shape):
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(kind, shape, args, Path(scratch))
        rows += found
        if args.out:
            with args.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
    show(rows)
    return rows


if __name__ == "__main__":
    try:
        main()
    except RlhfError as error:
        raise SystemExit(f"error: {error}") from error
