"""What the tests that look at a report in a browser share."""

import os
import shutil

import pytest

needs_chromium = pytest.mark.skipif(
    not os.environ.get("CI") and not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="chromium and chromedriver are not installed (apt-get install chromium chromium-driver); CI runs this test",
)


def overflow(driver):
    """Pixels by which the page is wider than the window."""
    return driver.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
