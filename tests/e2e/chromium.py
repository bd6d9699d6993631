"""Headless Chromium for tests: pages are opened, and what they ask for and complain about is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
INSTALL = "apt-get update && apt-get install --no-install-recommends chromium chromium-driver"


class Browser:
    """One window.

    Args:
        driver: Selenium's, with the console's and the network's log.
    """

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def look(self, width: int, height: int = 900, dark: bool = False) -> None:
        """The size of the window, as a phone or a screen has it, and the preferred colours."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def open(self, url: str) -> None:
        """A page, as in a fresh tab; what the console and the network said before is forgotten."""
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get_log("performance")
        self.driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        """JavaScript's answer."""
        return self.driver.execute_script(script, *arguments)

    @property
    def text(self) -> str:
        """What a reader sees."""
        return str(self.run("return document.body.innerText"))

    def wait_for(self, *texts: str, seconds: float = 60) -> None:
        """Wait until the page shows all the texts."""

        def there(_: Any) -> bool:
            return all(text in self.text for text in texts)

        shown = WebDriverWait(self.driver, seconds, poll_frequency=0.2)
        shown.until(there, f"{texts} not on {self.driver.current_url}")

    def console(self) -> list[str]:
        """Warnings and errors since the page was opened."""
        return [f"{entry['level']} {entry['message']}" for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that the page has asked for since it was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def print_pdf(self) -> bytes:
        """The page as it is printed, a PDF file in base64."""
        return str(self.driver.execute_cdp_cmd("Page.printToPDF", {})["data"]).encode()


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """A browser with a fresh profile; fails, rather than being skipped, where Chromium isn't installed."""
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        pytest.fail(f"{' and '.join(missing)} not found: these tests open pages in Chromium; install it: {INSTALL}")
    options = webdriver.ChromeOptions()
    options.binary_location = str(programs["chromium"])
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(programs["chromedriver"])))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
