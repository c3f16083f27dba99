"""The command line: whatever is wrong, one message, a non-zero exit, and nothing lost."""

import io
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pandas as pd
import pytest
from rich.console import Console

import rlhf_jax
from rlhf_jax import experiment
from rlhf_jax.cli.status import statuses
from rlhf_jax.commands import parse_run_flags
from rlhf_jax.main import main
from rlhf_jax.models.model_config import ModelConfig
from rlhf_jax.models.policy import PolicyNetwork
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime import compilation_cache, provenance, timings
from rlhf_jax.runtime.progress import rounded, size
from rlhf_jax.runtime.workdir import Workdir
from rlhf_jax.stages.kto import KTOConfig
from rlhf_jax.stages.sft import SFTConfig
from tests.support import xla_flags
from tests.support.commands import run_without_figures
from tests.support.own_data import PREFERENCES, ROOT, WRITERS, files, pairs

QUICKSTART = f"--config={ROOT}/experiments/movie_reviews/quickstart.py:smoke"


def fails(capsys, *arguments: str) -> str:
    """The one message of a command that must fail without a traceback."""
    assert main(list(arguments)) == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert captured.err.startswith("Error: ")
    return captured.err


@pytest.mark.nightly
def test_own_preferences_run_whole(tmp_path, capsys):
    arguments = [PREFERENCES, f"--workdir={tmp_path / 'run'}", *files(tmp_path)]
    assert main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    chance = printed.index("Caution: The reward model reward_model is no better than chance")  # the pairs are random
    own = printed.index("Caution: The judge scores answers that were optimised for it: best_of_4 and ppo were")
    assert chance < own < printed.index("Caution: Only") < printed.index("method")
    results = pd.read_csv(tmp_path / "run" / "results.csv")
    assert results["method"].tolist() == ["sft", "best_of_4", "dpo", "ppo"]
    assert results["gold_score"].isna().all()
    assert results["win_rate"].between(0, 1).all()
    assert np.isfinite(results[["reward_score", "kl", "length", "distinct_2"]]).all(axis=None)
    assert "eval/accuracy" in (tmp_path / "run" / "reward_model" / "metrics.jsonl").read_text()

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.nightly
def test_every_kind_of_file_gives_the_same_run(tmp_path):
    summaries, hashes = [], set()
    for ending in WRITERS:
        flags = [f"--workdir={tmp_path / ending}", *files(tmp_path, ending), "--stage=sft"]
        assert main([PREFERENCES, *flags]) == 0
        summary = json.loads((tmp_path / ending / "sft" / "summary.json").read_text())
        hashes.add(summary.pop("provenance")["sha256"]["train"])
        summaries.append({key: value for key, value in summary.items() if not key.startswith("time/")})
    assert summaries[0] == summaries[1] == summaries[2]
    assert len(hashes) == 3, "the files are known by what they hold"


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.sft.epoch=3", "epochs"),
        (
            "--config.ppo.tuning.lora.rnk=3",
            "config.ppo.tuning.lora.rnk is not a field of LoraConfig. Did you mean 'rank'?",
        ),
        ("--config.ppo.tuning.lora.rank=8", "config.ppo.tuning.lora.alpha is missing: set it to a number."),
        ("--config.nothing=3", "config.nothing is not the section of a stage: it has no kind. Known fields: seed,"),
        ("--config.pppo.kl_coef=3", "config.pppo is not the section of a stage: it has no kind. Did you mean 'ppo'?"),
        ("--config.sed=3", "Did you mean 'seed'?"),
        ("--config.ppo.advantage=rloo", "config.ppo.advantage is not a field of PPOConfig. It is a field of group_rl."),
        ("--config.ppo.learning_rate=1", "PPOConfig. Did you mean 'ppo.optimizer.learning_rate'?"),
        ("--config.ppo.optimizer.kl_coef=1", "OptimizerConfig. Did you mean 'ppo.kl_coef'?"),
        ("--config.sft.max_response_tokens=9", "SFTConfig. Did you mean 'data.max_response_tokens'?"),
        ("--config.kl_coef=1", "it has no kind. Did you mean 'ppo.kl_coef'?"),
        ("--config.inference_batch=8", "it has no kind. Did you mean 'runtime.inference_batch'?"),
        ("--config.ppo=3", "config.ppo is not the section of a stage"),
        ("--config.sft.epochs", "--config.sft.epochs has no value: write --config.sft.epochs=VALUE"),
        ("--config.ppo.optimizer.b1=1.5", "config.ppo.optimizer.b1 = 1.5 must be below 1"),
        ("--config.seed=abc", "abc"),
        ("--config.ppo.kl_coef=high", "high"),
        ("--config.ppo.minibatches=3", "is not a multiple of minibatches = 3"),
        ("--config.sft.model.n_heads=3", "d_model = 16 must be a multiple"),
        ("--config.sft.model.activation=tanh", "one of 'relu', 'relu2', 'gelu', 'gelu_exact', 'silu'"),
        ("--config.dpo.policy=nobody", "'nobody'"),
        ("--config.stages=('sft','nobody')", "'nobody'"),
        ("--config.runtime.data=99", "99 devices"),
        ("--nonsense=3", "nonsense"),
        ("nonsense", "nonsense"),
        ("--stage=nobody", "nobody"),
    ],
)
def test_flags_that_cannot_be(flag, words, tmp_path, capsys):
    message = fails(capsys, PREFERENCES, f"--workdir={tmp_path / 'run'}", *files(tmp_path), flag)
    assert words in message
    assert not (tmp_path / "run" / "sft" / "complete.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--config.ppo.iterations=7", "--dry-run"],
            "config.ppo: iterations = 7 is not a multiple of loop.steps_per_call = 2: a shorter last call would "
            "compile a second program. Change one of them",
        ),
        (
            ["--config.ppo.optimizer.micro_batch=3"],
            "config.ppo: a batch of 8 rows does not divide into slices of 3: change optimizer.micro_batch",
        ),
        (
            ["--config.ppo.forward_batch=6"],
            "config.ppo: a batch of 16 rows does not divide into slices of 6: change forward_batch",
        ),
        (
            ["--config.ppo.slots=4", "--config.seeds=2"],
            "config.ppo: slots = 4 cannot sample for seeds = 2 at once: set slots to None, or seeds to 1",
        ),
        (
            ["--config.dpo.optimizer.micro_batch=32"],
            "config.dpo: a batch of 16 rows does not divide into slices of 32: change optimizer.micro_batch",
        ),
        (
            ["--config.runtime.data=2", "--config.ppo.minibatches=16"],
            "config.ppo: a batch of 1 rows does not divide over 2 devices: change the batch size",
        ),
    ],
)
def test_batches_and_calls_that_do_not_divide_stop_a_run_before_its_first_stage(flags, message, tmp_path, capsys):
    assert message in fails(capsys, PREFERENCES, f"--workdir={tmp_path / 'run'}", *files(tmp_path), *flags)
    assert not (tmp_path / "run").exists()


