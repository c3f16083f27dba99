"""The report's HTML: whole, without references to other files, and with what was written as text."""

import html.parser
import json
import re

import pytest

from rlhf_jax.reports import html as page
from rlhf_jax.reports import markup, report, sample_data
from rlhf_jax.reports.differences import differences
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.files import read_rows, write_rows
from tests.support import workdirs

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Every element with its attributes, the text, and the report's data; fails on tags not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute stands twice in {tag}"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text += data


def written(root):
    page.write_page([Run(root)], root / report.REPORT)
    return root / report.REPORT


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    root = workdirs.write_all(tmp_path_factory.mktemp("a <b> & c"), gold=False, seeds=2, text=workdirs.EVIL, more=True)
    rows = workdirs.metric_rows({"loss": (2, 1)})
    workdirs.write_stage(root, "sft<i>", {"kind": "sft", "note": "</pre><script>"}, files={"metrics.jsonl": rows})
    return written(root)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return written(workdirs.write_all(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module", params=["plain", "evil"])
def parsed(request):
    return Page(request.getfixturevalue(request.param).read_text())


def test_the_document_is_whole(parsed, plain):
    assert plain.read_text().startswith("<!DOCTYPE html>\n<html lang=")
    assert [tag for tag, _ in parsed.elements].count("h1") == 1
    assert any("charset" in attributes for tag, attributes in parsed.elements if tag == "meta")


def test_nothing_is_fetched_from_anywhere(parsed, evil):
    assert not {tag for tag, _ in parsed.elements} & {"link", "img", "iframe", "object", "base"}
    for tag, attributes in parsed.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                assert value.startswith("#"), (tag, name, value)
            if not name.startswith("xmlns"):
                assert "http" not in (value or ""), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    styles = re.findall(r"<style[^>]*>(.*?)</style>", evil.read_text(), re.DOTALL)
    assert len(styles) == 1 and not any("@import" in style or "url(" in style for style in styles)


def test_ids_are_unique_and_every_reference_is_to_one(parsed):
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = {attributes["href"][1:] for _, attributes in parsed.elements if "href" in attributes}
    assert len(referred) > 6 and referred <= set(ids)
    charts = {attributes["data-chart"] for _, attributes in parsed.elements if "data-chart" in attributes}
    assert charts == set(parsed.data["charts"])


def test_what_models_and_people_wrote_is_text(evil):
    parsed = Page(evil.read_text())
    assert f" {workdirs.EVIL} (ppo 0)" in parsed.data["samples"]["rows"]["text"]
    assert "sft<i>" in parsed.text and "</pre><script>" in parsed.text
    assert "a <b> & c" in parsed.text


def test_further_tables_are_shown_where_their_columns_were_measured(plain, evil):
    parsed, other = Page(evil.read_text()), Page(plain.read_text())
    for text in ("LC wins, %", "63 ± 2.1", "Pairwise win rates", "rep-4"):
        assert text in parsed.text and text not in other.text, text


def test_controls_that_html_forbids_are_replaced():
    assert markup.text("a\x00b\x1b\ud800\tc\n<") == "a\ufffdb\ufffd\ufffd\tc\n&lt;"


def test_the_page_shows_results_configs_and_times_and_marks_the_best(plain):
    parsed = Page(plain.read_text())
    for text in ("1.70 ± 0.05", "61 [51, 71]", "dpo_01 *", "DPO β = 0.1", '"beta": 0.1', "the judge", "12 s"):
        assert text in parsed.text, text
    assert "PPO has the highest gold score: 1.70, which is 1.60 above SFT (95 % interval over prompts" in parsed.text
    (best,) = re.findall(r'<tr class="best"><th scope="row">(\w+)', plain.read_text())
    assert best == "ppo"


def test_a_best_score_within_the_interval_is_not_marked(tmp_path):
    workdirs.write_all(tmp_path)
    path = tmp_path / "evaluate" / "samples.jsonl"
    rows = read_rows(path)
    dpo = {row["step"]: row["gold"] for row in rows if row["method"] == "dpo_01"}
    ppo = [row | {"gold": dpo[row["step"]] + row["step"] % 2 - 0.4} for row in rows if row["method"] == "ppo"]
    write_rows(path, [*(row for row in rows if row["method"] != "ppo"), *ppo])
    gaps = {(gap["method"], gap["against"]): gap for gap in differences(Run(tmp_path)).to_dict("records")}
    assert gaps["ppo", "dpo_01"]["low"] < 0 < gaps["ppo", "dpo_01"]["difference"]
    assert '<tr class="best">' not in written(tmp_path).read_text()


def test_curves_are_of_every_metric_with_every_seed(evil):
    run, groups = Run(evil.parent), {group["kind"]: group for group in Page(evil.read_text()).data["curves"]}
    assert set(groups) == {run.kind(stage) for stage in run.stages if (run.directory(stage) / "metrics.jsonl").exists()}
    for stage in ("ppo", "dpo_1"):
        charts = groups[run.kind(stage)]["charts"]
        assert {column for chart in charts for column in chart["columns"]} == {*run.metrics(stage).columns} - {
            "step",
            "seed",
        }
    kl = next(chart for chart in groups["ppo"]["charts"] if chart["columns"] == ["objective/kl"])
    by_seed = run.metrics("ppo").pivot(index="step", columns="seed", values="objective/kl")
    (line,) = kl["lines"]
    assert line["x"] == [*by_seed.index] and line["y"] == [
        pytest.approx([*by_seed[seed]], rel=1e-4) for seed in by_seed
    ]


def test_long_curves_are_thinned_to_means(tmp_path):
    rows = workdirs.metric_rows({"loss": (2, 1)}, steps=2500)
    workdirs.write_stage(tmp_path, "sft", {"kind": "sft"}, files={"metrics.jsonl": rows})
    (group,) = Page(written(tmp_path).read_text()).data["curves"]
    (line,) = group["charts"][0]["lines"]
    assert group["every"] == 3 and len(line["x"]) == 834 and line["x"][:2] == [3, 6] and line["x"][-1] == 2500
    assert line["y"][0][1] == pytest.approx(sum(row["loss"] for row in rows[3:6]) / 3, rel=1e-4)


def test_runs_that_differ_in_their_seeds_share_lines(tmp_path):
    for seed in (0, 1):
        for name, rate in (("sft", 0.1), ("other", 0.1 + seed)):
            rows = [row | {"seed": seed} for row in workdirs.metric_rows({"loss": (2, 1)}, steps=3)]
            section = {"kind": "sft", "rate": rate}
            workdirs.write_stage(tmp_path / f"run_{seed}", name, section, files={"metrics.jsonl": rows}, seed=seed)
    runs = [Run(tmp_path / f"run_{seed}") for seed in (0, 1)]
    page.write_page(runs, tmp_path / "both.html")
    parsed = Page((tmp_path / "both.html").read_text())
    (group,) = parsed.data["curves"]
    assert [len(line["y"]) for line in group["charts"][0]["lines"]] == [2, 1, 1]
    assert group["stages"][0].endswith("2 runs") and {label[-5:] for label in group["stages"][1:]} == {"run_0", "run_1"}
    row = next(line for line in (tmp_path / "both.html").read_text().split("<tr>") if ">rate<" in line)
    assert re.findall(r"<td>([\d.]+)</td>", row) == ["0.1", "0.1", "0.1", "1.1"]


def test_all_samples_are_there_the_first_in_the_page_and_the_others_beside_it(tmp_path, plain):
    rows = [workdirs.sample_row(i, 0, f"answer {i}", 0.1, 0.2) for i in range(6500)]
    workdirs.write_stage(tmp_path, "ppo", {"kind": "ppo"}, files={"samples.jsonl": rows})
    found = Page(written(tmp_path).read_text()).data["samples"]
    script = (tmp_path / "report.samples.js").read_text()
    assert script.startswith("reportSamples({") and found["file"] == "report.samples.js"
    rest = json.loads(script.removeprefix("reportSamples(").removesuffix(");\n"))
    assert [*found["rows"]["text"], *rest["text"]] == [f" answer {i}" for i in range(6500)]
    assert found["more"] == len(rest["step"]) == 500
    write_rows(tmp_path / "ppo" / "samples.jsonl", rows[:10])
    assert Page(written(tmp_path).read_text()).data["samples"]["more"] == 0
    assert not (tmp_path / "report.samples.js").exists(), "samples of an earlier report do not stay"
    assert not plain.with_suffix(".samples.js").exists()


def test_values_of_tokens_are_in_the_page_up_to_a_share_of_its_size(tmp_path, monkeypatch):
    values = workdirs.token_values(40)
    rows = [workdirs.sample_row(i, 0, f"answer {i}", 0.1, 0.2) for i in range(40)]
    coloured = [row | ({"tokens": values} if row["step"] % 2 else {}) for row in rows]
    workdirs.write_stage(tmp_path, "ppo", {"kind": "ppo"}, files={"samples.jsonl": coloured})
    size = len(json.dumps(values))
    monkeypatch.setattr(sample_data, "MOST_ROWS", 12)
    monkeypatch.setattr(sample_data, "MOST_OF_TOKENS", 8 * size)
    found = Page(written(tmp_path).read_text()).data["samples"]
    rest = json.loads((tmp_path / "report.samples.js").read_text().removeprefix("reportSamples(").removesuffix(");\n"))
    assert found["tokens"] == 20 and len(found["rows"]["text"]) == 12 and len(rest["text"]) == 28
    assert 6 <= len(found["rows"]["tokens"]) <= 12 and len(rest["tokens"]) == 20 - len(found["rows"]["tokens"])
    for block in (found["rows"], rest):
        assert {block["step"][int(i)] % 2 for i in block["tokens"]} == {1}
        assert all(tokens == values for tokens in block["tokens"].values())
    monkeypatch.setattr(sample_data, "MOST_BYTES", 0)
    assert Page(written(tmp_path).read_text()).data["samples"]["rows"]["text"] == []


def test_best_of_n_starts_at_the_height_of_the_reference(tmp_path):
    run = Run(workdirs.write_all(tmp_path))
    path = tmp_path / "best_of_n" / "curve.jsonl"
    write_rows(path, [row | {"gold": row["gold"] + 0.5} for row in read_rows(path)])
    data = Page(written(tmp_path).read_text()).data
    marks = {mark["label"]: mark for mark in data["charts"]["frontier"]["marks"] if mark["kind"] != "band"}
    curve, results = run.best_of_n_curve("best_of_n"), run.results().set_index("method")
    assert marks["SFT"]["y"] == [pytest.approx(results["gold_score"]["sft"])]
    gains = curve["gold"] - curve["gold"][0] + results["gold_score"]["sft"]
    assert marks["Best-of-N"]["y"] == pytest.approx([*gains], rel=1e-4)
    assert marks["PPO"]["x"] == [pytest.approx(results["kl"]["ppo"])]


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
    assert [*page.named([Run(tmp_path / "a" / "run"), Run(tmp_path / "b" / "run")])] == ["a/run", "b/run"]
    assert [*page.named([Run(tmp_path / "a" / "run")])] == ["run"]
