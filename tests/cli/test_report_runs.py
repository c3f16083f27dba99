"""`rlhf-jax report` writes one file about one run or several."""

import pytest

from rlhf_jax.main import main
from rlhf_jax.reports import report
from tests.support import workdirs


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda run: {})
    monkeypatch.chdir(tmp_path)
    return [str(workdirs.write_all(tmp_path / name)) for name in ("one", "two")]


def test_a_single_run_has_its_report_and_tables_written_anew(runs, tmp_path, capsys):
    assert main(["report", runs[0]]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'one' / 'report.html'}\n"
    assert {path.name for path in (tmp_path / "one").glob("*.*")} >= {"report.html", "results.csv", "differences.csv"}


def test_several_runs_stand_in_one_file_and_are_left_as_they_are(runs, tmp_path, capsys):
    assert main(["report", *runs]) == 0 and main(["report", *runs, "--out=new/both.html"]) == 0
    assert capsys.readouterr().out == "report.html\nnew/both.html\n"
    page = (tmp_path / "report.html").read_text()
    other = (tmp_path / "new" / "both.html").read_text()
    assert other.replace("both.samples.js", "report.samples.js") == page
    assert "<h1>one and two</h1>" in page and page.count("PPO has the highest gold score") == 2
    assert not [*tmp_path.glob("*/results.csv")]


def test_a_directory_that_is_missing_is_named(runs, capsys):
    assert main(["report", runs[0], "nowhere"]) == 1
    assert "work directory nowhere does not exist" in capsys.readouterr().err
