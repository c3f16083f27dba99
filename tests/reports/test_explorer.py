"""The report in a browser: it opens offline without an error, and its curves and its explorer do what they say."""

import re
import time

import pytest

from rlhf_jax.reports import report
from rlhf_jax.reports.html import write_page
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.files import write_rows
from tests.support import workdirs
from tests.support.browsing import chromium, opened

MANY = 50_000

PAINTED = """token => {
  const at = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const painted = colour => {
    at.fillStyle = colour;
    at.fillRect(0, 0, 1, 1);
    return [...at.getImageData(0, 0, 1, 1).data].slice(0, 3).map(value => value / 255);
  };
  const { color, backgroundColor } = getComputedStyle(token), ink = painted(color);
  painted(getComputedStyle(token.closest("dialog")).backgroundColor);
  return [ink, painted(backgroundColor)];
}"""
"""Function of an element in the dialog: the colours of its text and of the ground below it."""


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    root = workdirs.write_all(tmp_path_factory.mktemp("plain"))
    write_page([Run(root)], root / report.REPORT)
    return root / report.REPORT


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    root = workdirs.write_all(tmp_path_factory.mktemp("a <b> & c"), gold=False, seeds=2, text=workdirs.EVIL, more=True)
    rows = workdirs.metric_rows({"loss": (2, 1)})
    workdirs.write_stage(root, "sft<i>", {"kind": "sft", "note": "</pre><script>"}, files={"metrics.jsonl": rows})
    other = workdirs.write_all(tmp_path_factory.mktemp("other"))
    write_page([Run(root), Run(other)], root / "two.html")
    return root / "two.html"


def cards(page):
    return page.locator("#samples-view article")


def numbers(page, name):
    """The numbers of the first answer of each card in view, from top to bottom."""
    heads = page.eval_on_selector_all(
        "#samples-view article",
        "cards => cards.map(c => [parseFloat(c.style.top), c.querySelector('header').innerText])",
    )
    found = [re.search(rf"{name} ([−+\d.,]+)", text) for _, text in sorted(heads)]
    return [float(match[1].replace("−", "-").replace(",", "")) for match in found if match]


@pytest.mark.parametrize("name", ["plain", "evil"])
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_opens_without_an_error_and_is_as_wide_as_the_screen(browser, request, name, width, scheme):
    with opened(browser, request.getfixturevalue(name), width=width, scheme=scheme) as page:
        places = page.locator("figure:visible")
        for place in places.all():
            place.scroll_into_view_if_needed()
        page.wait_for_function(f"document.querySelectorAll('figure canvas').length === {places.count()}")
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (dark == "rgb(255, 255, 255)") == (scheme == "light")
        assert places.count() > 10


def test_charts_follow_the_colours_of_the_screen(browser, plain):
    drawn = "document.querySelector('[data-chart=frontier] canvas').toDataURL()"
    with opened(browser, plain) as page:
        page.locator("[data-chart=frontier]").scroll_into_view_if_needed()
        page.wait_for_function("document.querySelector('[data-chart=frontier] canvas')")
        light = page.evaluate(drawn)
        page.emulate_media(color_scheme="dark")
        page.wait_for_function(f"{drawn} !== {light!r}")


def test_curves_are_found_smoothed_read_and_zoomed(browser, plain):
    with opened(browser, plain) as page:
        page.fill("#curve-search", "objective/KL")
        shown = page.locator("#curves-view figure:visible")
        assert shown.count() == 1 and "1 of" in page.inner_text("#curves-view [role=status]")
        plot = shown.locator(".plot")
        plot.focus()
        page.keyboard.press("ArrowRight")
        assert re.search(r"iteration 2.*PPO.*: 0\.\d", page.inner_text("[aria-live]"), re.DOTALL)
        ends = "[...document.querySelectorAll('#curves-view figure')].find(f => !f.hidden)"
        limits = (
            f"(() => {{ const x = [...drawn].find(c => c.host === {ends}).plot.scales.x; return [x.min, x.max]; }})()"
        )
        whole = page.evaluate(limits)
        box = shown.locator(".u-over").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 50, box["y"] + 50)
        page.mouse.down()
        page.mouse.move(box["x"] + 150, box["y"] + 50)
        page.mouse.up()
        low, high = page.evaluate(limits)
        assert whole[0] < low < high < whole[1]
        plot.focus()
        page.keyboard.press("0")
        assert page.evaluate(limits) == whole
        shown.locator("summary").click()
        assert "lowest" in shown.locator("table").inner_text()


def test_smoothing_is_a_moving_average_and_seeds_are_a_mean_with_deviations(browser, plain):
    with opened(browser, plain) as page:
        assert page.evaluate("movingAverage([1, 4, null, 10, 7], 3)") == [2.5, 2.5, None, 8.5, 8.5]
        assert page.evaluate("overSeeds([[1, 2, null], [3, 2, null]])") == [[2, 2**0.5], [2, 0], [None, None]]


