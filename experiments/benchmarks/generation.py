r"""Benchmark of sampling: tokens/s, milliseconds per decoding step, and the ratio to the memory roofline.

    python experiments/benchmarks/generation.py --shape S L --batch 64 256 --out runs/generation.jsonl
    python experiments/benchmarks/generation.py --shape S L --batch 64 256 --mixed --out runs/generation_mixed.jsonl
    python experiments/benchmarks/generation.py --shape S --batch 1 16 --prompt 32 --new 32 --peer transformers

S is SmolLM2-135M's shape, L Llama-3.2-1B's, both with random weights; `--model=DIR` takes a checkpoint instead. Prompts
are random tokens without padding, the temperature is 1, no response stops early, and times include the prefill. Every
program is compiled and run once before it is timed; programs to be compared run alternately, and the median and the
minimum are reported. The time of a decoding step is the total time minus that of the prefill (timed separately,
including the first token), divided by the number of tokens minus one. The roofline assumes that all weights and the
filled slots of the cache are read once per step, at the device's published bandwidth or, for a device that is not in
the table, at the bandwidth of a measured copy. The row states which.

`--mixed` gives each response a limit (geometric, mean 64 of at most 256 tokens) and compares batches that each wait for
their longest response with as many slots under continuous batching. `--peer transformers` (needs torch) runs
transformers' `generate` on the same weights and prompts in the same process.
"""

import argparse
import datetime
import functools
import json
import operator
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from rlhf_jax.interop.families import model_config
from rlhf_jax.interop.hf import load_pretrained, save_pretrained
from rlhf_jax.models.model_config import AttentionBy, DType
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.runtime import provenance
from rlhf_jax.runtime.huge_pages import restart_with_huge_pages
from rlhf_jax.sampling.choice import Sampling
from rlhf_jax.sampling.continuous import default_refill, generate_queue
from rlhf_jax.sampling.generate import generate
from rlhf_jax.types import PromptBatch

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 64, "max_position_embeddings": 8192}
SIZES = {  # layers, width, heads, heads of keys and values, width of the MLP, vocabulary, rope theta
    "S": (30, 576, 9, 3, 1536, 49152, 1e5),
    "L": (16, 2048, 32, 8, 8192, 128256, 5e5),
    "m": (6, 256, 4, 2, 768, 4096, 1e4),
    "tiny": (2, 128, 2, 1, 256, 4096, 1e4),
}

BANDWIDTHS = {"H200": 4.8e12, "H100 80GB HBM3": 3.35e12, "A100-SXM4-80GB": 2.039e12, "TPU v5 lite": 0.819e12}
"""Published memory bandwidth in bytes per second, by a part of JAX's `device_kind`."""


class Model(NamedTuple):
    """Model to sample from."""

    name: str
    policy: PolicyNetwork
    params: Any
    hf_config: dict[str, Any]
    directory: str | None  # where its weights come from, or None for random ones


def load(shape: str, directory: str | None, dtype: DType, attention: AttentionBy) -> Model:
    """Load a checkpoint, or initialise random weights of a shape; the dtype is that of weights and computation."""
    if directory is not None:
        loaded = load_pretrained(directory, param_dtype=dtype, compute_dtype=dtype, attention=attention)
        if loaded.kind != "policy":
            raise SystemExit(f"{directory} is a reward model: give a language model")
        policy = PolicyNetwork(loaded.config, loaded.vocab_size, ())
        return Model(Path(directory).name, policy, loaded.params, loaded.hf_config, directory)
    layers, width, heads, kv_heads, ff_width, vocab, theta = SIZES[shape]
    hf_config: dict[str, Any] = LLAMA | {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ff_width,
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
    completed = AutoConfig.for_model(**hf_config)
    config = model_config(completed, param_dtype=dtype, compute_dtype=dtype, remat=False, attention=attention)
    policy = PolicyNetwork(config, vocab, ())
    return Model(shape, policy, policy.init(jax.random.key(0)), hf_config, None)


def bandwidth() -> tuple[float, str]:
    """Memory bandwidth in bytes per second, and its source."""
    for name, value in BANDWIDTHS.items():
        if name in jax.devices()[0].device_kind:
            return value, "published"
    array = jnp.zeros(2**26, jnp.float32)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place, or the time would be that of asking for memory
    taken = []
    for _ in range(6):
        start = time.perf_counter()
        array = copy(array).block_until_ready()
        taken.append(time.perf_counter() - start)
    return 2 * array.nbytes / min(taken), "measured by a copy"


def seconds(function: Callable[[], Any]) -> float:
    """Time a call until its results are ready."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def alternate(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Time functions alternately, in seconds; each was run once before."""
    for function in functions.values():
        seconds(function)
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            taken[name].append(seconds(function))
    return taken


def profile(function: Callable[[], Any], directory: str) -> None:
    """Write a trace of a call after the first."""
    seconds(function)
    with jax.profiler.trace(directory):
        seconds(function)


def step_bytes(model: Model, batch: int, length: float) -> tuple[int, int]:
    """Bytes that a step reads: the weights, and a cache with `length` tokens per row."""
    config = model.policy.config
    read = {name: leaf for name, leaf in model.params.items() if config.tied or name != "embedding"}
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(read))
    token = 2 * config.n_layers * config.kv_heads * config.head_width * jnp.dtype(config.compute_dtype).itemsize
    return weights, int(batch * length * token)


