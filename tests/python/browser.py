"""A headless Chromium driven over the WebDriver protocol (w3.org/TR/webdriver2)."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
)
KEYS = {"ArrowLeft": "\ue012", "ArrowRight": "\ue014", "Shift": "\ue008", "Tab": "\ue004"}
SECONDS = 60


def available() -> bool:
    """Whether Chromium and its driver are installed."""
    return all(shutil.which(name) for name in ("chromium", "chromedriver"))


class Browser:
    """One page. What the driver refuses is a RuntimeError with its message."""

    def __init__(self, port: int, profile: Path) -> None:
        self._url = f"http://127.0.0.1:{port}"
        options = {"binary": shutil.which("chromium"), "args": [*ARGUMENTS, f"--user-data-dir={profile}"]}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        self._url += "/session/" + self._call("POST", "/session", {"capabilities": wanted})["sessionId"]

    def _call(self, method: str, path: str, data: dict[str, Any] | None = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(
            self._url + path, body, {"Content-Type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from None

    def open(self, page: Path) -> None:
        """Load a file."""
        self._call("POST", "/url", {"url": page.resolve().as_uri()})

    def js(self, code: str, *arguments: Any) -> Any:
        """What a function body in the page returns."""
        return self._call("POST", "/execute/sync", {"script": code, "args": list(arguments)})

    def text(self, selector: str) -> str:
        """What an element shows."""
        return str(self.js("return document.querySelector(arguments[0]).innerText", selector))

    def press(self, *keys: str) -> None:
        """Press keys together, where the focus is."""
        chars = [KEYS.get(key, key) for key in keys]
        actions = [{"type": "keyDown", "value": c} for c in chars]
        actions += [{"type": "keyUp", "value": c} for c in reversed(chars)]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def point(self, selector: str) -> None:
        """Move the pointer over an element."""
        self.js("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        origin = self._call("POST", "/element", {"using": "css selector", "value": selector})
        move = [{"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": origin}]
        self._call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": move}]})

    def click(self, selector: str) -> None:
        """Click on an element."""
        origin = self._call("POST", "/element", {"using": "css selector", "value": selector})
        self._call("POST", f"/element/{next(iter(origin.values()))}/click", {})

    def choose(self, selector: str, text: str) -> None:
        """Take the option with this text."""
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        path = f"/element/{next(iter(found.values()))}/elements"
        for option in self._call("POST", path, {"using": "css selector", "value": "option"}):
            where = f"/element/{next(iter(option.values()))}"
            if self._call("GET", f"{where}/text") == text:
                self._call("POST", f"{where}/click", {})
                return
        raise RuntimeError(f"{selector} has no option {text!r}")

    def scheme(self, name: str) -> None:
        """Prefer light or dark."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        params = {"features": features}
        self._call("POST", "/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": params})

    def log(self) -> list[str]:
        """What the page's console said since the last call."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, file: Path) -> None:
        """What is to be seen, as PNG."""
        file.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def close(self) -> None:
        """End the browser."""
        self._call("DELETE", "")


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with an empty profile in a folder.

    Raises:
        RuntimeError: it does not start.
    """
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert driver.stdout
        start, port = time.monotonic(), None
        for line in driver.stdout:
            # "ChromeDriver was started successfully on port 12345."
            if "started successfully on port" in line:
                port = int(line.rstrip(".\n ").split()[-1])
                break
            if time.monotonic() - start > SECONDS:
                break
        if port is None:
            raise RuntimeError("chromedriver did not start")
        made = Browser(port, folder / "profile")
        try:
            yield made
        finally:
            made.close()
    finally:
        driver.terminate()
        driver.wait(SECONDS)
