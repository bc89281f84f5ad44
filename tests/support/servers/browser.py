"""Chromium without a screen, driven by playwright; the system's, or the one that playwright brought."""

import os
import shutil
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


def require_browser():
    """The path of a Chromium; skips the test where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        with api.sync_playwright() as playwright:
            path = playwright.chromium.executable_path
    if not os.path.exists(path):
        pytest.skip("no Chromium: apt-get install chromium, or playwright install chromium")
    return path


@contextmanager
def browser(path):
    """A running browser. Meanwhile playwright has an event loop in this thread: asyncio.run() cannot be called."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # the sandbox refuses to run as root
        running = playwright.chromium.launch(executable_path=path, args=arguments)
        try:
            yield running
        finally:
            running.close()