def random_prompts(model: Model, rows: int, length: int) -> PromptBatch:
    """Random prompts without padding."""
    tokens = np.random.default_rng(0).integers(4, model.policy.vocab_size, (rows, length)).astype(np.int32)
    return PromptBatch(jnp.asarray(tokens), jnp.ones(tokens.shape, bool), jnp.arange(rows, dtype=jnp.int32))


def measure(model: Model, batch: int, args: argparse.Namespace, memory: tuple[float, str]) -> dict[str, Any]:
    """Measure batches whose responses all have the same length."""
    prompts = random_prompts(model, batch, args.prompt)

    def sampler(new: int) -> Callable[[], Any]:
        def sample(params, prompts, key):
            return generate(model.policy, params, prompts, key, Sampling(new, 1.0, ()))

        compiled = jax.jit(sample).lower(model.params, prompts, jax.random.key(0)).compile()
        keys = iter(jax.random.split(jax.random.key(1), args.repeats + 3))
        return lambda: compiled(model.params, prompts, next(keys))

    functions = {"whole": sampler(args.new), "prefill": sampler(1)}
    if args.peer:
        functions |= peer_samplers(model, prompts, args)
    if args.profile:
        profile(functions["whole"], args.profile)
    taken = alternate(functions, args.repeats)
    total, prefill = (statistics.median(taken[name]) for name in ("whole", "prefill"))
    step = (total - prefill) / (args.new - 1)
    weights, cache = step_bytes(model, batch, args.prompt + args.new / 2)
    row = {
        "new": args.new,
        "seconds": total,
        "seconds_min": min(taken["whole"]),
        "prefill_seconds": prefill,
        "step_milliseconds": 1e3 * step,
        "tokens_per_second": batch * args.new / total,
        "weight_bytes": weights,
        "cache_bytes": cache,
        "bandwidth": memory[0],
        "bandwidth_from": memory[1],
        "roofline_milliseconds": 1e3 * (weights + cache) / memory[0],
        "roofline_ratio": (weights + cache) / memory[0] / step,
    }
    if args.peer:
        name = min([name for name in taken if "threads" in name], key=lambda name: statistics.median(taken[name]))
        row |= {
            "peer": name,
            "peer_seconds": statistics.median(taken[name]),
            "peer_tokens_per_second": batch * args.new / statistics.median(taken[name]),
            "peer_ratio": statistics.median(map(operator.truediv, taken[name], taken["whole"])),
        }
    return row


def measure_mixed(model: Model, slots: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure responses of different lengths: batches that wait for the longest one, against continuous batching."""
    count, longest = slots * args.queue, args.longest
    limits = np.minimum(np.random.default_rng(0).geometric(1 / args.mean, count), longest).astype(np.int32)
    prompts = random_prompts(model, count, args.prompt)
    sampling, key = Sampling(longest, 1.0, ()), jax.random.key(0)
    sizes = {"slots": slots, "refill": args.refill or default_refill(slots)}

    @jax.jit
    def one_batch(params, prompts, limits):
        return generate(model.policy, params, prompts, key, sampling, limits=limits)

    @jax.jit
    def queue(params, prompts, limits):
        return generate_queue(model.policy, params, prompts, key, sampling, limits=limits, **sizes)

    batches = [jax.tree.map(lambda x, i=i: x[i : i + slots], (prompts, limits)) for i in range(0, count, slots)]
    functions = {
        "padded": lambda: [one_batch(model.params, *batch) for batch in batches],
        "continuous": lambda: queue(model.params, prompts, limits),
    }
    if args.profile:
        profile(functions["continuous"], args.profile)
    taken = alternate(functions, args.repeats)
    padded, continuous = (statistics.median(taken[name]) for name in functions)
    tokens = int(limits.sum())
    return {
        "new": longest,
        "prompts": count,
        "refill": sizes["refill"],
        "mean_length": tokens / count,
        "padded_seconds": padded,
        "padded_tokens_per_second": tokens / padded,
        "padded_steps": int(sum(part.max() - 1 for _, part in batches)),
        "seconds": continuous,
        "tokens_per_second": tokens / continuous,
        "steps": int(queue(model.params, prompts, limits)[1]),
        "mixed_ratio": statistics.median(map(operator.truediv, taken["padded"], taken["continuous"])),
    }


def peer_samplers(model: Model, prompts: PromptBatch, args: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Measure transformers' `generate` on the same weights with its defaults: a growing cache, without compilation."""
    import torch  # pyrefly: ignore[missing-import]
    import transformers
    from transformers import AutoModelForCausalLM, GenerationConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        directory = model.directory or f"{scratch}/model"
        if model.directory is None:
            save_pretrained(Path(directory), "policy", model.params, model.hf_config)
        peer = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, args.dtype)).to(device).eval()
    peer.generation_config = GenerationConfig(pad_token_id=0)  # a checkpoint's own may stop early
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=args.new, eos_token_id=None, pad_token_id=0
    )
    tokens = torch.tensor(np.asarray(prompts.tokens), dtype=torch.long, device=device)

    def sample(threads: int) -> None:
        torch.set_num_threads(threads)
        out = peer.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=config).cpu()
        assert out.shape == (tokens.shape[0], tokens.shape[1] + args.new), out.shape

    version, every = f"transformers {transformers.__version__}", torch.get_num_threads()
    # One thread is faster on a CPU that others use, because threads wait for each other. The faster one counts.
    counts = [every] if device == "cuda" else sorted({1, every})
    return {f"{version}, threads: {count}": functools.partial(sample, count) for count in counts}


