"""The documentation site: what is generated from the code, and that the pages written by hand leave nothing out."""

import ast
import dataclasses
import importlib
import re
import typing
from pathlib import Path

import pytest

import rlhf_jax
from docs.hooks import links, reference
from rlhf_jax.cli.fields import descriptions, sections_of
from rlhf_jax.main import VERBS
from rlhf_jax.stages.kinds import KINDS
from tests.support.own_data import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
NAV = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
GENERATED = {"reference/stages/README.md", *(f"reference/stages/{name}.md" for name in KINDS), "reference/commands.md"}


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation_once():
    listed = re.findall(r"[\w/.-]+\.md", NAV)
    assert len(set(listed)) == len(listed)
    assert set(listed) == {*PAGES, *GENERATED, *links.ROOT_PAGES.values()}


@pytest.mark.parametrize("page", [*PAGES, "../CONTRIBUTING.md", "../README.md"])
def test_links_to_source_name_what_is_there(page):
    """`#name` and `#name:text` stand in the Python file that a link leads to."""
    found = [(path, fragment) for _, path, fragment in links.LINK.findall(links.FENCE.sub("", read(page))) if fragment]
    for path, fragment in found:
        file = (DOCS / page).parent / path
        if path.endswith(".py"):
            links.line_of(file.read_text(encoding="utf-8"), fragment, path)


def test_the_line_of_a_name_is_found():
    source = (
        "X = 1\n\nclass A:\n    def f(self):\n        return 1 + 1\n\n    y: int = 2\n\ndef g():\n    return 1 + 1\n"
    )
    assert [links.line_of(source, name) for name in ("X", "A", "A.f", "A.y", "g", "g:1 + 1", ":1 + 1")] == [
        1, 3, 4, 7, 9, 10, 5,
    ]  # fmt: skip
    for wrong in ("h", "A.g", "g:2"):
        with pytest.raises(ValueError, match="the file has no"):
            links.line_of(source, wrong)


def test_links_to_the_repository_lead_to_copies_in_the_site():
    text = (
        "See [`k3`](../../rlhf_jax/core/kl.py#k3), [x](ppo.md#details), [c](../../CONTRIBUTING.md), ![f](../../a.png)."
    )
    pages = {"explanation/ppo.md", "contributing.md"}
    with pytest.raises(ValueError, match="does not exist"):
        links.rewritten(text, "docs/explanation/dpo.md", "explanation/dpo.md", pages)
    text = text.replace("a.png", "LICENSE")
    found = links.rewritten(text, "docs/explanation/dpo.md", "explanation/dpo.md", pages)
    line = links.line_of((ROOT / "rlhf_jax/core/kl.py").read_text(), "k3")
    assert f"[`k3`](../source/rlhf_jax/core/kl.py.md#__codelineno-0-{line})" in found
    assert "[x](ppo.md#details), [c](../contributing.md), ![f](../files/LICENSE)" in found


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_of_a_stage_has_all_of_its_fields(kind):
    page = reference.stage_page(kind)

    def check(section: type, seen: set[type]) -> None:
        texts = descriptions(section)
        hints = typing.get_type_hints(section, include_extras=True)
        for field in dataclasses.fields(section):
            if field.name == "kind":
                continue
            start = texts[field.name][1:30].split("*")[0].split("<")[0].split("_")[0].split("[")[0].split("|")[0]
            assert re.search(rf"^\| `{field.name}` \| .*{re.escape(start)}", page, re.MULTILINE), field.name
            for inner in sections_of(hints[field.name]):
                if inner not in seen:
                    check(inner, seen | {inner})

    check(KINDS[kind].config, set())
    anchors = set(re.findall(r"\{ #([\w-]+) \}", page))
    assert set(re.findall(r"\]\(#([\w-]+)\)", page)) == anchors
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert {re.sub(r"`[^`]*`", "", row).count("|") for row in rows} == {5}
    assert not re.search(r"`[^`\n]*\\[^`\n]*`", "\n".join(row.split("|")[2] for row in rows)), "code has no escapes"


def test_stages_with_an_explanation_link_to_it():
    assert set(reference.EXPLAINED.values()) <= {path.name for path in (DOCS / "explanation").glob("*.md")}
    for name, page in reference.EXPLAINED.items():
        assert f"../reference/stages/{name}.md" in read(f"explanation/{page}"), name


def test_the_page_of_commands_has_their_help():
    page = reference.commands_page()
    assert all(f"## `{verb}`" in page for verb in VERBS)
    assert page.count("usage: rlhf-jax") == len(VERBS)


