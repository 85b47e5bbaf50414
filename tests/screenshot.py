"""Opens an HTML file in headless Chromium and saves a picture: python tests/screenshot.py report.html picture.png."""

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.support.wait import WebDriverWait

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


def program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name} is not installed: apt-get install chromium chromium-driver")
    return path


@contextlib.contextmanager
def browser(width: int, height: int, dark: bool = False) -> Iterator[webdriver.Chrome]:
    """Chromium with a viewport of width x height CSS pixels, and the browser log switched on."""
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = program("chromium")
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options, webdriver.ChromeService(program("chromedriver")))
        try:
            set_viewport(driver, width, height)
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
            yield driver
        finally:
            driver.quit()


def set_viewport(driver: webdriver.Chrome, width: int, height: int) -> None:
    """Narrower than a desktop window can be, as on a phone."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def open_report(driver: webdriver.Chrome, html: Path) -> None:
    """Loads a report and waits until its plots are drawn."""
    driver.get(html.resolve().as_uri())
    WebDriverWait(driver, 60).until(lambda d: d.execute_script("return document.body.dataset.drawn === 'yes'"))


def screenshot(
    html: Path, png: Path, width: int, height: int, dark: bool = False, scale: float = 1.0, at: str | None = None
) -> None:
    """A picture of width x height pixels from the top, or from the heading of this id; height 0 is the whole page."""
    with browser(width, height or 900, dark) as driver:
        open_report(driver, html)
        full = height or driver.execute_script("return document.documentElement.scrollHeight")
        metrics = {"width": width, "height": full, "deviceScaleFactor": scale, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.execute_async_script("setTimeout(arguments[0], 900)")  # plots are drawn again after a resize
        if at is not None:
            place = "document.getElementById(arguments[0]).getBoundingClientRect().top + scrollY - 16"
            driver.execute_script(f"scrollTo(0, {place})", at)
            driver.execute_async_script("setTimeout(arguments[0], 100)")
        driver.save_screenshot(str(png))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("html", type=Path)
    parser.add_argument("png", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900, help="0: the whole page")
    parser.add_argument("--at", help="id of the heading to begin at, as recall or reversal in a comparison's report")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--scale", type=float, default=1.0, help="device pixels in a CSS pixel")
    arguments = parser.parse_args()
    screenshot(**vars(arguments))
