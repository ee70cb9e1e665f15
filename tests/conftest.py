"""What several folders of tests use."""

import os
import shutil

import pytest


@pytest.fixture(scope="session")
def browser():
    """A Chromium that runs, or the reason why there is none."""
    found = os.environ.get("NETWRIGHT_BROWSER") or shutil.which("chromium") or shutil.which(
        "chromium-browser") or shutil.which("google-chrome")
    if not found:
        why = "no Chromium was found on the path; install one or set NETWRIGHT_BROWSER to it"
        if os.environ.get("NETWRIGHT_REQUIRE_BROWSER"):
            pytest.fail(why)
        pytest.skip(why)
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()