def test_samples_are_sorted_filtered_and_compared(browser, plain):
    with opened(browser, plain) as page:
        status = page.locator("#samples-view [role=status]")
        assert status.inner_text().startswith(f"{workdirs.PROMPTS} of ")
        assert page.input_value("#sample-of") != page.input_value("#sample-against") != ""
        page.select_option("#sample-sort", "gold")
        page.wait_for_function("document.querySelectorAll('#samples-view article').length > 1")
        rising = numbers(page, "gold")
        assert rising == sorted(rising) and len(set(rising)) > 1
        page.get_by_label("highest first").check()
        assert (
            numbers(page, "gold") == sorted(numbers(page, "gold"), reverse=True)
            and numbers(page, "gold")[0] > rising[0]
        )
        page.select_option("#sample-sort", "change")
        assert numbers(page, "change")[0] == pytest.approx(1.6)
        first = cards(page).first
        assert "ppo" in first.locator("ins").first.inner_text() and "sft" in first.locator("del").first.inner_text()
        assert "fine" not in "".join(first.locator("ins, del").all_inner_texts())
        page.fill("#sample-search", "(PPO 3)")
        assert status.inner_text().startswith("1 of ") and cards(page).count() == 1
        page.fill("#sample-search", "FINE film")
        assert set(page.locator("#samples-view mark").all_inner_texts()) == {"fine film"}
        page.fill("#sample-search", "")
        page.select_option("#sample-against", "")
        page.select_option("#sample-of", "")
        assert page.locator("#samples-view .two").count() == 0
        assert re.match(r"(\d+) of \1 samples", status.inner_text())


def test_the_keyboard_moves_through_the_samples_and_opens_one(browser, plain):
    with opened(browser, plain) as page:
        page.locator("#samples-view .list").focus()
        page.keyboard.press("ArrowDown")
        current = page.locator("#samples-view article[aria-current=true]")
        assert current.get_attribute("aria-posinset") == "2"
        assert page.inner_text("[aria-live]").startswith("film 1")
        page.keyboard.press("Enter")
        dialog = page.locator("dialog[open]")
        assert "prompt 1" in dialog.inner_text()
        page.get_by_role("button", name="Next").click()
        assert "prompt 2" in dialog.inner_text()
        page.keyboard.press("Escape")
        assert page.locator("dialog[open]").count() == 0
        page.locator("#samples-view .list").focus()
        page.keyboard.press("End")
        assert current.get_attribute("aria-posinset") == str(workdirs.PROMPTS)


def opened_sample(page):
    """The dialog of the last sample that has values of tokens."""
    page.locator("#sample-tokens").check()
    page.locator("#samples-view .list").focus()
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    return page.locator("dialog[open]")


def contrast(one, other):
    """Contrast of two colours by WCAG 2.2."""

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_tokens_are_coloured_by_a_quantity_on_a_scale_that_is_read_in_both_schemes(browser, plain, width, scheme):
    with opened(browser, plain, width=width, scheme=scheme) as page:
        dialog = opened_sample(page)
        tokens = dialog.locator(".tokens [role=option]")
        assert page.inner_text("#samples-view [role=status]").startswith("3 of ")
        assert tokens.all_inner_texts() == [" it", " <b>is</b>⏎\n", "<eos>"]
        strengths = "tokens => tokens.map(t => [t.className, Number(t.style.getPropertyValue('--share'))])"
        assert tokens.evaluate_all(strengths) == [["above", 1], ["below", 0.5], ["above", 0.8]]
        assert dialog.locator(".scale span").all_inner_texts() == ["−0.5", "+0.5"]
        page.select_option("#token-quantity", "advantage")
        assert tokens.evaluate_all(strengths) == [["above", 0.5], ["below", 1], ["zero", 0]]
        assert dialog.locator(".scale span").all_inner_texts() == ["−1.5", "+1.5"]
        assert page.evaluate("document.activeElement.id") == "token-quantity"
        lines = tokens.evaluate_all("tokens => tokens.map(t => getComputedStyle(t).textDecorationStyle)")
        assert lines[:2] == ["solid", "dotted"], "the sign is not shown by colour alone"
        for quantity, place in (("advantage", 1), ("kl", 0)):
            page.select_option("#token-quantity", quantity)
            ink, ground = tokens.nth(place).evaluate(PAINTED)
            assert contrast(ink, ground) > 4.5, (quantity, ink, ground)
        assert dialog.evaluate("d => d.scrollWidth") <= dialog.evaluate("d => d.clientWidth") <= width
        page.select_option("#token-quantity", "")
        assert tokens.count() == 0 and dialog.locator(".text").inner_text() == " it is"


