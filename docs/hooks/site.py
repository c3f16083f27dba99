"""Hooks of MkDocs: add the generated pages and the linked sources, and expand included blocks."""

import functools
import posixpath
import re
import subprocess
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

import rlhf_jax
from docs.hooks import links, reference

INCLUDE = re.compile(r"<!-- include: (\S+) (\w+) -->")
NOTEBOOKS, LIST = "tutorials/notebooks", "<!-- notebooks -->"
"""Directory of the notebooks' pages, and the mark in the text that their list replaces."""


def on_config(config: Any) -> Any:
    """Say in the footer which version and commit the site shows."""
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=links.ROOT, capture_output=True, text=True)
    config.copyright = f"rlhf_jax {rlhf_jax.__version__}, commit {commit.stdout.strip() or 'unknown'}"
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the repository's root, the generated pages, and every file that a page links to."""
    for target, page in links.ROOT_PAGES.items():
        files.append(File.generated(config, page, content=links.source_of(target)))
    for page, text in reference.pages().items():
        files.append(File.generated(config, page, content=text))
    for name, (text, pictures) in notebooks().items():
        files.append(File.generated(config, f"{NOTEBOOKS}/{name}.md", content=text))
        for picture, content in pictures.items():
            files.append(File.generated(config, f"{NOTEBOOKS}/{picture}", content=content))
    needed = set()
    for file in files.documentation_pages():
        needed |= links.targets(expanded(file.content_string, file.src_uri), place_of(file.src_uri))
    for target in sorted(needed):
        copy = links.copy_of(target)
        if target.endswith(".py"):
            files.append(File.generated(config, copy, content=links.source_page(target)))
        else:
            files.append(File.generated(config, copy, abs_src_path=str(links.ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Expand included blocks, and rewrite links to files of the repository."""
    place = page.file.src_uri
    if place.startswith("source/"):
        return markdown
    if LIST in markdown:
        return markdown.replace(LIST, listed())
    pages = {file.src_uri for file in files}
    return links.rewritten(expanded(markdown, place), place_of(place), place, pages)


@functools.cache
def notebooks() -> dict[str, tuple[str, dict[str, bytes]]]:
    """Text and pictures of every notebook, with its stored outputs."""
    found = {}
    for file in sorted((links.ROOT / "notebooks").glob("*.ipynb")):
        text, resources = MarkdownExporter().from_filename(str(file), {"unique_key": file.stem})
        pictures = {f"{file.stem}_{name}": content for name, content in resources["outputs"].items()}
        for name in resources["outputs"]:
            text = text.replace(f"]({name})", f"]({file.stem}_{name})")
        found[file.stem] = text, pictures
    return found


def listed() -> str:
    """List of the notebooks: title, and question."""
    lines = []
    for name, (text, _) in notebooks().items():
        title, _, rest = text.strip().partition("\n")
        question = rest.partition("**Question.** ")[2].partition("\n\n")[0]
        lines.append(f"- [{title.lstrip('# ')}](notebooks/{name}.md): {' '.join(question.split())}")
    return "\n".join(lines)


def place_of(page: str) -> str:
    """Path in the repository of a page's text."""
    if page.startswith(f"{NOTEBOOKS}/"):
        return page.removeprefix("tutorials/").replace(".md", ".ipynb")
    roots = {copy: target for target, copy in links.ROOT_PAGES.items()}
    return roots.get(page, f"docs/{page}")


def expanded(markdown: str, page: str) -> str:
    """Replace `<!-- include: FILE BLOCK -->` by the text between `<!-- BLOCK: begin -->` and its end in a file."""

    def block(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place_of(page)), match[1]))
        text = links.source_of(target)
        found = text.partition(f"<!-- {match[2]}: begin -->\n")[2].partition(f"<!-- {match[2]}: end -->")[0]
        if not found:
            raise ValueError(f"{page}: {target} has no block {match[2]}")
        return links.moved(found, target, place_of(page))

    return INCLUDE.sub(block, markdown)
