"""Drives the live page in headless Chromium, of the fake server or of a real ``vllm serve``."""

from __future__ import annotations

import base64
import importlib.util
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

FLAGS = (
    "--headless=new",
    "--hide-scrollbars",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 20.0  # seconds until a thing that never comes is a failure

Answer = TypeVar("Answer")


def missing() -> str:
    """Why no browser can be driven here; empty when one can."""
    if importlib.util.find_spec("selenium") is None:
        return "selenium is not installed (requirements/dev.txt)"
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian: apt install chromium chromium-driver)"
    return ""


class Page:
    """The live page in a browser. Elements go by their ``id``."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.width = 0  # of the window, in CSS pixels

    def look(
        self,
        width: int = 1280,
        height: int = 900,
        theme: str = "light",
        motion: str = "no-preference",
    ) -> None:
        """Set the viewport in CSS pixels, and what the system prefers: colour scheme and motion."""
        self.width = width
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        wishes = {"prefers-color-scheme": theme, "prefers-reduced-motion": motion}
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self, url: str) -> None:
        """Load the page; what an earlier page logged is forgotten."""
        self.driver.get("about:blank")
        self.driver.get_log("browser")
        self.driver.get(url)

    def find(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def text(self, name: str) -> str:
        """Visible text; empty for a hidden element."""
        return str(self.find(name).text)

    def number(self, name: str) -> int:
        """The first number in an element's text, such as 1,234; -1 without one."""
        found = re.search(r"\d[\d,]*", self.text(name))
        return int(found[0].replace(",", "")) if found else -1

    def script(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def wait(self, what: str, ready: Callable[[], Answer]) -> Answer:
        """The first true answer of ``ready``; a failure that names ``what`` when none comes."""
        from selenium.common.exceptions import TimeoutException
        from selenium.webdriver.support.ui import WebDriverWait

        try:
            return WebDriverWait(self.driver, PATIENCE, 0.05).until(lambda _: ready())
        except TimeoutException:
            body = self.driver.find_element("tag name", "body").text
            raise AssertionError(f"never came: {what}; the page says:\n{body}") from None

    def press(self, *keys: str) -> None:
        """Keys for whatever has the focus, as from a keyboard; names such as TAB or plain text."""
        from selenium.webdriver import ActionChains, Keys

        for key in keys:
            ActionChains(self.driver).send_keys(getattr(Keys, key, key)).perform()

    def point_at(self, name: str, x: float, y: float) -> None:
        """Move the mouse to a place in an element, in CSS pixels from its upper left corner."""
        from selenium.webdriver import ActionChains

        box = self.find(name)
        self.script("arguments[0].scrollIntoView({block: 'center'})", box)
        size = box.size
        offset = round(x - size["width"] / 2), round(y - size["height"] / 2)
        ActionChains(self.driver).move_to_element_with_offset(box, *offset).perform()

    def focused(self) -> str:
        """id of the element with the focus; its value or text where it has no id."""
        code = "const at = document.activeElement; return at.id || at.value || at.textContent"
        return str(self.script(code)).strip()

    def tab_to(self, name: str) -> list[str]:
        """Press Tab until an element has the focus; returns every stop on the way."""
        stops: list[str] = []
        while self.focused() != name:
            self.press("TAB")
            stops.append(self.focused())
            assert len(stops) < 50, f"Tab never reaches {name}: {stops}"
        return stops

    def recording(self) -> bool:
        return self.text("state").startswith("Recording")

    def start(self, mode: str = "per_pass") -> None:
        """Choose a mode, press Start with the keyboard, wait until the server records."""
        self.wait("the Start button", lambda: self.find("start").is_enabled())
        self.tab_to("mode")
        self.press(mode)
        self.tab_to("start")
        self.press("ENTER")
        self.wait("recording", self.recording)

    def stop(self) -> None:
        """Press Stop with the keyboard, wait until the server has stopped."""
        self.tab_to("stop")
        self.press("ENTER")
        self.wait("the end of the recording", lambda: self.text("state") == "Not recording")

    def overflow(self) -> int:
        """CSS pixels that the page is wider than its window."""
        # Not innerWidth: a phone zooms out until the page fits, and that grows with it.
        return int(self.script("return document.documentElement.scrollWidth")) - self.width

    def complaints(self) -> list[str]:
        """Errors and warnings in the browser's console since the page was opened."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING")
        ]

    def screenshot(self, path: Path) -> None:
        """The whole page, however long, as PNG."""
        options = {"captureBeyondViewport": True, "format": "png"}
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        options["clip"] = {**size, "scale": 1}
        image = self.driver.execute_cdp_cmd("Page.captureScreenshot", options)
        path.write_bytes(base64.b64decode(image["data"]))


@contextmanager
def chromium() -> Iterator[Page]:
    """A headless Chromium with a profile of its own, ended with the ``with`` block."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory(prefix="page-test-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        driver = webdriver.Chrome(options=options, service=service)
        try:
            page = Page(driver)
            page.look()
            yield page
        finally:
            driver.quit()
