"""Models by their ids on the hub: huggingface_hub's own downloads from a server here, and what can go wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import checkpoints, hub_server

ROOT = Path(__file__).parents[2]
# In a process of its own, because huggingface_hub reads its settings when it is imported.
SCRIPT = """
import json, sys
from huggingface_hub import constants
from rlhf_jax.interop.hf import find_checkpoint
from rlhf_jax.loading.pretrained import load_checkpoint
from rlhf_jax.types import RlhfError

def said(name):
    try:
        return str(find_checkpoint(name))
    except RlhfError as error:
        return f"Error: {error}"

found = {name: said(name) for name in sys.argv[1:]}
model = load_checkpoint("owner/tiny")
found["vocabulary"] = model.network.vocab_size, model.tokenizer.vocab_size
constants.HF_HUB_OFFLINE = True
found |= {f"offline {name}": said(name) for name in ("owner/tiny", "owner/new")}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hub")
    model = checkpoints.policy(directory / "model")
    (model / "pytorch_model.bin").write_bytes(b"not wanted")
    refused = {"owner/gated": (403, "GatedRepo"), "owner/closed": (401, "GatedRepo"), "owner/broken": (500, "")}
    with hub_server.serving({"owner/tiny": model}, refused) as server:
        settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(directory / "cache"), "HF_HUB_DISABLE_XET": "1"}
        names = ["owner/tiny", "owner/gated", "owner/closed", "owner/none", "owner/broken", "owner//tiny"]
        environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *names],
            env={**environment, **settings, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return model, json.loads(done.stdout), server.asked


def test_a_model_is_downloaded_without_what_is_not_read(found):
    model, said, asked = found
    directory = Path(said["owner/tiny"])
    kept = {file.name for file in directory.iterdir()}
    assert kept == {file.name for file in model.iterdir()} - {"pytorch_model.bin"}
    for name in kept:
        assert (directory / name).read_bytes() == (model / name).read_bytes()
    assert not [path for path in asked if "pytorch_model" in path]
    assert said["vocabulary"][0] == checkpoints.CONFIG["vocab_size"] >= said["vocabulary"][1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/gated", "owner/gated is gated: request access on its hub page, and set HF_TOKEN"),
        ("owner/closed", "owner/closed is gated"),
        ("owner/none", "owner/none is neither a directory nor a public model on the hub"),
        ("owner/broken", "could not be downloaded from the hub (Server error '500"),
        ("owner//tiny", "owner//tiny is not a directory"),
        ("offline owner/new", "could not be downloaded from the hub (HF_HUB_OFFLINE is set): check the name"),
    ],
)
def test_what_the_hub_does_not_give(name, message, found):
    assert found[1][name].startswith("Error: ")
    assert message in found[1][name]


def test_what_was_downloaded_is_there_without_the_hub(found):
    assert found[1]["offline owner/tiny"] == found[1]["owner/tiny"]
