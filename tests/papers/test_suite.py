"""The suite of papers: records, claims that can fail, verdicts from committed results, and runs that continue."""

import dataclasses
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from rlhf_jax.main import main
from rlhf_jax.papers import reproduce, suite
from rlhf_jax.papers.claims import judge
from rlhf_jax.papers.listing import listing
from rlhf_jax.papers.side_by_side import LOG, run_papers
from rlhf_jax.runtime.progress import duration
from rlhf_jax.types import RlhfError

RECORD = ("Figure", "Command", "Hardware and cost", "Seeds", "Judge and batch", "Data", "Deviations")
QUIET = Console(quiet=True)
NAMES = suite.names()
MEASURED = [name for name in NAMES if suite.read_results(suite.results_directory(name, "cpu")) is not None]


@pytest.mark.parametrize("name", NAMES)
def test_a_papers_docstring_is_its_record(name):
    text = (suite.papers_directory() / name / "paper.py").read_text(encoding="utf-8")
    docstring = text.split('"""')[1]
    assert [heading for heading in RECORD if f"\n{heading}: " not in docstring] == []
    assert f"rlhf-jax reproduce {name}" in docstring


@pytest.mark.parametrize("name", MEASURED)
def test_a_claims_criterion_refuses_what_its_null_gives(name):
    paper = suite.load_paper(name)
    table = suite.read_results(suite.results_directory(name, "cpu"))
    assert table is not None
    assert len({claim.name for claim in paper.claims}) == len(paper.claims)
    for claim in paper.claims:
        (outcome,) = judge([(claim, claim.null(table))])
        assert outcome.verdict != "reproduced", claim.name


@pytest.mark.parametrize("name", MEASURED)
def test_verdicts_and_figures_follow_from_the_committed_results(name):
    console = Console(record=True, width=120)
    reproduce.check(name, console)
    assert f"{name} (cpu): " in console.export_text()


@pytest.fixture
def papers(tmp_path, monkeypatch):
    """A copy of one paper with its results, in the place of the suite."""
    shutil.copytree(suite.papers_directory() / "beirami_2024", tmp_path / "papers" / "beirami_2024")
    monkeypatch.setattr(suite, "papers_directory", lambda: tmp_path / "papers")
    return tmp_path / "papers"


def test_a_changed_result_changes_the_verdict(papers):
    file = papers / "beirami_2024" / "results" / "cpu" / "seed_3.csv"
    table = pd.read_csv(file)
    table.loc[0, "kl_gap"] = -0.5
    table.to_csv(file, index=False)
    changed = suite.read_results(file.parent)
    assert changed is not None
    found = reproduce.verdicts("beirami_2024", changed)
    assert found[0].verdict == "contradicted"
    with pytest.raises(RlhfError, match="give other verdicts"):
        reproduce.check("beirami_2024", QUIET)


def test_a_record_with_other_settings_is_refused(papers):
    file = papers / "beirami_2024" / "results" / "cpu" / suite.RECORD
    record = json.loads(file.read_text())
    record["settings"]["responses"] = 33
    file.write_text(json.dumps(record))
    with pytest.raises(RlhfError, match="settings differ"):
        reproduce.check("beirami_2024", QUIET)


def test_a_run_continues_with_the_seeds_that_it_lacks(tmp_path):
    first = reproduce.reproduce("beirami_2024", "cpu", 2, tmp_path, QUIET)
    kept = (tmp_path / "seed_1.csv").read_bytes()
    (tmp_path / "seed_0.csv").unlink()
    again = reproduce.reproduce("beirami_2024", "cpu", 2, tmp_path, QUIET)
    assert (tmp_path / "seed_1.csv").read_bytes() == kept
    assert [outcome.mean for _, outcome in first] == [outcome.mean for _, outcome in again]
    committed = suite.results_directory("beirami_2024", "cpu")
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "seed_0.csv"), pd.read_csv(committed / "seed_0.csv"), rtol=1e-9
    )
    record = json.loads((tmp_path / suite.RECORD).read_text())
    assert record["settings"] == dict(suite.load_paper("beirami_2024").scales["cpu"].settings)
    assert (tmp_path / suite.FIGURE).exists()
    record["settings"]["responses"] = 33
    (tmp_path / suite.RECORD).write_text(json.dumps(record))
    with pytest.raises(RlhfError, match="choose another --workdir"):
        reproduce.reproduce("beirami_2024", "cpu", 2, tmp_path, QUIET)


