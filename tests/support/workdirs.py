"""Small work directories as an experiment would leave them, written with the package's own functions."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from rlhf_jax.loading.models import Policy, RewardModel
from rlhf_jax.loading.stage_models import save_policy_spec, save_reward_spec
from rlhf_jax.methods.preference_table import PreferenceLossConfig
from rlhf_jax.methods.reward_table import RewardLossConfig
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.models.scalars import ScalarNetwork
from rlhf_jax.reports.report import print_summary
from rlhf_jax.reports.run import Run
from rlhf_jax.rewards import tfidf
from rlhf_jax.rewards.tfidf import TfidfRidgeConfig
from rlhf_jax.runtime.checkpoints import Checkpoints, TrainState
from rlhf_jax.runtime.files import write_json, write_rows
from rlhf_jax.runtime.workdir import Identity, Workdir
from rlhf_jax.text.tokenizer import TokenizerConfig, train_tokenizer
from tests.support import networks

DATA = {
    "train": "train.jsonl",
    "eval": "eval.jsonl",
    "test": "test.jsonl",
    "limit": None,
    "text_prompt_tokens": [1, 2],
    "max_prompt_tokens": 5,
    "max_response_tokens": 6,
}
BETAS = {"dpo_1": 1.0, "dpo_01": 0.1}
PROMPTS = 8
EVIL = '<script>alert(1)</script><img src=http://example.com/x.png onerror=alert(2)> & "quoted" $x_1$ \' \u202e'


def write_stage(
    root: Path,
    name: str,
    section: dict[str, Any],
    *,
    inputs: tuple[str, ...] = (),
    files: dict[str, list[dict]] | None = None,
    summary: dict[str, Any] | None = None,
    complete: bool = True,
    seed: int = 0,
    seeds: int | None = None,
    elsewhere: Path | None = None,
) -> Path:
    """One stage's directory, with `files` of rows."""
    workdir = Workdir(root, elsewhere)
    common = {"seed": seed, "data": DATA} | ({} if seeds is None else {"seeds": seeds})
    identity = Identity(section, common, {input: workdir.fingerprint(input) for input in inputs})
    directory = workdir.begin(name, identity)
    for file, rows in (files or {}).items():
        write_rows(directory / file, rows)
    if complete:
        write_json(directory / "summary.json", {**(summary or {}), "time/seconds": 12.5})
        workdir.complete(name, identity)
    return directory


def metric_rows(
    columns: dict[str, tuple[float, float]], *, steps: int = 40, seeds: int = 1, every: int = 10
) -> list[dict]:
    """Rows in which every column goes from one value to another; `eval/` columns stand in every tenth row."""
    rows = []
    for step in range(1, steps + 1):
        for seed in range(seeds):
            shown = {name: ends for name, ends in columns.items() if not name.startswith("eval/") or step % every == 0}
            values = {name: a + (b - a) * step / steps + 0.01 * seed for name, (a, b) in shown.items()}
            rows.append({"step": step, "seed": seed, **values})
    return rows


def sample_row(step: int, seed: int, text: str, score: float | None, kl: float | None) -> dict[str, Any]:
    return {
        "step": step,
        "seed": seed,
        "prompt": f"film {step}",
        "completion": f" {text}",
        "score": score,
        "kl": kl,
        "length": 3,
    }


def token_values(step: int) -> dict[str, Any]:
    """Tokens of a sample and their values, as an online stage writes them."""
    return {
        "text": [" it", " <b>is</b>\n", "<eos>"],
        "kl": [0.5, -0.25, 0.01 * step],
        "reward": [-0.05, 0.025, 1.0],
        "advantage": [0.75, -1.5, 0.0],
        "value": [0.2, 0.4, 0.6],
    }


def result_row(method: str, seed: int, gold: float | None, reward: float, kl: float, seconds: float | None) -> dict:
    """One row of results.jsonl, keys in the order that evaluate writes them."""
    judged = gold is not None
    return {
        "method": method,
        "seed": seed,
        "n_prompts": PROMPTS,
        "gold_score": gold,
        "gold_se": 0.05 if judged else None,
        "gold_gain": gold if judged else None,
        "gold_gain_se": 0.06 if judged else None,
        "win_rate": 0.5 + reward / 10,
        "win_low": 0.4 + reward / 10,
        "win_high": 0.6 + reward / 10,
        "reward_score": reward,
        "kl": kl,
        "kl_se": 0.0 if method.startswith("best_of") else 0.02,
        "length": 9.5,
        "vader": 0.25,
        "distinct_2": 0.75,
        "seconds": seconds,
    }


