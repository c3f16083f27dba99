"""Stages that sample and write files, killed in the midst of it with SIGKILL: in the end their files are the same."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.support import experiments
from tests.support.interrupted import FILES, Process

pytestmark = pytest.mark.nightly

SAMPLED = {"prompts": 24, "eval_prompts": 4, "samples_per_prompt": 2}


def write_config(directory: Path) -> Path:
    """A config file: two stages that sample, one that trains on what was sampled, and a judge of its checkpoints."""
    model, judge = experiments.models(directory)
    stages = {
        "rejection_sampling": {"policy": model, "reward_model": judge, "temperature": 1.0, "keep": {"best": 1}},
        "preferences": {"policy": model, "judge": None, "reward_model": judge, "label_beta": None},
        "sft": {
            "tokenizer": None,
            "model": {"init": model},
            "demonstrations": "rejection_sampling",
            "optimizer": experiments.OPTIMIZER,
            "batch_size": 4,
            "epochs": 1.0,
            "sample_prompts": 0,
            "eval_every": 100,
            "loop": {"steps_per_call": 1, "checkpoint_every": 2, "keep": 3},
        },
        "frontier": {
            "reference": model,
            "policies": ("sft",),
            "judge": judge,
            "prompts": 24,
            "temperature": 1.0,
            "kl_targets": (0.01,),
        },
    }
    for kind, section in stages.items():
        section["kind"] = kind
        if kind in ("rejection_sampling", "preferences"):
            section |= SAMPLED
    config = {
        "seed": 0,
        "seeds": 1,
        "stages": list(stages),
        "data": dataclasses.asdict(experiments.data_config(experiments.questions(directory / "asked.jsonl", 32))),
        "runtime": experiments.RUNTIME,
        **stages,
    }
    (directory / "config.json").write_text(json.dumps(config))
    path = directory / "config.py"
    path.write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config(): return ConfigDict(json.load(open({str(directory / 'config.json')!r}))).lock()\n"
    )
    return path


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory) -> tuple[Path, Path]:
    """A run that nobody disturbed, and one that was killed in every stage that samples."""
    directory = tmp_path_factory.mktemp("killed")
    config, cache = write_config(directory), directory / "cache-all-never"
    whole, disturbed = ([f"--config={config}", f"--workdir={directory / name}"] for name in ("whole", "disturbed"))
    Process(directory, cache, "all", "never", whole).finish()
    for stage, (name, number) in FILES.items():
        Process(directory, cache, stage, "write", disturbed).kill_at_marker()
        stopped = directory / "disturbed" / stage
        assert not (stopped / "complete.json").exists() and (stopped / f".{name}.tmp").exists()
        if number == 1:
            assert not (stopped / name).exists()
        else:
            assert len(experiments.rows(stopped / name)) == number - 1
    Process(directory, cache, "none", "never", disturbed).finish()
    return directory / "whole", directory / "disturbed"


@pytest.mark.parametrize("stage", FILES)
def test_files_are_the_same_bytes_and_nothing_is_left_over(workdirs, stage):
    whole, disturbed = ({path.name: path for path in (workdir / stage).iterdir()} for workdir in workdirs)
    assert whole.keys() == disturbed.keys() and FILES[stage][0] in whole
    for name, path in whole.items():
        if name == "summary.json":
            summaries = [json.loads(file.read_text()) for file in (path, disturbed[name])]
            one, other = ({k: v for k, v in summary.items() if not k.startswith("time/")} for summary in summaries)
            assert one == other
        elif name == "environments.json":  # one for each process that worked on the stage
            one, other = (json.loads(file.read_text()) for file in (path, disturbed[name]))
            assert other == one * 2
        else:
            assert path.read_bytes() == disturbed[name].read_bytes() != b"", name
