"""Headless Chromium for the tests of pages, by its DevTools protocol over two pipes: no package is needed for it."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE_S = 60.0
WITH_PIPES = 'exec "${@:3}" 3<&"$1" 4>&"$2" 2>/dev/null'
"""The browser reads commands from file 3 and answers to file 4."""


def chromium() -> str:
    """The browser's path. Where it is missing the test is skipped, or fails if BEIT3_REQUIRE_BROWSER asks for it."""
    for name in PROGRAMS:
        if path := shutil.which(name):
            return path
    if os.environ.get("BEIT3_REQUIRE_BROWSER"):
        pytest.fail("there is no Chromium, and BEIT3_REQUIRE_BROWSER asks for it")
    pytest.skip("needs Chromium: apt-get install chromium")


class Browser:
    """One tab."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._buffer, self._number, self._session = b"", 0, ""
        self.complaints: list[str] = []
        """Errors on the console, and exceptions that nobody caught."""
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> Any:
        """A command of the protocol, and its result."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._message()
            self._hear(message)
            if message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                return message["result"]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._answers], [], [], PATIENCE_S)[0], "the browser does not answer"
            some = os.read(self._answers, 1 << 20)
            assert some, "the browser has ended"
            self._buffer += some
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _hear(self, message: dict[str, Any]) -> None:
        told = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(told["exceptionDetails"])[:500])
        elif message.get("method") == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(told["entry"]["text"])
        elif message.get("method") == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(told["args"])[:500])

    def look_like(self, width: int, height: int = 900, dark: bool = False) -> None:
        """A window of so many pixels (a phone's below 500), light or dark."""
        phone = width < 500
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str, until: str) -> None:
        """Goes to a page and waits until the expression is true there."""
        self("Page.navigate", url=url)
        self.wait(until)

    def wait(self, until: str) -> None:
        """Returns when an expression is true on the page."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.value(f"Boolean({until})"):
            assert time.monotonic() < deadline, f"{until} never came true: {self.complaints}"
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        """What an expression comes to on the page."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def key(self, name: str) -> None:
        """A key is pressed and let go."""
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=name, code=name)

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        shot = self("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A browser for the context, whose own files lie in `profile`."""
    theirs, commands = os.pipe()
    answers, back = os.pipe()
    arguments = [
        chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank",
    ]  # fmt: skip
    starting = ["bash", "-c", WITH_PIPES, "bash", str(theirs), str(back), *arguments]
    process = subprocess.Popen(starting, pass_fds=(theirs, back), start_new_session=True, stdout=subprocess.DEVNULL)
    os.close(theirs)
    os.close(back)
    try:
        yield Browser(commands, answers)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(commands)
        os.close(answers)
