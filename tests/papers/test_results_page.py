"""docs/results.md is the page that the results of the papers give."""

import runpy
from pathlib import Path

import pandas as pd

from rlhf_jax.papers.reproduce import overview

ROOT = Path(__file__).parents[2]
WRITER = runpy.run_path(str(ROOT / "experiments" / "papers" / "write_results.py"))


def test_the_page_is_that_of_the_results():
    found = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert found == WRITER["page"](overview()), "run experiments/papers/write_results.py"


def test_a_verdict_stands_in_its_papers_section_and_in_the_count_of_its_question():
    row = {
        "paper": "schulman_2020",
        "title": "Approximating KL divergence",
        "source": "a note",
        "question": "foundations",
        "figure": "a figure",
        "claim": "bias of k1",
        "statement": "k1 is unbiased | always",
        "number": "0",
        "criterion": "< 0.1",
        "unit": "nats",
        "statistic": 0.012345,
        "low": None,
        "high": None,
        "p": None,
        "smallest_effect": None,
        "verdict": "contradicted",
        "scale": "cpu",
        "seconds": 1234.5,
        "date": "2026-11-30T01:02:03",
        "commit": "0123456789abcdef",
    }
    page = WRITER["page"]([row])
    assert "| Foundations | 1 | 0 | 1 | 0 | 0 |" in page
    assert "| bias of k1 | k1 is unbiased \\| always; 0 | < 0.1 nats | 0.0123 |  | exact | contradicted |" in page
    assert "The runs took 0.3 hours of one core." in page
    assert "1,234 s, 2026-11-30, commit 0123456789ab." in page
    sampled = row | {"low": -0.1, "high": 0.2, "p": 0.04123, "smallest_effect": 0.3, "number": "-"}
    page = WRITER["page"]([sampled])
    assert "| k1 is unbiased \\| always | < 0.1 nats | 0.0123 [-0.1, 0.2] | 0.041 | 0.3 | contradicted |" in page


def test_a_table_of_details_is_markdown():
    found = WRITER["table_of"](pd.DataFrame({"topic": ["a: b", "mean"], "pairs": [3, 30]}))
    assert found == ["| topic | pairs |", "| --- | ---: |", "| a: b | 3 |", "| mean | 30 |"]
