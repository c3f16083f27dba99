"""docs/explanation/speed.md has the tables of the committed results."""

from experiments.benchmarks import write_speed


def test_the_page_has_the_tables_of_the_results():
    text = write_speed.PAGE.read_text(encoding="utf-8")
    assert write_speed.page(text) == text, "run python -m experiments.benchmarks.write_speed"


def test_another_result_changes_the_page(monkeypatch, tmp_path):
    for file in write_speed.RESULTS.glob("*.jsonl"):
        (tmp_path / file.name).write_text(file.read_text().replace('"ratio": 5.04', '"ratio": 6.04'))
    monkeypatch.setattr(write_speed, "RESULTS", tmp_path)
    text = write_speed.PAGE.read_text(encoding="utf-8")
    assert "| 5.04 |" in text and "| 6.04 |" in write_speed.page(text)