def test_values_of_tokens_are_read_by_keyboard_pointer_and_table(browser, plain):
    with opened(browser, plain) as page:
        dialog = opened_sample(page)
        tokens, reading = dialog.locator(".tokens [role=option]"), dialog.locator(".reading")
        tokens.first.focus()
        page.keyboard.press("ArrowRight")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "<b>is</b>: KL −0.25"
        assert dialog.locator("[aria-selected=true]").count() == 1
        assert (
            reading.inner_text() == "“<b>is</b>”, token 2 of 3: KL −0.25 · reward +0.025 · value +0.4 · advantage −1.5"
        )
        page.keyboard.press("End")
        assert "“<eos>”, token 3 of 3: KL +0.4 ·" in reading.inner_text()
        tokens.first.hover()
        assert reading.inner_text().startswith("“it”, token 1 of 3: KL +0.5")
        dialog.locator("summary").click()
        assert dialog.locator("table tbody tr").all_inner_texts()[0].split() == ["it", "0.5", "−0.05", "0.2", "0.75"]
        page.keyboard.press("Escape")
        page.locator("#sample-tokens").uncheck()
        page.fill("#sample-search", "fine film (sft 0)")
        page.locator("#samples-view article").first.click()
        assert dialog.locator("#token-quantity").count() == 0, "an evaluation records no values of tokens"


def test_every_control_has_a_name(browser, plain):
    with opened(browser, plain) as page:
        nameless = page.evaluate(
            "[...document.querySelectorAll('input, select, button, [role=img]')].filter(c => "
            "!c.labels?.length && !c.getAttribute('aria-label') && !c.textContent).map(c => c.outerHTML)"
        )
        assert nameless == []


def written(root, number):
    """A report with so many samples of PPO."""
    workdirs.write_all(root)
    answer = "word " * 60
    rows = [
        {
            **workdirs.sample_row(i, 0, f"{answer}{i}", score=float(i * 7919 % number), kl=0.5),
            "prompt": f"prompt {i} " * 4,
        }
        for i in range(number)
    ]
    write_rows(root / "ppo" / "samples.jsonl", rows)
    write_page([Run(root)], root / report.REPORT)
    return root / report.REPORT


@pytest.mark.nightly
def test_fifty_thousand_samples_stay_usable(browser, tmp_path, capsys):
    many = written(tmp_path, MANY)
    assert many.stat().st_size < 5e6
    beside = many.with_suffix(".samples.js")
    with opened(browser, many) as page:
        times = {}

        def timed(name, act, until):
            start = time.perf_counter()
            act()
            page.wait_for_function(until)
            times[name] = time.perf_counter() - start

        status = "document.querySelector('#samples-view [role=status]').textContent"
        timed("load", lambda: page.focus("#sample-search"), f"/ of 5\\d,\\d\\d\\d samples\\./.test({status})")
        ppo = page.locator("#sample-of option", has_text="ppo, training samples").get_attribute("value")
        page.select_option("#sample-against", "")
        timed("choose", lambda: page.select_option("#sample-of", ppo), f"{status}.startsWith('50,000 of')")
        timed(
            "sort", lambda: page.select_option("#sample-sort", "score"), "explorer.rows.score[explorer.shown[0]] === 0"
        )
        timed("search", lambda: page.fill("#sample-search", "word 49999"), f"{status}.startsWith('1 of')")
        page.fill("#sample-search", "")
        end = "() => { const list = document.querySelector('.list'); list.scrollTop = list.scrollHeight; }"
        last = "document.querySelector('#samples-view article:last-child').getAttribute('aria-posinset') === '50000'"
        timed("scroll to the end", lambda: page.evaluate(end), last)
        assert numbers(page, "reward")[-1] == MANY - 1
        assert cards(page).count() < 40, "only the samples in view are elements"
    with capsys.disabled():
        listed = ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in times.items())
        print(f"\n{MANY:,} samples, {beside.stat().st_size / 1e6:.0f} MB beside the page: {listed}")


@pytest.mark.nightly
def test_the_other_samples_are_loaded_from_beside_the_page_or_named_as_missing(browser, tmp_path):
    file = written(tmp_path, 7000)
    status = "document.querySelector('#samples-view [role=status]').textContent"
    with opened(browser, file) as page:
        assert "are loaded when this is used" in page.evaluate(status)
        page.focus("#sample-search")
        page.wait_for_function(f"/of 7,0\\d\\d samples\\.$/.test({status})")
        page.select_option("#sample-against", "")
        page.select_option("#sample-of", "")
        page.fill("#sample-search", "word 6999")
        assert page.evaluate(status).startswith("1 of")
    file.with_suffix(".samples.js").unlink()
    with opened(browser, file, expected="ERR_FILE_NOT_FOUND") as page:
        page.focus("#sample-search")
        page.wait_for_function(f"{status}.includes('report.samples.js is not beside this file')")
