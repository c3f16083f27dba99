"""Documents name only what exists: files, modules, make targets, rooms of the map, and the code in the recipes."""

import importlib
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
TOP = "rlhf_jax|tests|experiments|notebooks|docs|examples|\\.ci|\\.github"


def quoted(text: str) -> str:
    """The inline code of a document, a piece a line."""
    without_blocks = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(re.findall(r"`([^`]+)`", without_blocks))


def test_documents_are_found():
    assert {"README.md", "CONTRIBUTING.md", "docs/README.md", "docs/architecture.md", "docs/style.md"} <= TEXTS.keys()


def generated(link: str) -> bool:
    """True for a page that only the site has, made from the code; tests/test_site.py makes them."""
    return bool(re.search(r"(^|/)reference/(stages/\w+|commands)\.md$", link) or re.fullmatch(r"stages/\w+\.md", link))


def test_the_address_of_the_repository_is_set_in_one_place(tmp_path):
    places = ["Makefile", "pyproject.toml", "README.md", "CONTRIBUTING.md"]
    places += [path.relative_to(ROOT).as_posix() for path in (ROOT / "notebooks").glob("0*")]
    (tmp_path / "notebooks").mkdir()
    for place in places:
        shutil.copy(ROOT / place, tmp_path / place)
    for address in ("https://github.com/first/name", "https://github.com/second/other"):
        subprocess.run(["make", "address", f"URL={address}"], cwd=tmp_path, check=True)
    texts = {place: (tmp_path / place).read_text(encoding="utf-8") for place in places}
    for place, text in texts.items():
        assert "first/name" not in text, place
    assert tomllib.loads(texts["pyproject.toml"])["project"]["urls"]["Repository"] == address
    assert f"pip install git+{address} " in texts["README.md"] and "git+URL" not in texts["README.md"]
    assert f"git clone {address} " in texts["CONTRIBUTING.md"]
    for place in places[4:]:
        assert "colab.research.google.com/github/second/other/blob/main/notebooks/" in texts[place]
        assert f"git+{address}" in texts[place]


@pytest.mark.parametrize("document", TEXTS)
def test_files_and_links_exist(document):
    links = {link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", TEXTS[document]) if "://" not in link}
    paths = set(re.findall(rf"(?<![\w/.])((?:{TOP})/[\w./-]*\w)", quoted(TEXTS[document])))
    missing = [link for link in links if not (ROOT / document).parent.joinpath(link).exists() and not generated(link)]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("document", TEXTS)
def test_names_of_the_package_exist(document):
    for name in re.findall(r"\brlhf_jax(?:\.\w+)+", quoted(TEXTS[document])):
        parts = name.split(".")
        if parts[1] == "experiments" or name.endswith((".py", ".md")):
            continue
        module = next(end for end in range(len(parts), 0, -1) if _imports(".".join(parts[:end])))
        found = importlib.import_module(".".join(parts[:module]))
        for part in parts[module:]:
            assert hasattr(found, part), name
            found = getattr(found, part)


def _imports(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent that is no package
        return False


@pytest.mark.parametrize("document", TEXTS)
def test_targets_of_make_exist(document):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z]+)", quoted(TEXTS[document]), re.MULTILINE)) <= targets


def test_the_map_is_the_tree_on_disk():
    (tree,) = re.findall(r"^```\nrlhf_jax/\n((?:  .*\n)+)", TEXTS["docs/architecture.md"], re.MULTILINE)
    named = [name for line in tree.splitlines() for name in re.findall(r"(\w+)/ ", line)]
    rooms = {path.parent.name for path in (ROOT / "rlhf_jax").glob("*/__init__.py")}
    assert sorted(named) == sorted(rooms)


def test_the_order_of_imports_is_the_one_that_is_checked():
    (block,) = re.findall(r"^```\n(completion > .*?)^```$", TEXTS["docs/architecture.md"], re.MULTILINE | re.DOTALL)
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    assert " ".join(block.split()) == " > ".join(layer.strip("()") for layer in layers)


def recipes() -> list[tuple[str, str]]:
    """The file and the lines of each hunk of the diffs in CONTRIBUTING.md."""
    blocks = re.findall(r"^```diff\n(.*?)^```$", TEXTS["CONTRIBUTING.md"], re.MULTILINE | re.DOTALL)
    files = [part for block in blocks for part in re.split(r"^\+\+\+ b/", block, flags=re.MULTILINE)[1:]]
    return [
        (name, hunk)
        for name, _, hunks in (file.partition("\n") for file in files)
        for hunk in re.split(r"^@@.*\n", hunks, flags=re.MULTILINE)[1:]
    ]


@pytest.mark.parametrize(("name", "hunk"), recipes())
def test_the_recipes_are_the_code(name, hunk):
    """Each hunk, applied, stands in its file as it is now."""
    lines = [line for line in hunk.splitlines() if not line.startswith(("-", "--- "))]
    assert any(line.startswith("+") for line in lines)
    assert "\n".join(line[1:] for line in lines).strip("\n") in (ROOT / name).read_text(encoding="utf-8")
