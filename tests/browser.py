"""The headless Chromium that ``scripts/browser`` puts into the clone, and pages in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

FOLDER = Path(__file__).parents[1] / ".cache" / "chromium"
WAIT_MS = 30_000
"""For anything that is to appear; a busy machine is slow, and nothing here is timed."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; the test is skipped where there is none, with what ``scripts/browser`` said."""
    binary = FOLDER / "chromium"
    if not binary.exists():
        why = FOLDER / "why-not"
        reason = why.read_text().strip() if why.exists() else "scripts/browser was not run"
        pytest.skip(f"no {binary.relative_to(FOLDER.parents[1])}: {reason}")
    libraries = f"{FOLDER / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=binary, env={**os.environ, "LD_LIBRARY_PATH": libraries}
        )
        yield browser
        browser.close()


@contextmanager
def watched(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """``url`` in a profile of its own; nothing may fail in it, or be asked for elsewhere.

    What the server refuses is in the console too, and is what some tests are about.
    """
    context = browser.new_context(**options)
    context.set_default_timeout(WAIT_MS)
    faults: list[str] = []
    page = context.new_page()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if _is_fault(message) else None)
    page.on("request", lambda request: faults.append(request.url) if _is_far(request) else None)
    try:
        page.goto(url)
        yield page
        assert faults == []
    finally:
        context.close()


def _is_fault(message: Any) -> bool:
    return message.type in ("error", "warning") and "Failed to load resource" not in message.text


def _is_far(request: Any) -> bool:
    here, there = urlsplit(request.frame.url), urlsplit(request.url)
    return there.scheme in ("http", "https") and here.netloc not in ("", there.netloc)
