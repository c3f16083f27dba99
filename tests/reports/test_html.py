import html.parser
import re
import shutil
import subprocess

import pandas as pd
import pytest

from rlhf_jax.reports import html as page
from rlhf_jax.reports import report
from tests.support import workdirs

VOID = {"meta", "br", "img", "link", "hr", "input"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page(html.parser.HTMLParser):
    """Every element with its attributes, and the text; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

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
        self.text += data


@pytest.fixture(scope="module", autouse=True)
def coarse():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "PNG_DPI", 20)
        yield


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    root = workdirs.write_all(tmp_path_factory.mktemp("a <b> & c"), gold=False, seeds=2, text=workdirs.EVIL, more=True)
    rows = workdirs.metric_rows({"loss": (2, 1)})
    workdirs.write_stage(root, "sft<i>", {"kind": "sft", "note": "</pre><script>"}, files={"metrics.jsonl": rows})
    return report.write_report(root)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return report.write_report(workdirs.write_all(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module", params=["plain", "evil"])
def parsed(request):
    return Page(request.getfixturevalue(request.param).read_text())


def test_the_document_is_whole(parsed, plain):
    assert plain.read_text().startswith("<!DOCTYPE html>\n<html lang=")
    assert [tag for tag, _ in parsed.elements].count("h1") == 1
    assert any("charset" in attributes for tag, attributes in parsed.elements if tag == "meta")


def test_nothing_is_fetched_from_anywhere(parsed, evil):
    assert not {tag for tag, _ in parsed.elements} & {"script", "link", "img", "iframe", "object", "base"}
    for tag, attributes in parsed.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                assert value.startswith("#"), (tag, name, value)
            if not name.startswith("xmlns"):
                assert "http" not in (value or ""), (tag, name, value)
            assert not name.startswith("on"), (tag, name)
    styles = re.findall(r"<style[^>]*>(.*?)</style>", evil.read_text(), re.DOTALL)
    assert len(styles) == 1 and not any("@import" in style or "url(" in style for style in styles)


def test_ids_are_unique_and_every_reference_within_a_figure_is_to_its_own(parsed):
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = {attributes["href"][1:] for _, attributes in parsed.elements if "href" in attributes}
    values = " ".join(value or "" for _, attributes in parsed.elements for value in attributes.values())
    referred |= set(re.findall(r"url\(#([^)]+)\)", values))
    assert len(referred) > 20
    assert referred <= set(ids)


def test_what_models_and_people_wrote_is_text(evil):
    parsed = Page(evil.read_text())
    assert f"{workdirs.EVIL} (ppo 0)" in parsed.text
    assert "sft<i>" in parsed.text and "</pre><script>" in parsed.text
    assert "a <b> & c" in parsed.text


def test_further_tables_are_shown_where_their_columns_were_measured(plain, evil):
    parsed = Page(evil.read_text())
    for text in ("LC wins, %", "63 ± 2.1", "Pairwise win rates", "rep-4"):
        assert text in parsed.text and text not in plain.read_text(), text


def test_controls_that_html_forbids_are_replaced():
    assert page.text("a\x00b\x1b\ud800\tc\n<") == "a\ufffdb\ufffd\ufffd\tc\n&lt;"


def test_the_page_shows_results_answers_configs_and_times(plain):
    parsed = Page(plain.read_text())
    for text in ("1.70 ± 0.05", "61 [51, 71]", "dpo_01 *", "DPO β = 0.1", '"beta": 0.1', "gold: the judge", "12 s"):
        assert text.replace("gold: ", "") in parsed.text, text
    assert "PPO has the highest gold score: 1.70, which is 1.60 above SFT (95 % interval over prompts" in parsed.text
    assert parsed.text.count("a fine film (ppo") == workdirs.PROMPTS
    folded = plain.read_text().split("<summary>3 more prompts</summary>")[1]
    assert "(ppo 5)" in folded and "(ppo 4)" not in folded.split("</details>")[0]


def test_a_long_prompt_is_not_repeated_before_every_answer():
    row = {"label": "SFT", "kind": "sft", "completion": " yes", "gold": 1.0, "score": 0.5}
    for prompt, times in (("short", 3), ("long " * 30, 1)):
        rows = pd.DataFrame([{**row, "prompt": prompt}] * 2)
        assert page.answers_to(prompt, rows, gold=True).count(prompt) == times


def test_figures_have_text_to_select_and_follow_the_page_by_day_and_night(plain):
    text = plain.read_text()
    assert text.count("<svg") == 7
    assert re.search(r"<text[^>]*>DPO β = 0.1</text>", text)
    figures = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--1f2328)" in figures and not re.search("#1f2328|#0072b2", figures)
    for color, night in page.style.DARK.items():
        assert f"--{color[1:]}: {color};" in text and f"--{color[1:]}: {night};" in text


def browse(path, profile):
    flags = ["headless", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run", "dump-dom"]
    flags += ["enable-logging=stderr", f"user-data-dir={profile}"]
    command = [str(CHROMIUM), *(f"--{flag}" for flag in flags), path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("name", ["plain", "evil"])
def test_a_browser_opens_the_page_without_an_error_and_it_fits_a_telephone(name, request, tmp_path):
    text = request.getfixturevalue(name).read_text()
    measure = (
        "<script>addEventListener('load', () => { const page = document.getElementById('page').contentDocument;"
        "document.title = [page.documentElement.scrollWidth, page.querySelectorAll('svg text').length,"
        "page.querySelectorAll('script').length].join(' '); })</script>"
    )
    frame = f'<iframe id="page" width="390" height="800" srcdoc="{page.text(text)}"></iframe>'
    (tmp_path / "frame.html").write_text(f'<!DOCTYPE html><meta charset="utf-8"><title></title>{frame}{measure}')
    found = browse(tmp_path / "frame.html", tmp_path / "profile")
    assert "CONSOLE" not in found.stderr, found.stderr
    match = re.search(r"<title>(\d+) (\d+) (\d+)</title>", found.stdout)
    assert match, found.stdout[:500]
    width, texts, scripts = map(int, match.groups())
    assert width <= 390, "tables and figures scroll by themselves, the page does not"
    assert texts > 50 and scripts == 0
