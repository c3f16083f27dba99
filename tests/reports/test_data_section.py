"""Section of the report about the data, from what the stages wrote."""

from rlhf_jax.loading.data_report import FILE
from rlhf_jax.reports.data_section import data
from rlhf_jax.reports.run import Run
from rlhf_jax.runtime.files import write_json
from tests.support import workdirs

LENGTHS = {"column": "prompt", "rows": 7, "median": 3, "95 %": 4, "longest": 9, "limit": 8, "cut": 0.25}
REPORT = {
    "splits": {"train": {"lengths": [LENGTHS]}, "test": {"lengths": []}},
    "notes": ["train: columns prompt.", "test: columns prompt."],
    "warnings": [f"data.max_prompt_tokens cuts {workdirs.EVIL}"],
}


def written(root, **reports):
    for name, report in reports.items():
        write_json(workdirs.write_stage(root, name, {"kind": "sft"}) / FILE, report)
    return data(Run(root))


def test_lengths_notes_and_warnings_are_shown_once(tmp_path):
    more = REPORT | {"notes": ["train: columns prompt, completion."]}
    page = written(tmp_path, sft=REPORT, dpo=REPORT, ppo=more)
    assert page.count("<h3>") == 2 and page.count("<table>") == 1
    assert '<th scope="row">train · prompt</th><td>7</td><td>3</td><td>4</td><td>9</td><td>8</td><td>25%</td>' in page
    assert page.count("<li>train, test: columns prompt.</li>") == 1
    assert page.count("<strong>Warning:</strong> data.max_prompt_tokens cuts") == 1
    assert "<script>" not in page and "train: columns prompt, completion." in page


def test_runs_without_a_summary_have_no_section(tmp_path):
    older = {"splits": {"train": [LENGTHS]}, "warnings": []}
    assert written(tmp_path, sft=older) == ""
