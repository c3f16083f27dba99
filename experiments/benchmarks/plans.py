"""Plans of DPO and PPO at four sizes on TPUs and H100s, which need not be at hand: rows of docs/explanation/scale.md.

    python -m experiments.benchmarks.plans --out experiments/benchmarks/results/plans.jsonl
    python -m experiments.benchmarks.plans --case "8B v5e:16x16" --kind dpo --out runs/plans.jsonl

Every case is one call of `rlhf-jax plan` with experiments/preferences.py and a directory that holds nothing but the
model's config.json. S has SmolLM2-135M's shape, L Llama-3.2-1B's; 8B and 70B are Llama 3's. Parameters, gradients and
Adam's moments are float32, products bfloat16, blocks a loop whose activations are recomputed; PPO's reward model and
value function have the policy's size. A case that the file has already is left out, so that a run goes on where it
ended.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rlhf_jax.runtime.files import read_rows, write_rows

ROOT = Path(__file__).parents[2]
LIBTPU = Path(sys.prefix) / "libtpu"  # where `make dev` installs it

Kind = Literal["dpo", "ppo"]
KINDS: tuple[Kind, ...] = ("dpo", "ppo")
TRAINED = ("sft", "reward_model", "dpo", "ppo")


class Shape(NamedTuple):
    """Sizes of a model of Llama's family."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    ff_width: int
    vocab: int
    tied: bool  # the head is the embedding


SHAPES = {
    "S": Shape(30, 576, 9, 3, 1536, 49_152, tied=True),
    "L": Shape(16, 2048, 32, 8, 8192, 128_256, tied=True),
    "8B": Shape(32, 4096, 32, 8, 14_336, 128_256, tied=False),
    "70B": Shape(80, 8192, 64, 8, 28_672, 128_256, tied=False),
}


class Case(NamedTuple):
    """A model on a machine."""

    shape: str
    topology: str
    fsdp: int
    rows: int  # pairs of an update of DPO, responses of an iteration of PPO
    tokens: int  # of the prompt, and as many of the response
    micro_batch: int | None  # rows of which gradients are computed at once

    @property
    def name(self) -> str:
        """Name on the command line."""
        return f"{self.shape} {self.topology}"


CASES = (
    Case("S", "v5e:1", fsdp=1, rows=64, tokens=128, micro_batch=16),
    Case("L", "v5e:2x2", fsdp=4, rows=64, tokens=128, micro_batch=16),
    Case("L", "h100:1", fsdp=1, rows=64, tokens=128, micro_batch=16),
    Case("8B", "v5e:16x16", fsdp=256, rows=1024, tokens=512, micro_batch=None),
    Case("8B", "v5p:4x4x8", fsdp=128, rows=1024, tokens=512, micro_batch=None),
    Case("70B", "v5p:8x8x8", fsdp=512, rows=1024, tokens=512, micro_batch=None),
)


def config_json(shape: Shape) -> dict[str, Any]:
    """Write a shape as transformers does."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.width // shape.heads,
        "intermediate_size": shape.ff_width,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }


def flags(case: Case, kind: Kind, directory: Path) -> list[str]:
    """Arguments of `rlhf-jax plan`, after writing the model's config and as many pairs as an update needs."""
    (directory / "config.json").write_text(json.dumps(config_json(SHAPES[case.shape])), encoding="utf-8")
    pairs = directory / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * case.rows, encoding="utf-8")
    settings: dict[str, Any] = {
        **dict.fromkeys(("data.train", "data.eval"), pairs),
        **dict.fromkeys(("data.max_prompt_tokens", "data.max_response_tokens"), case.tokens),
        "runtime.fsdp": case.fsdp,
        "runtime.inference_batch": case.rows,
        "sft.model.compute_dtype": "bfloat16",
        "sft.model.remat": True,
        "sft.model.scan_layers": True,
        **dict.fromkeys([f"{stage}.batch_size" for stage in TRAINED], case.rows),  # all divide over the devices
        f"{kind}.loop.steps_per_call": 1,
    }
    if case.micro_batch:
        settings[f"{kind}.optimizer.micro_batch"] = case.micro_batch
    if kind == "ppo":
        settings |= {"ppo.iterations": 1, "ppo.epochs": 1, "ppo.forward_batch": case.fsdp * 4}
    return [
        f"--config={ROOT / 'experiments' / 'preferences.py'}:init={directory}",
        f"--topology={case.topology}",
        f"--stage={kind}",
        "--json",
        *(f"--config.{name}={value}" for name, value in settings.items()),
    ]


def plan(case: Case, kind: Kind) -> dict[str, Any]:
    """Plan a case in a process of its own. Raises CalledProcessError if it fails."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(LIBTPU)]), "TPU_LOG_DIR": "disabled"}
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "rlhf_jax", "plan", *flags(case, kind, Path(directory))]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    stage, run = (json.loads(line) for line in done.stdout.splitlines())
    return {"case": case.name, **case._asdict(), **stage, "run": run}


def main(arguments: Sequence[str] | None = None) -> None:
    """Plan the cases that are not in the file yet, and append them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", choices=[case.name for case in CASES], help="these cases only")
    parser.add_argument("--kind", choices=KINDS, help="this kind of stage only")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines to append to")
    args = parser.parse_args(arguments)
    found = read_rows(args.out)
    for case in CASES:
        for kind in KINDS:
            planned = any((row["case"], row["kind"]) == (case.name, kind) for row in found)
            if planned or case.name not in (args.case or [case.name]) or kind != (args.kind or kind):
                continue
            print(f"{case.name}, {kind}", flush=True)
            found.append(plan(case, kind))
            write_rows(args.out, found)


if __name__ == "__main__":
    main()
