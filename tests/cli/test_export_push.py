"""`rlhf-jax export --push`: the directory with its model card, on a hub on this machine."""

import subprocess
import sys

import pytest

from rlhf_jax.main import main
from rlhf_jax.reports.model_card import model_card
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime import provenance
from rlhf_jax.runtime.files import read_json, write_json
from tests.support import workdirs
from tests.support.hub_server import REVISION, receiving


@pytest.fixture
def run(tmp_path):
    root = tmp_path / "run"
    root.mkdir()
    workdirs.write_models(root)
    return root


def push(run, url, *flags):
    """In a process of its own: huggingface_hub reads the address and the token when it is imported."""
    arguments = ["export", f"--workdir={run}", "--stage=ppo", f"--out={run.parent / 'out'}", "--push=me/mine", *flags]
    program = f"import os, sys; os.environ.update(HF_ENDPOINT={url!r}, HF_TOKEN='hf_secret'); "
    program += f"from rlhf_jax.main import main; sys.exit(main({arguments!r}))"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


@pytest.mark.nightly
def test_the_hub_gets_every_file_and_the_card(run, tmp_path):
    with receiving() as (url, got):
        ended = push(run, url, "--private")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [str(tmp_path / "out"), f"{url}/me/mine/commit/{REVISION}"]
    assert got.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "config.json", "model.safetensors"} <= got.files.keys()
    assert got.files["README.md"].decode() == model_card(Run(run), "ppo", "mine")
    (created,) = got.created
    assert (created["name"], created["organization"]) == ("mine", "me")
    assert created.get("visibility") == "private" or created.get("private") is True, "by the version of the client"
    assert got.token == ["Bearer hf_secret"]


@pytest.mark.nightly
def test_a_refusal_is_one_message_and_keeps_the_directory(run, tmp_path):
    with receiving(refused=403) as (url, _):
        ended = push(run, url)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "cannot be uploaded to me/mine" in ended.stderr and "403" in ended.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_private_needs_push(run, tmp_path, capsys):
    assert main(["export", f"--workdir={run}", "--stage=ppo", f"--out={tmp_path / 'out'}", "--private"]) == 1
    assert "--private is only used with --push" in capsys.readouterr().err


def test_the_card_has_the_record_of_the_run(tmp_path):
    run = Run(workdirs.write_all(tmp_path))
    found = provenance.environment()
    found["source"] |= {"commit": "0123456789abcdef", "clean": True, "changed": []}
    path = run.directory("ppo") / "summary.json"
    record = {**found, "earlier": [], "seeds": [3], "sha256": {"train": "feed"}, "inputs": {}, "config": "c0ffee"}
    write_json(path, read_json(path) | {"provenance": record})
    card = model_card(run, "ppo", "mine")
    assert card.startswith("---\nlibrary_name: transformers\n") and "\n# mine\n" in card
    assert "| ppo | 1.70 ± 0.05 |" in card and "| sft | 0.10 ± 0.05 |" in card and "| dpo_1 " not in card
    assert "> **Caution:** Only 8 prompts" in card
    assert "| reward_model | reward_model | 12 s | – |" in card
    assert f"| ppo | ppo | 12 s | commit 0123456789ab (clean) | {provenance.machine_name(found['machine'])} |" in card
    assert "train `feed`" in card and "Seeds: 3." in card and '"reward_model": "reward_model"' in card
    assert "## Results" not in model_card(run, "preferences", "pairs"), "no evaluation compared it"
