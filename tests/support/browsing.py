"""A headless Chromium for tests of the report, and the pages that it opens."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Start the browser of this machine; skip the test if it has none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(
    browser: Any, file: Path, *, width: int = 1280, scheme: str = "light", expected: str | None = None
) -> Iterator[Any]:
    """Open a file and fail if the page then logs an error, asks something or reads anything but files beside it.

    Args: expected is a part of the one kind of message that the page may log.
    """
    screen = {"width": width, "height": 800}
    context = browser.new_context(viewport=screen, color_scheme=scheme, reduced_motion="reduce")
    page = context.new_page()
    found: list[str] = []
    page.on("console", lambda message: found.append(message.text))
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("dialog", lambda dialog: found.append(dialog.message))
    page.on("request", lambda request: None if request.url.startswith("file:") else found.append(request.url))
    page.goto(file.resolve().as_uri())
    yield page
    context.close()
    assert [text for text in found if expected is None or expected not in text] == []