def further(row: dict[str, Any]) -> dict[str, Any]:
    """The columns that later evaluations have beside those."""
    best_of_n = row["method"].startswith("best_of")
    return {
        "tie_rate": 0.125,
        "boot_low": row["win_low"] + 0.01,
        "boot_high": row["win_high"] - 0.01,
        "lc_win_rate": row["win_rate"] - 0.02,
        "lc_win_se": 0.03,
        "kl_k3": None if best_of_n else row["kl"] + 0.01,
        "kl_k3_se": None if best_of_n else 0.015,
        "ref_nll": 1.25 + row["kl"],
        "text_nll": None if best_of_n else 4.5,
        "distinct_1": 0.5,
        "distinct_3": 0.875,
        "repetition_4": 0.015625,
    }


def win_rates(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every method against the first one and against DPO, of which the results say how much better or worse."""
    rows = []
    for own in results:
        for other in (row for row in results if row["method"] in ("sft", "dpo_01") and row != own):
            rate = 0.5 + own["win_rate"] - other["win_rate"]
            intervals = {"win_low": rate - 0.1, "win_high": rate + 0.1}
            pair = {"against": other["method"], "against_seed": other["seed"]}
            rows.append({"method": own["method"], "seed": own["seed"], **pair, "win_rate": rate, **intervals})
    return rows


def write_gold(root: Path) -> None:
    """A judge that likes `fine`."""
    directory = write_stage(root, "gold", {"kind": "gold"}, summary={"correlation": 0.7})
    texts = ["a fine film", "fine", "it is", "it is a film"]
    tfidf.fit(TfidfRidgeConfig(1.0, 1), texts, [2.0, 3.0, -1.0, 0.0]).save(directory / "judge.joblib")


def write_all(root: Path, *, gold: bool = True, seeds: int = 1, text: str = "a fine film", more: bool = False) -> Path:
    """A complete experiment, with all that its evaluation may measure where `more` is asked for."""
    if gold:
        write_gold(root)
    write_training(root, seeds=seeds)
    write_best_of_n(root, gold=gold)
    write_evaluate(root, gold=gold, seeds=seeds, text=text, more=more)
    return root


def write_training(root: Path, *, seeds: int = 1) -> None:
    """sft, preferences, reward_model, two DPOs and PPO."""
    sft = metric_rows({"loss": (6, 4), "eval/loss": (6, 4.5), "mean_token_accuracy": (0, 0.3)})
    write_stage(root, "sft", {"kind": "sft"}, files={"metrics.jsonl": sft}, summary={"steps": 40})
    write_stage(root, "preferences", {"kind": "preferences", "policy": "sft", "judge": "gold"}, inputs=("sft",))
    reward = metric_rows({"loss": (0.7, 0.5), "accuracy": (0.5, 0.8), "eval/accuracy": (0.6, 0.7)})
    section = {"kind": "reward_model", "policy": "sft", "loss": reward_loss()}
    inputs = ("sft", "preferences")
    write_stage(root, "reward_model", section, inputs=inputs, files={"metrics.jsonl": reward})
    for name, beta in BETAS.items():
        names = {
            "loss": (0.69, 0.5),
            "rewards/accuracies": (0.5, 0.7),
            "rewards/margins": (0, beta),
            "eval/loss": (0.69, 0.6),
        }
        section = {"kind": "dpo", "policy": "sft", "beta": beta, "loss": preference_loss()}
        write_stage(root, name, section, inputs=inputs, files={"metrics.jsonl": metric_rows(names)})
    ppo = metric_rows(
        {"objective/scores": (0.1, 2), "objective/kl": (0, 6), "completions/mean_length": (11, 14)}, seeds=seeds
    )
    path = [
        sample_row(step, seed, "it is", score=step / 20 + seed / 10, kl=step / 7)
        for step in (1, 20, 40)
        for seed in range(seeds)
        for _ in range(2)
    ]
    for row in path[::2]:
        row["tokens"] = token_values(row["step"])
    section = {"kind": "ppo", "policy": "sft", "reward_model": "reward_model"}
    inputs, files = ("sft", "reward_model"), {"metrics.jsonl": ppo, "samples.jsonl": path}
    write_stage(root, "ppo", section, inputs=inputs, files=files, seeds=seeds)


def preference_loss(*losses: str, **options: Any) -> dict[str, Any]:
    """Section `loss` of a stage's config, as experiments write it; without names, DPO's."""
    return dataclasses.asdict(PreferenceLossConfig()) | ({"losses": list(losses)} if losses else {}) | options


def reward_loss(name: str = "bradley_terry") -> dict[str, Any]:
    """Section `loss` of a reward model's config, as experiments write it."""
    return dataclasses.asdict(RewardLossConfig()) | {"name": name}


def write_best_of_n(root: Path, *, gold: bool) -> None:
    rows = []
    for n in (1, 2, 4, 8, 16):
        kl = float(np.log(n) - (n - 1) / n)
        point = {"n": n, "kl": kl, "proxy": 0.2 + 1.1 * kl**0.5, "proxy_se": 0.05, "gold": None, "gold_se": None}
        rows.append(point | ({"gold": 0.1 + 0.7 * kl**0.5, "gold_se": 0.04} if gold else {}))
    section = {"kind": "best_of_n", "policy": "sft", "reward_model": "reward_model"}
    write_stage(root, "best_of_n", section, inputs=("sft", "reward_model"), files={"curve.jsonl": rows})


def write_evaluate(
    root: Path,
    *,
    gold: bool,
    seeds: int = 1,
    text: str = "a fine film",
    elsewhere: Path | None = None,
    more: bool = False,
) -> None:
    """The evaluation, with scores that rise by method; `text` is what every answer says."""
    methods = [("sft", 0), ("best_of_16", 0), *((name, 0) for name in BETAS), *(("ppo", seed) for seed in range(seeds))]
    results, samples = [], []
    for rank, (method, seed) in enumerate(methods):
        judged = 0.1 + 0.4 * rank if gold else None
        seconds = None if method.startswith("best_of") else 12.5
        results.append(result_row(method, seed, judged, 0.2 + 0.3 * rank, 0.8 * rank, seconds))
        for prompt in range(PROMPTS):
            row = sample_row(
                prompt, seed, f"{text} ({method} {prompt})", 0.1 * prompt + rank, None if rank == 1 else 0.5 * rank
            )
            judgement = None if judged is None else judged + 0.1 * prompt
            samples.append({"step": prompt, "seed": seed, "method": method, **row, "gold": judgement})
    files = {"results.jsonl": results, "selection.jsonl": results, "samples.jsonl": samples}
    if more:
        files = {name: [row | further(row) for row in rows] for name, rows in files.items() if name != "samples.jsonl"}
        files |= {"samples.jsonl": samples, "win_rates.jsonl": win_rates(results)}
    section = {
        "kind": "evaluate",
        "reference": "sft",
        "reward_model": "reward_model",
        "judge": "gold" if gold else None,
    }
    write_stage(
        root,
        "evaluate",
        section,
        inputs=("sft", *BETAS, "ppo", "reward_model"),
        files=files,
        summary={"selected": {"sft": "sft", "dpo": "dpo_01", "ppo": "ppo"}, "judge": "gold"},
        elsewhere=elsewhere,
    )


def write_models(root: Path, *, with_reward_model: bool = True, seeds: int = 1) -> None:
    """Stages sft, reward_model and ppo with tiny random networks that can be loaded; PPO's differ."""
    texts = ["a good film", "a bad film", "it is good and bad", "film and art"]
    tokenizer = train_tokenizer(TokenizerConfig("word", 32), texts)
    shape = networks.config(d_model=8, n_layers=1, d_ff=16)
    policy = PolicyNetwork(shape, tokenizer.vocab_size, tokenizer.suppressed)
    reward = ScalarNetwork(shape, tokenizer.vocab_size, "mean")
    # Larger than at initialisation, where all policies are nearly uniform.
    models = [jax.tree.map(lambda leaf: 4 * leaf, policy.init(jax.random.key(k))) for k in range(seeds + 1)]
    stages: list[tuple[str, dict[str, Any], tuple[str, ...], dict[str, Any]]] = [
        ("sft", {"kind": "sft"}, (), {"policy": models[0]}),
        (
            "reward_model",
            {"kind": "reward_model", "policy": "sft", "loss": reward_loss()},
            ("sft",),
            {"reward": reward.init(jax.random.key(9))},
        ),
    ]
    trained = models[1] if seeds == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *models[1:])
    stages.append(("ppo", {"kind": "ppo", "policy": "sft"}, ("sft",), {"policy": trained}))
    for name, section, inputs, params in stages:
        if name == "reward_model" and not with_reward_model:
            continue
        directory = write_stage(root, name, section, inputs=inputs)
        if "reward" in params:
            save_reward_spec(directory, RewardModel(reward, None, tokenizer))
        else:
            save_policy_spec(directory, Policy(policy, None, tokenizer), range(seeds if name == "ppo" else 1))
        checkpoints = Checkpoints(directory / "checkpoints", keep=1)
        checkpoints.save(TrainState(jnp.int32(7), params, ()))
        checkpoints.close()


def shown(run: Run, width: int = 100) -> str:
    """The summary as it is printed."""
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    print_summary(run, console)
    return console.file.getvalue()  # type: ignore[attr-defined]
