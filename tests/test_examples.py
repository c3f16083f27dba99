"""The examples of examples/, run through the command line."""

import json
import shutil

import pytest

from rlhf_jax.main import main
from rlhf_jax.reports.run import Run
from tests.support import checkpoints
from tests.support.commands import fails, succeeds
from tests.support.own_data import PREFERENCES, ROOT, files


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory of a user's own, with a copy of the examples."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    checkpoints.reward_model(tmp_path / "judge")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_stage_of_ones_own(place, capsys):
    fields = {"kind": "examples/stage.py:Confirm", "preferences": "None", "reward_model": "judge"}
    flags = [PREFERENCES, *files(place), *(f"--config.confirmed.{key}={value}" for key, value in fields.items())]
    flags += ["--config.sft.demonstrations=confirmed", "--config.stages=('confirmed', 'sft')"]
    assert main([*flags, "--workdir=run"]) == 0
    rows = [json.loads(line) for line in (place / "run" / "confirmed" / "preferences.jsonl").read_text().splitlines()]
    summary = json.loads((place / "run" / "confirmed" / "summary.json").read_text())
    assert 0 < len(rows) < 64 and summary["preferences.jsonl"] == {"read": 64, "kept": len(rows)}
    assert all(row["margin"] >= 0 for row in rows)
    assert "examples/stage.py:Confirm" in (place / "run" / "report.html").read_text()
    capsys.readouterr()

    assert main([*flags, "--workdir=run"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main([*flags, "--workdir=new", "--inputs=run", "--config.sft.epochs=2"]) == 0
    assert not (place / "new" / "confirmed").exists(), "read from run"
    assert Run("new", "run").stages == ["confirmed", "sft"]

    assert "margin: 0.0 there, 9.0 now" in fails(capsys, *flags, "--workdir=run", "--config.confirmed.margin=9")
    message = fails(capsys, *flags, "--workdir=other", "--config.confirmed.margin=1e6")
    assert "config.confirmed.margin = 1000000.0 leaves no pair for preferences.jsonl: lower it" in message
    assert "Did you mean 'margin'?" in fails(capsys, *flags, "--workdir=run", "--config.confirmed.margins=9")
    file = place / "examples" / "stage.py"
    file.write_text(file.read_text().replace("margin >= config.margin", "margin > config.margin"))
    assert "examples/stage.py:Confirm" in fails(capsys, *flags, "--workdir=run")


def test_fields_of_a_stage_of_ones_own(place, capsys):
    printed = succeeds(capsys, "fields", "examples/stage.py:Confirm")
    assert printed.startswith(
        "examples/stage.py:Confirm: Keep the preference pairs whose labels a reward model\nconfirms"
    )
    assert "\nmargin = 0.0   number >= 0\n      Smallest score of the chosen response less" in printed
    assert "is a function: make it a rlhf_jax.stages.kinds.Kind" in fails(capsys, "fields", "examples/stage.py:run")