COLUMNS = [
    *("shape", "batch", "tokens_per_second", "prefill_seconds", "step_milliseconds", "roofline_ratio"),
    *("peer_tokens_per_second", "peer_ratio", "padded_tokens_per_second", "steps", "padded_steps", "mixed_ratio"),
]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""

    def text(value: Any) -> str:
        return format(value, ",.0f" if abs(value) >= 100 else ".3g") if isinstance(value, float) else str(value)

    names, first = [name for name in COLUMNS if name in rows[0]], rows[0]
    table = Table(*(name.replace("_per_second", "/s").replace("_", " ") for name in names))
    for row in rows:
        table.add_row(*(text(row[name]) for name in names))
    (console := Console()).print(table)
    console.print(*(f"{name} {first[name]}" for name in ("prompt", "new", "dtype", "repeats", "device", "jax", "date")))
    if "bandwidth" in first:
        console.print(f"memory roofline at {first['bandwidth'] / 1e9:,.0f} GB/s, {first['bandwidth_from']}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SIZES, default=["S"])
    parser.add_argument("--model", metavar="DIR", help="a checkpoint in the place of a shape")
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 256], help="rows, or slots with --mixed")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens of every response")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default=dtype)
    parser.add_argument("--attention", choices=["xla", "cudnn"], default="xla", help="cudnn: on GPUs, in bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--mixed", action="store_true", help="limits that differ: padding against continuous batching")
    parser.add_argument("--mean", type=float, default=64, help="of the limits, before they are cut off; with --mixed")
    parser.add_argument("--longest", type=int, default=256, help="limit; with --mixed")
    parser.add_argument("--queue", type=int, default=8, help="prompts a slot; with --mixed")
    parser.add_argument("--refill", type=int, help="prompts a prefill; with --mixed")
    parser.add_argument("--peer", choices=["transformers"])
    parser.add_argument("--profile", metavar="DIR", help="writes a trace of one run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON lines, appended")
    args = parser.parse_args(arguments)
    if args.new < 2:
        parser.error("--new must be at least 2: a step is timed by those after the first")
    if args.mixed and args.peer:
        parser.error("--peer compares responses of one length: leave out --mixed")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    return args


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure every shape and batch, and return the rows."""
    args, rows = parse(arguments), []
    memory = bandwidth()
    here = provenance.source()
    for shape in [args.model] if args.model else args.shape:
        model = load(shape, args.model, args.dtype, args.attention)
        for batch in args.batch:
            row = {
                "kind": "mixed" if args.mixed else "uniform",
                "shape": model.name,
                "batch": batch,
                "prompt": args.prompt,
                "dtype": args.dtype,
                "attention": args.attention,
                "repeats": args.repeats,
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "commit": here["commit"],
                "clean": here["clean"],
                "machine": provenance.machine(),
                "xla_flags": os.environ.get("XLA_FLAGS", ""),
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            }
            row |= measure_mixed(model, batch, args) if args.mixed else measure(model, batch, args, memory)
            rows.append(row)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    show(rows)
    return rows


if __name__ == "__main__":
    restart_with_huge_pages()  # as rlhf-jax does; a peer in this process has them too
    main()
