"""A real browser for tests of pages: Chromium without a window, driven over two pipes by the DevTools protocol; no package, no port.

with Browser() as browser:
    page = browser.open(path, width=500)
    page.click('[data-key="row:…"]')
    assert page.text("#panel") == "…"
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: texts of less contrast with what they stand on than WCAG 2.2 asks for (1.4.3); text in pictures is not looked at
CONTRAST = """(() => {
  const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const under = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$|transparent/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()) || !e.getClientRects().length || e.tagName === 'SCRIPT' || e.closest('svg')) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(under(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push(`${e.tagName} ${e.className} ${e.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return found;
})()"""

PATIENCE = 60.0  # seconds for one answer
#: chromium reads commands from 3 and answers on 4; what comes in is moved out of their way first
LAUNCH = """
import fcntl, os, sys
for number, given in zip((3, 4), [fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3]]):
    os.dup2(given, number)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((found for name in names if (found := shutil.which(name))), None)


class Browser:
    """One browser with a profile of its own, which ends with the block."""

    def __init__(self) -> None:
        self.sent = 0
        self.rest = b""
        self.events: list[dict[str, Any]] = []
        self.waiting: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> Browser:
        program = find_chromium()
        assert program is not None
        self.profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        commands, self.commands = os.pipe()
        self.answers, answers = os.pipe()
        flags = ["--headless", "--disable-gpu", "--no-first-run", "--disable-extensions", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={self.profile.name}", "--disable-background-networking", "--disable-dev-shm-usage"]
        flags += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        line = [sys.executable, "-c", LAUNCH, str(commands), str(answers), program, *flags, "about:blank"]
        self.process = subprocess.Popen(line, pass_fds=(commands, answers), stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.call("Browser.close")
            self.process.wait(10)
        except (OSError, TimeoutError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.commands)
        os.close(self.answers)
        self.profile.cleanup()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of one command. Raises RuntimeError with the browser's message, TimeoutError when there is no answer."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + PATIENCE
        while self.sent not in self.waiting:
            self.read(until)
        answer = self.waiting.pop(self.sent)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def read(self, until: float) -> None:
        if not select.select([self.answers], [], [], max(0.0, until - time.monotonic()))[0]:
            raise TimeoutError("the browser does not answer")
        got = os.read(self.answers, 1 << 20)
        if not got:
            raise TimeoutError("the browser has ended")
        *whole, self.rest = (self.rest + got).split(b"\0")
        for text in whole:
            message = json.loads(text)
            if "id" in message:
                self.waiting[message["id"]] = message
            else:
                self.events.append(message)

    def open(self, path: Path, fragment: str = "", width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """A file in a new tab, once it has loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.size(width, height)
        page.dark(dark)
        page.call("Page.navigate", url=path.as_uri() + fragment)
        page.until("document.readyState === 'complete'")
        return page


class Page:
    """One tab."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self.browser.call(method, self.session, **params)

    def size(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def dark(self, on: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if on else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def ask(self, expression: str) -> Any:
        """The value of an expression in the page. Raises AssertionError for one that throws."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while not self.ask(f"Boolean({expression})"):
            assert time.monotonic() < end, f"never came: {expression}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """What people see of an element: hidden parts are left out."""
        return self.ask(f"document.querySelector({json.dumps(selector)}).innerText")

    def count(self, selector: str) -> int:
        """How many elements match that are seen."""
        return self.ask(
            f"[...document.querySelectorAll({json.dumps(selector)})].filter((e) => e.offsetParent !== null || e.getClientRects().length).length"
        )

    def click(self, selector: str) -> None:
        """A click of the mouse in the middle of the element, wherever it is: what lies over it gets the click."""
        spot = self.ask(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center', behavior: 'instant'}});"
            "const b = e.getClientRects()[0]; return [b.left + b.width / 2, b.top + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=spot[0], y=spot[1], button="left", clickCount=1)

    def key(self, key: str, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS.get(key, 0), **typed
            )

    def type(self, text: str) -> None:
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)

    def complaints(self) -> list[str]:
        """Errors of scripts and of the page's policy, and everything that was asked of a network, since it was opened."""
        self.ask("1")  # what happened before this has been told
        mine = [e for e in self.browser.events if e.get("sessionId") == self.session]
        said = [e["params"]["exceptionDetails"]["text"] for e in mine if e["method"] == "Runtime.exceptionThrown"]
        said += [e["params"]["entry"]["text"] for e in mine if e["method"] == "Log.entryAdded"]
        said += [f"dialog {e['params']['message']}" for e in mine if e["method"] == "Page.javascriptDialogOpening"]
        asked = [e["params"]["request"]["url"] for e in mine if e["method"] == "Network.requestWillBeSent"]
        return said + [f"asked for {url}" for url in asked if not url.startswith(("file:", "about:"))]

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


KEYS = {"Escape": 27, "ArrowRight": 39, "ArrowLeft": 37, "Tab": 9, "Enter": 13, " ": 32}