def test_every_public_name_has_an_entry():
    entries = set(re.findall(r"^::: (\S+)$", read("reference/api.md") + read("reference/core.md"), re.MULTILINE))
    for home, names in rlhf_jax.HOMES.items():
        for name in names:
            assert f"{home}.{name}" in entries, f"{home}.{name}"
    for entry in entries:
        home, _, name = entry.rpartition(".")
        assert hasattr(importlib.import_module(home), name) or importlib.import_module(entry)


def test_every_public_function_of_core_with_an_equation_is_shown():
    """The modules of losses, advantages and divergences are all in the reference."""
    shown = set(re.findall(r"^::: rlhf_jax\.core\.(\w+)$", read("reference/core.md"), re.MULTILINE))
    with_papers = {
        file.stem
        for file in (ROOT / "rlhf_jax/core").glob("*.py")
        if "arXiv:" in file.read_text() and file.stem != "keys"
    }
    assert with_papers - shown <= {"ensembles", "logprobs", "masking", "ratios", "interpolation", "packing"}


def test_every_variable_of_the_environment_is_listed():
    sources = "\n".join(file.read_text() for file in (ROOT / "rlhf_jax").rglob("*.py"))
    named = set(re.findall(r"\"(RLHF_JAX_[A-Z_]+)\"", sources))
    assert named and named == set(re.findall(r"`(RLHF_JAX_[A-Z_]+)`", read("reference/environment.md")))


def documented_metrics() -> set[str]:
    rows = [line.split("|")[1] for line in read("reference/metrics.md").splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_every_metric_is_described():
    """Metrics are the keys with a slash in the code that computes them; `eval/` is added to some of them."""
    named = set()
    for room in ("core", "methods", "stages", "runtime"):
        for file in (ROOT / "rlhf_jax" / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    named |= {node.value} if re.fullmatch(r"[a-z_]+(/[a-z_]+)+", node.value) else set()
    files = {name for name in named if (ROOT / name).exists() or name.startswith(("policy/block", "attention/"))}
    metrics = {name for name in named - files if name.partition("/")[0] in PREFIXES}
    missing = metrics - documented_metrics() - {"time/seconds", "time/judge_asked"}
    assert len(metrics) > 30 and not missing, "describe them in docs/reference/metrics.md"


PREFIXES = {
    "completions",
    "dynamic_sampling",
    "eval",
    "grad_norm",
    "learning_rate",
    "logps",
    "loss",
    "objective",
    "policy",
    "rewards",
    "sampling",
    "time",
    "val",
}


def test_described_metrics_exist():
    sources = "\n".join(
        file.read_text() for room in ("core", "methods", "stages", "runtime", "reports", "inference", "rewards")
        for file in (ROOT / "rlhf_jax" / room).rglob("*.py")
    )  # fmt: skip
    for name in documented_metrics():
        last = name.removeprefix("eval/").rpartition("/")[2]
        assert re.search(rf"[\"/{{,]{re.escape(last)}\b", sources) or "NAME" in name, name


TRL_TABLES = re.findall(r"^## (.*)\n((?:\n|\|.*\n)+)", read("how-to/from-trl.md"), re.MULTILINE)
FIELDS_OF = {
    "Arguments of all trainers": ("sft", "reward_model", "dpo", "ppo"),
    "SFTConfig": ("sft",),
    "RewardConfig": ("reward_model",),
    "DPOConfig": ("dpo",),
    "KTOConfig": ("kto",),
    "GRPOConfig and RLOOConfig": ("group_rl",),
    "PPOConfig (until TRL 1.12)": ("ppo",),
}


@pytest.mark.parametrize("heading", FIELDS_OF)
def test_our_names_in_the_table_for_users_of_trl_are_fields(heading):
    table = dict(TRL_TABLES)[heading]
    pages = "\n".join(reference.stage_page(kind) for kind in FIELDS_OF[heading]) + reference.overview()
    for row in table.strip().splitlines()[2:]:
        for name in re.findall(r"`([a-z_.]+)(?: = [^`]*)?`", row.split("|")[2]):
            assert f"| `{name.rpartition('.')[2]}` |" in pages or name in ADVANTAGES, name


ADVANTAGES = {"grpo", "grpo_batch_std", "dr_grpo"}


def test_included_blocks_exist():
    for page in PAGES:
        for target, name in re.findall(r"<!-- include: (\S+) (\w+) -->", read(page)):
            text = Path(DOCS / page).parent.joinpath(target).read_text()
            assert f"<!-- {name}: begin -->\n" in text and f"<!-- {name}: end -->" in text
