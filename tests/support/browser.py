"""Chromium, as the distribution packages it: a test does not depend on what a driver downloads."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, sync_playwright

Open = Callable[..., Page]
"""open_page(url, **options of a browser's context) -> the page, in a browser of its own"""

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Chromium without a window; there must be one."""
    with sync_playwright() as playwright:
        # Its sandbox does not work for root, who runs continuous integration.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
