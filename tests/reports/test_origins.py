"""The report says where its numbers come from."""

import copy

import pytest

from rlhf_jax.reports import report
from rlhf_jax.reports.origins import headline, origins, source_name
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime import provenance
from rlhf_jax.runtime.files import read_json, write_json
from tests.support import workdirs

BATCH = {"rows": 64, "unit": "pairs", "micro_batches": 4, "devices": 2, "tokens": 1234.4}


@pytest.fixture(scope="module")
def here():
    found = provenance.environment()
    found["source"] |= {"commit": "0123456789abcdef", "clean": True, "changed": []}
    return found


def record(run: Run, stage: str, one: dict, **fields) -> None:
    path = run.directory(stage) / "summary.json"
    whole = {**one, "earlier": [], "seeds": [3], "sha256": {"train": "feed" * 16}, "inputs": {}, "config": "c0ffee"}
    write_json(path, read_json(path) | {"provenance": {**whole, **fields}})


def test_the_report_names_source_machine_packages_seeds_data_and_batch(tmp_path, here, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda run: {})
    run = Run(workdirs.write_all(tmp_path, gold=False))
    assert origins(run) == "" and headline(run) == "", "stages of earlier versions say nothing"
    for stage in run.stages:
        record(run, stage, here, **({"batch": BATCH, "seeds": [3, 4]} if stage == "dpo_1" else {}))
    page = report.write_report(tmp_path).read_text()
    expected = ["commit 0123456789ab (clean)", here["machine"]["processor"], f"jax {here['packages']['jax']}"]
    expected += [
        "64 pairs (in 4 parts on 2 devices)",
        "<td>1,234</td>",
        "<td>3, 4</td>",
        "train feedfeedfeed",
        "c0ffee",
    ]
    for words in (*expected, here["machine"]["cpu_target"]["features"][0]):
        assert words in page, words
    head = page[: page.index('<section id="results">')]
    assert "commit 0123456789ab (clean)" in head and here["date"] in head


def test_stages_of_different_places_stand_apart(tmp_path, here):
    run = Run(workdirs.write_all(tmp_path, gold=False))
    other = copy.deepcopy(here)
    other["source"] |= {"clean": False, "changed": ["rlhf_jax/loss.py"]}
    for stage in run.stages[:-1]:
        record(run, stage, other if stage == "ppo" else here)
    shown = origins(run)
    assert shown.count("<dt>stages</dt>") == 2 and "rlhf_jax/loss.py" in shown
    assert "with uncommitted changes" in shown and "Not recorded: evaluate" in shown
    assert "some stages ran in another environment" in headline(run)
    resumed = Run(workdirs.write_all(tmp_path / "resumed", gold=False))
    record(resumed, "ppo", here, earlier=[other])
    assert "<dt>started by</dt>" in origins(resumed)


def test_names_of_sources_and_machines():
    assert (
        source_name({"version": "1.2", "origin": "installed package", "commit": None})
        == "version 1.2 (installed package)"
    )
    gpus = {"platform": "gpu", "devices": ["NVIDIA H100"] * 4}
    assert provenance.machine_name(gpus) == "4 × NVIDIA H100"
    cpu = {"platform": "cpu", "threads": 1, "processor": "AMD EPYC", "cpu_target": None}
    assert provenance.machine_name(cpu) == "1 thread of AMD EPYC"
