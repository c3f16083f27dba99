"""noisy_labels: nested parts of the pairs, nested flips, and held-out pairs as they were."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_jax.loading.tables import PREFERENCES
from rlhf_jax.runtime.files import read_rows
from rlhf_jax.runtime.workdir import Workdir
from rlhf_jax.stages import noisy_labels
from rlhf_jax.types import RlhfError
from tests.support import experiments


def pair(number: int) -> dict[str, Any]:
    return {
        "prompt": f"film {number}",
        "chosen": f"good {number}",
        "rejected": f"bad {number}",
        "chosen_score": float(number),
        "rejected_score": -1.0,
    }


def section(pairs: int | None, flipped: float, source: str = "preferences") -> dict[str, Any]:
    return {"kind": "noisy_labels", "preferences": source, "pairs": pairs, "flipped": flipped}


def run(directory: Path, stages: dict[str, dict[str, Any]]) -> Workdir:
    """Run stages that read 200 pairs of an earlier stage, which is written by hand."""
    source = directory / "own.py"
    source.write_text(
        "import dataclasses\n"
        "from rlhf_jax.loading.tables import PREFERENCES\n"
        "from rlhf_jax.runtime.files import write_rows\n"
        "from rlhf_jax.stages.kinds import Kind\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Own:\n"
        "    kind: str\n"
        "def run(config, context):\n"
        f"    rows = {[pair(number) for number in range(205)]!r}\n"
        "    write_rows(context.directory / PREFERENCES.train, rows[:200])\n"
        "    write_rows(context.directory / PREFERENCES.eval, rows[200:])\n"
        "    return {}\n"
        "OWN = Kind(config=Own, run=run, summary='Write pairs')\n"
    )
    data = experiments.questions(directory / "questions.jsonl", 4)
    return experiments.run(directory / "run", data, {"preferences": {"kind": f"{source}:OWN"}, **stages})


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    stages = {
        "few": section(50, 0.0),
        "low": section(50, 0.2),
        "high": section(None, 0.4),
        "none": section(None, 0.0),
    }
    return run(tmp_path_factory.mktemp("noisy"), stages)


def rows(chain: Workdir, stage: str) -> list[dict[str, Any]]:
    return read_rows(chain.find(stage) / PREFERENCES.train)


def test_fewer_pairs_are_among_more_and_flips_among_more_flips(chain):
    few, low, high = (rows(chain, name) for name in ("few", "low", "high"))
    prompts = [[row["prompt"] for row in table] for table in (few, low, high)]
    assert len(few) == 50 and len(high) == 200
    assert prompts[0] == prompts[1] == prompts[2][:50]
    assert sorted(prompts[2]) == sorted(pair(number)["prompt"] for number in range(200))
    assert prompts[2] != [pair(number)["prompt"] for number in range(200)]
    flipped = [{row["prompt"] for row in table if row["flipped"]} for table in (few, low, high)]
    assert flipped[0] == set()
    assert 0 < len(flipped[1]) < 50
    assert flipped[1] < flipped[2]
    summary = json.loads((chain.find("high") / "summary.json").read_text())
    assert summary["flipped_share"] == len(flipped[2]) / 200
    assert 0.3 < summary["flipped_share"] < 0.5


def test_a_flipped_pair_has_its_responses_and_their_scores_exchanged(chain):
    for row in rows(chain, "high"):
        original = pair(int(row["prompt"].split()[1]))
        expected = original if not row["flipped"] else noisy_labels.flip(original)
        assert row == expected | {"flipped": row["flipped"]}
    changed = noisy_labels.flip(pair(3))
    assert (changed["chosen"], changed["rejected"]) == ("bad 3", "good 3")
    assert (changed["chosen_score"], changed["rejected_score"]) == (-1.0, 3.0)


def test_held_out_pairs_are_not_changed(chain):
    for name in ("few", "high"):
        held_out = read_rows(chain.find(name) / PREFERENCES.eval)
        assert held_out == [pair(number) for number in range(200, 205)]


def test_more_pairs_than_there_are(tmp_path):
    with pytest.raises(RlhfError, match=r"config.more.pairs = 201, but preferences has 200 training pairs"):
        run(tmp_path, {"more": section(201, 0.0)})