def test_configs_that_cannot_be(tmp_path, capsys):
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config(:\n")
    assert "SyntaxError" in fails(capsys, f"--config={broken}", "--workdir=x")
    broken.write_text("def get_config():\n    return 3\n")
    assert "returned a int" in fails(capsys, f"--config={broken}", "--workdir=x")
    assert "no file" in fails(capsys, "--config=nowhere.py", "--workdir=x")
    assert "--workdir" in fails(capsys, PREFERENCES)
    assert "config.data.train" in fails(
        capsys, f"--config={ROOT}/experiments/preferences.py", f"--workdir={tmp_path / 'run'}"
    )
    assert "no verb 'traim'" in fails(capsys, "traim")


def test_a_traceback_only_with_debug(tmp_path, capsys):
    assert main(["--config=nowhere.py", f"--workdir={tmp_path}", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_stage_whose_inputs_are_missing(tmp_path, capsys):
    message = fails(capsys, PREFERENCES, f"--workdir={tmp_path / 'run'}", *files(tmp_path), "--stage=ppo")
    assert "'sft' is missing" in message
    assert "--stage=sft" in message


def test_a_workdir_of_another_config(tmp_path, capsys):
    arguments = [PREFERENCES, f"--workdir={tmp_path / 'run'}", *files(tmp_path), "--stage=sft"]
    assert main(arguments) == 0
    checkpoint = sorted((tmp_path / "run" / "sft").rglob("*"))
    message = fails(capsys, *arguments, "--config.sft.optimizer.learning_rate=0.5")
    assert "optimizer.learning_rate: 0.001 there, 0.5 now" in message
    assert f"--inputs={tmp_path / 'run'}" in message
    assert sorted((tmp_path / "run" / "sft").rglob("*")) == checkpoint

    # What the message suggests works: SFT is read from there, the reward model is trained here.
    moved = [argument.replace(str(tmp_path / "run"), str(tmp_path / "new")) for argument in arguments[:-1]]
    assert main([*moved, f"--inputs={tmp_path / 'run'}", "--stage=reward_model"]) == 0
    assert not (tmp_path / "new" / "sft").exists()
    assert (tmp_path / "new" / "reward_model" / "complete.json").exists()

    # From now on --inputs is known.
    assert Run(tmp_path / "new").directory("sft") == tmp_path / "run" / "sft"
    capsys.readouterr()
    assert main([*moved, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["sft", "in"], ["reward_model", "complete"], ["dpo", "runs"]]
    assert any(line.startswith("To run: 3 of 5 stages.") for line in lines)


def test_columns_are_mapped_from_the_command_line(tmp_path):
    flags = ["--config.data.columns.prompt=question", "--config.data.columns.chosen=better"]
    config, _ = parse_run_flags([PREFERENCES, f"--workdir={tmp_path}", *flags])
    columns = experiment.parse(config).data.columns
    assert (columns.prompt, columns.chosen, columns.rejected) == ("question", "better", None)


def test_a_dry_run_has_sizes_and_the_times_of_earlier_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    arguments = [PREFERENCES, f"--workdir={tmp_path / 'run'}", *files(tmp_path)]
    config, _ = parse_run_flags(arguments)
    parsed, here = experiment.parse(config), provenance.environment()
    keys = experiment.cost_keys(parsed, here)
    timings.add_timing(compilation_cache.cache_dir(), keys["ppo"], timings.Timing(90.0, 20.0, 3_000_000))
    faster, _ = parse_run_flags([*arguments, "--config.ppo.kl_coef=0.3", "--config.sft.batch_size=8"])
    changed = experiment.cost_keys(experiment.parse(faster), here)
    assert changed["sft"] != keys["sft"] and changed["dpo"] != keys["dpo"], "the policy is another one"

    assert main([*arguments, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: " ".join(line.split()) for line in lines}
    sft = parsed.stages["sft"]
    assert isinstance(sft, SFTConfig) and isinstance(sft.model, ModelConfig)
    network = PolicyNetwork(sft.model, 320, ())
    count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0))))
    assert rows["sft"] == f"sft runs {rounded(count)} batch 16, 1 epochs {size(24 * count)}"
    assert rows["ppo"] == f"ppo runs {rounded(count)} batch 8, 2 iterations 90 s 3 MB"
    assert "To run: 5 of 5 stages. Time: more than 90 s. Disk: more than" in " ".join(lines)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_names_why_stages_are_not_read_from_inputs(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    arguments = [PREFERENCES, *files(tmp_path), f"--workdir={tmp_path / 'new'}"]
    earlier = Workdir(tmp_path / "old")
    parsed = experiment.parse(parse_run_flags([*arguments, "--config.sft.batch_size=8"])[0])
    for name in ("sft", "reward_model"):
        identity = parsed.identity(name, earlier.fingerprint)
        earlier.begin(name, identity)
        earlier.complete(name, identity)
    assert main([*arguments, f"--inputs={earlier.root}", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"sft: not read from {earlier.root}: batch_size: 8 there, 16 now" in lines
    assert f"reward_model: not read from {earlier.root}: it reads sft" in lines
    assert not any(line.startswith("dpo: not read") for line in lines), "it is not there"
    assert main([*arguments, f"--inputs={earlier.root}", "--dry-run", "--config.sft.batch_size=8"]) == 0
    assert "not read" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", '{"section": {"kind": "dpo"}}', "has no model_type"),
        ("config.json", '{"model_type": "llama"}', "model.safetensors"),
        ("adapter_config.json", "{}", "has no base_model_name_or_path"),
        ("notes.txt", "", "config.json cannot be read"),
        ("model.gguf", "GGML", "model.gguf is not a GGUF file"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_stops_a_run_before_its_first_stage(name, content, words, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / name).write_text(content)
    source = checkpoint / name if name.endswith(".gguf") else checkpoint
    arguments = [PREFERENCES, *files(tmp_path), f"--workdir={tmp_path / 'run'}", f"--config.ppo.reward_model={source}"]
    message = fails(capsys, *arguments)
    assert message.startswith("Error: config.ppo: ") and words in message
    assert fails(capsys, *arguments, "--dry-run") == message
    assert not (tmp_path / "run").exists()


def test_a_config_is_printed_with_its_defaults(tmp_path, capsys):
    assert main(["config", PREFERENCES, "--config.dpo.beta=0.7", "--config.data.train=mine.jsonl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "config.dpo.beta = 0.7" in lines and "config.data.train = 'mine.jsonl'" in lines
    assert "config.dpo.cached_reference = False  # default" in lines
    assert "config.dpo.optimizer.learning_rate = 0.0001" in lines
    assert "is not a flag of config" in fails(capsys, "config", PREFERENCES, "--workdir=x")


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rlhf-jax {rlhf_jax.__version__}\n"


def test_a_changed_data_file_is_another_config(tmp_path, capsys):
    arguments = [PREFERENCES, f"--workdir={tmp_path / 'run'}", *files(tmp_path), "--stage=sft"]
    assert main(arguments) == 0
    WRITERS["jsonl"](pairs(64, seed=1), tmp_path / "train.jsonl")
    assert "data_sha256.train" in fails(capsys, *arguments)


@pytest.mark.nightly
def test_what_is_cut_of_the_data_is_said_once_and_whole_on_80_columns(tmp_path):
    config, _ = parse_run_flags(
        [PREFERENCES, f"--workdir={tmp_path}", *files(tmp_path), "--config.data.max_response_tokens=4"]
    )
    train = tmp_path / "train.jsonl"
    first, *others = train.read_text().splitlines(keepends=True)
    row = json.loads(first)
    train.write_text("".join([json.dumps(row | {"rejected": row["chosen"]}) + "\n", *others]))
    printed = io.StringIO()
    place = Workdir(tmp_path / "run")
    for stage in ("sft", "reward_model", "dpo"):
        experiment.run(experiment.parse(config), place, stage, Console(file=printed, width=80))
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    said = " ".join(line.strip() for line in lines)
    assert said.count("lengths in tokens") == 1, "of the same rows once, whatever reads them"
    data = json.loads((tmp_path / "run" / "dpo" / "data.json").read_text())
    assert set(data["splits"]) == {"train", "eval"}
    lengths = data["splits"]["train"]["lengths"]
    assert [figure["column"] for figure in lengths] == ["prompt", "chosen", "rejected"]
    assert [figure["rows"] for figure in lengths] == [64] * 3
    assert all(figure["cut"] > 0.05 for figure in lengths[1:])
    cut, same, *_ = data["warnings"]
    assert f"Warning: {cut}" in said and f"Warning: {same}" in said
    assert "data.max_response_tokens cuts" in cut
    assert same == "chosen and rejected are identical in 1 of 64 rows (train): these rows express no preference."


def test_a_start_that_failed_on_a_row_leaves_no_lock(tmp_path, capsys):
    flags = files(tmp_path)
    train = tmp_path / "train.jsonl"
    rows = train.read_text()
    train.write_text(rows.replace('"chosen"', '"choosen"', 1))
    arguments = [PREFERENCES, f"--workdir={tmp_path / 'run'}", *flags, "--stage=sft"]
    assert "contain no completion" in fails(capsys, *arguments)
    assert (tmp_path / "run" / "sft" / "config.json").exists()
    failed, *others = statuses(tmp_path / "run")
    assert failed.state == "failed" and "contain no completion" in failed.detail
    assert {other.state for other in others} == {"not started"} and len(others) == 4
    train.write_text(rows)
    assert main(arguments) == 0
    assert "sft: an earlier start with another config left no checkpoint; starting again." in capsys.readouterr().out
    assert next(statuses(tmp_path / "run")).state == "complete"
    assert (tmp_path / "run" / "sft" / "complete.json").exists()


@pytest.mark.nightly
def test_a_start_that_failed_on_the_batch_size_leaves_no_lock(tmp_path, capsys):
    arguments = [PREFERENCES, f"--workdir={tmp_path / 'run'}", *files(tmp_path), "--stage=sft"]
    assert "lower batch_size" in fails(capsys, *arguments, "--config.sft.batch_size=65")
    assert (tmp_path / "run" / "sft" / "config.json").exists()
    assert main([*arguments, "--config.sft.batch_size=32"]) == 0
    # With a checkpoint on disk the stage is what another config made, complete or not.
    (tmp_path / "run" / "sft" / "complete.json").unlink()
    assert "batch_size: 32 there, 16 now" in fails(capsys, *arguments, "--config.sft.batch_size=16")


def test_data_are_known_by_what_they_hold_and_not_by_their_place(tmp_path, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    arguments = [PREFERENCES, f"--workdir={tmp_path / 'run'}", "--stage=sft"]
    assert main([*arguments, *files(here)]) == 0
    before = (tmp_path / "run" / "sft" / "complete.json").stat().st_mtime_ns
    here.rename(there)
    flags = [f"--config.data.{split}={there}/{split}.jsonl" for split in ("train", "eval")]
    assert main([*arguments, *flags]) == 0
    assert (tmp_path / "run" / "sft" / "complete.json").stat().st_mtime_ns == before, "not run again"
    capsys.readouterr()
    assert (
        main([PREFERENCES, f"--workdir={tmp_path / 'new'}", f"--inputs={tmp_path / 'run'}", *flags, "--stage=sft"]) == 0
    )
    assert not (tmp_path / "new").exists(), "found under --inputs"


def test_a_truncated_data_file(tmp_path, capsys):
    flags = files(tmp_path)
    train = tmp_path / "train.jsonl"
    train.write_text(train.read_text()[:-20])
    message = fails(capsys, PREFERENCES, f"--workdir={tmp_path / 'run'}", *flags)
    assert f"{train}" in message
    assert "64" in message


def test_a_file_where_a_directory_belongs(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "is a file" in fails(capsys, PREFERENCES, f"--workdir={tmp_path / 'file'}", *files(tmp_path))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "sft").write_text("mine")
    assert "is a file" in fails(capsys, PREFERENCES, f"--workdir={tmp_path / 'run'}", *files(tmp_path))
    assert (tmp_path / "file").read_text() == (tmp_path / "run" / "sft").read_text() == "mine"


@pytest.mark.nightly
def test_a_full_disk_loses_nothing(tmp_path):
    """Files may grow to 60 KB: configs and tokenizer fit, a checkpoint does not. Then there is room again."""
    command = [sys.executable, "-m", "rlhf_jax", PREFERENCES, f"--workdir={tmp_path / 'run'}", *files(tmp_path)]
    command += ["--stage=sft", "--config.sft.model.d_model=64"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags.XLA_FLAGS}

    limited = ["bash", "-c", 'ulimit -f 60; exec "$@"', "bash", *command]  # RLIMIT_FSIZE, in units of 1,024 bytes
    full = subprocess.run(limited, env=environment, capture_output=True, text=True)
    assert full.returncode == 1, full.stdout + full.stderr
    assert "Traceback" not in full.stderr
    assert full.stderr.count("Error: ") == 1
    assert "sft" in full.stderr.split("Error: ")[1]
    assert not (tmp_path / "run" / "sft" / "complete.json").exists()

    assert main(command[3:]) == 0
    assert json.loads((tmp_path / "run" / "sft" / "summary.json").read_text())["steps"] == 4


def test_sample_prints_continuations_with_scores(tmp_path, capsys):
    arguments = [
        PREFERENCES,
        f"--workdir={tmp_path / 'run'}",
        *files(tmp_path),
        "--config.stages=('sft','reward_model')",
    ]
    run_without_figures(*arguments)
    capsys.readouterr()
    sample = ["sample", f"--workdir={tmp_path / 'run'}", "--stage=sft", "--prompt=the film", "--n=3"]
    assert main(sample) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main(sample) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert sum("the film" in line for line in lines) == 3
    assert "no verb" not in fails(capsys, "sample", f"--workdir={tmp_path / 'run'}", "--stage=ppo", "--prompt=x")


@pytest.mark.parametrize(
    ("flags", "place", "value"),
    [
        (["dpo.loss.losses=('ipo',)"], "dpo.loss.losses", ("ipo",)),
        (["ppo.whiten_rewards=True"], "ppo.whiten_rewards", True),
        (["sft.model.remat=True"], "sft.model.remat", True),
        (["ppo.tuning.lora={'rank': 8, 'alpha': 16, 'targets': ('up',)}"], "ppo.tuning.lora.rank", 8),
        (
            ["ppo.tuning.lora.rank=8", "ppo.tuning.lora.alpha=16", "ppo.tuning.lora.targets=('up',)"],
            "ppo.tuning.lora.alpha",
            16.0,
        ),
        (["ppo.optimizer.b1=0.8"], "ppo.optimizer.b1", 0.8),
        (["ppo.reward_model.functions=('a.py:f',)"], "ppo.reward_model.functions", ("a.py:f",)),
        (["ppo.reward_model={'functions': ('a.py:f',), 'model': 'reward_model'}"], "ppo.reward_model.weights", None),
        (["evaluate.judge.url='http://x/v1'", "evaluate.judge.model=m"], "evaluate.judge.model", "m"),
        (["evaluate.judge.functions=('a.py:f',)"], "evaluate.judge.functions", ("a.py:f",)),
        (["evaluate.judge=reward_model"], "evaluate.judge", "reward_model"),
    ],
)
def test_any_field_of_a_stage_is_a_flag(flags, place, value, tmp_path):
    given = [f"--config.{flag}" for flag in flags]
    config, _ = parse_run_flags([PREFERENCES, *given, "--workdir=x", *files(tmp_path)])
    name, *path = place.split(".")
    found = experiment.parse(config).stages[name]
    for field in path:
        found = getattr(found, field)
    assert repr(found) == repr(value)


def test_common_fields_are_flags(tmp_path):
    flags = ["--config.seeds=4", "--config.data.max_prompt_tokens", "64", "--config.runtime.data=2"]
    config, options = parse_run_flags([PREFERENCES, *flags, "--workdir", "x", *files(tmp_path)])
    parsed = experiment.parse(config)
    assert (parsed.seeds, parsed.data.max_prompt_tokens, parsed.runtime.data) == (4, 64, 2)
    assert str(options.workdir) == "x"


def test_a_whole_stage_is_added_by_flags(tmp_path):
    section = {"kind": "kto", "policy": "sft", "preferences": "None", "beta": "0.3", "batch_size": "4", "epochs": "1"}
    section |= {"sample_prompts": "2", "eval_every": "5", "loop": "{'steps_per_call': 2, 'checkpoint_every': 4}"}
    optimizer = {"learning_rate": "1e-3", "schedule": "constant", "warmup_steps": "0", "weight_decay": "0"}
    section |= {f"optimizer.{key}": value for key, value in (optimizer | {"max_grad_norm": "1"}).items()}
    flags = [f"--config.added.{key}={value}" for key, value in section.items()]
    config, _ = parse_run_flags(
        [PREFERENCES, "--workdir=x", *files(tmp_path), *flags, "--config.stages=('sft', 'added')"]
    )
    parsed = experiment.parse(config)
    assert list(parsed.stages) == ["sft", "added"]
    added = parsed.stages["added"]
    assert isinstance(added, KTOConfig) and added.beta == 0.3 and added.optimizer.learning_rate == 1e-3