@pytest.mark.nightly
def test_a_paper_that_fails_in_a_process_of_its_own_is_named_with_its_log(tmp_path):
    with pytest.raises(RlhfError, match=r"1 papers failed: see .*nobody_1999.log\.txt"):
        run_papers({"nobody_1999": tmp_path / "nobody_1999"}, [], 1, QUIET)
    assert "there is no paper 'nobody_1999'" in (tmp_path / "nobody_1999" / LOG).read_text()


@pytest.mark.nightly
def test_papers_run_side_by_side_and_a_failure_does_not_stop_the_others(tmp_path):
    workdirs = {name: tmp_path / name for name in ("nobody_1999", "beirami_2024")}
    with pytest.raises(RlhfError, match=r"1 papers failed: see .*nobody_1999.log\.txt"):
        run_papers(workdirs, ["--seeds=2"], 2, QUIET)
    found = suite.read_results(tmp_path / "beirami_2024")
    assert found is not None
    assert set(found["seed"]) == {0, 1}
    assert "never violated" in (tmp_path / "beirami_2024" / LOG).read_text()


def test_a_seed_is_kept_if_a_later_one_fails(tmp_path, monkeypatch):
    paper = suite.load_paper("beirami_2024")

    def measure(scale, seeds, workdir):
        if 1 in seeds:
            raise RlhfError("out of memory")
        return paper.measure(scale, seeds, workdir)

    monkeypatch.setattr(reproduce, "load_paper", lambda name: dataclasses.replace(paper, measure=measure))
    with pytest.raises(RlhfError, match="out of memory"):
        reproduce.reproduce("beirami_2024", "cpu", 2, tmp_path, QUIET)
    assert [file.name for file in tmp_path.glob("*.csv")] == ["seed_0.csv"]
    assert json.loads((tmp_path / suite.RECORD).read_text())["seconds"] >= 0


def test_the_list_has_every_claim_with_its_verdict(capsys):
    assert main(["reproduce", "--list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    claims = [(name, claim.name) for name in suite.names() for claim in suite.load_paper(name).claims]
    assert [(row["paper"], row["claim"]) for row in rows] == claims
    assert all(row["statement"] and row["number"] and row["figure"] for row in rows)
    assert all(row["commit"] and row["date"] for row in rows if row["verdict"] != "not run")


def test_the_list_fits_a_narrow_terminal_and_names_papers_claims_and_costs(capsys):
    lines = listing(reproduce.overview(), 80)
    assert max(map(len, lines)) <= 80
    whole = " ".join(" ".join(lines).split())
    for name in suite.names():
        paper = suite.load_paper(name)
        assert f"{name}: {paper.title} ({paper.source})" in whole
        assert all(f": {claim.name}" in whole for claim in paper.claims)
    assert main(["reproduce", "--list", "ahmadian_2024"]) == 0
    found = " ".join(capsys.readouterr().out.split())
    record = json.loads((suite.results_directory("ahmadian_2024", "cpu") / suite.RECORD).read_text())
    assert (
        f"scale cpu, 5 seeds, {duration(record['seconds'])} of one core, {record['environment']['date'][:10]}" in found
    )
    assert "reproduced: RLOO ends above DPO 0.718 [0.601, 0.834] difference in gold score; criterion: > 0" in found
    assert "azar_2023" not in found
    assert main(["reproduce", "--list", "nobody_1999"]) == 1
    assert "there is no paper 'nobody_1999'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name papers, or give --all"),
        (["beirami_2024", "--all"], "name papers, or give --all"),
        (["beirami_2024", "--processes=0"], "--processes = 0 should be at least 1"),
        (["nobody_1999"], "there is no paper 'nobody_1999': give one of "),
        (["beirami_2024", "--scale=moon"], "has no scale 'moon': give one of cpu"),
        (
            ["beirami_2024", "--scale=gpu"],
            "has no scale 'gpu': give one of cpu; papers with the scale gpu: rafailov_2023",
        ),
        (["beirami_2024", "azar_2023", "--workdir=x"], "--workdir=x is for one paper"),
        (["beirami_2024", "--seeds=0"], "--seeds = 0 should be at least 1"),
    ],
)
def test_bad_arguments_are_one_message(arguments, message, capsys):
    assert main(["reproduce", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not Path("runs/papers").exists()
