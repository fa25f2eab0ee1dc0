"""Headless Chromium, driven by its DevTools protocol through a pipe: no further package is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from report_runs import BROWSER

OPTIONS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --hide-scrollbars --disable-dev-shm-usage --remote-debugging-pipe"
).split()


class Browser:
    """A page in a browser: `run` a script in it, `wait_for` one to be true, `requests` that it made.

    Args:
        profile: an empty folder for the browser's own files.
    """

    def __init__(self, profile: Path, width: int = 1280, height: int = 900, dark: bool = False):
        self.requests: list[str] = []
        self.console: list[str] = []
        self._buffer, self._last, self._answers = b"", 0, {}
        read_command, self._write = os.pipe()
        self._read, write_event = os.pipe()
        line = f'exec "$0" "$@" 3<&{read_command} 4>&{write_event}'
        null = subprocess.DEVNULL
        self._process = subprocess.Popen(
            ["bash", "-c", line, BROWSER, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(read_command, write_event), stdin=null, stdout=null, stderr=null,
        )  # fmt: skip
        os.close(read_command)
        os.close(write_event)
        self._session = None
        (target,) = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, **parameters: Any) -> dict:
        """The answer to a command of the protocol."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 60
        while self._last not in self._answers:
            self._receive(deadline - time.monotonic())
        answer = self._answers.pop(self._last)
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self, patience: float) -> None:
        assert select.select([self._read], [], [], max(patience, 0))[0], "the browser does not answer"
        part = os.read(self._read, 1 << 20)
        assert part, "the browser has ended"
        *whole, self._buffer = (self._buffer + part).split(b"\0")
        for message in map(json.loads, whole):
            if "id" in message:
                self._answers[message["id"]] = message
            elif message["method"] == "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            elif message["method"] == "Runtime.exceptionThrown":
                self.console.append(json.dumps(message["params"]["exceptionDetails"])[:500])
            elif message["method"] == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
                self.console.append(message["params"]["entry"]["text"])

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def run(self, script: str) -> Any:
        """What the expression gives in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str, patience: float = 30) -> None:
        """Until the expression is true."""
        deadline = time.monotonic() + patience
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < deadline, f"not so after {patience} s: {script}"
            time.sleep(0.1)

    def screenshot(self, file: Path, whole: bool = False) -> None:
        """A picture of the window, or of the whole page."""
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(picture["data"]))
