"""A headless Chromium that a test drives: it types, looks and listens for complaints."""

import base64
import json
import shutil
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

from websockets.sync.client import connect

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Browser:
    """One tab, over the DevTools protocol; use it as a context manager."""

    def __init__(self, profile):
        self.profile, self.stack = Path(profile), ExitStack()
        self.session, self.count, self.complaints = None, 0, []

    def __enter__(self):
        with self.stack as stack:
            stack.callback(self._start().wait, timeout=60)
            stack.callback(self.process.terminate)
            port_file, give_up = self.profile / "DevToolsActivePort", time.monotonic() + 120
            while not (port_file.is_file() and len(port_file.read_text().split()) == 2):
                assert time.monotonic() < give_up, "no Chromium came up"
                time.sleep(0.05)
            address = "ws://127.0.0.1:{}{}".format(*port_file.read_text().split())
            self.socket = stack.enter_context(connect(address, max_size=None, proxy=None))
            target = self.send("Target.createTarget", url="about:blank")["targetId"]
            attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
            self.session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                self.send(f"{domain}.enable")
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        self.stack.close()

    def _start(self):
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        words = [CHROMIUM, *flags, f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        return self.process

    def send(self, method, **params):
        """Ask for something and return the answer; what the page complains of meanwhile is kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        self.socket.send(
            json.dumps(message | ({"sessionId": self.session} if self.session else {}))
        )
        while True:
            answer = json.loads(self.socket.recv(timeout=120))
            self._hear(answer)
            if answer.get("id") == self.count:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _hear(self, answer):
        params = answer.get("params", {})
        match answer.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.complaints.append(str(params["entry"]))

    def open(self, address, *, width=1200, height=900, dark=False):
        """Load a page in a window of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=address)
        self.wait("document.readyState == 'complete'")

    def value(self, script):
        """Return what an expression comes to on the page."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, script):
        """Wait until an expression is true."""
        give_up = time.monotonic() + 120
        while not self.value(script):
            assert time.monotonic() < give_up, f"never true: {script}"
            time.sleep(0.05)

    def press(self, key, code=0):
        """Press and release a key."""
        for kind in ("keyDown", "keyUp"):
            words = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            self.send(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **words,
            )

    def picture(self, path, *, whole=True):
        """Save what is seen, or the whole page."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(shot["data"]))
