"""How fast the explorer opens, in a real browser: seconds to first paint and to content, on a server just started."""

import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from saelab.errors import SaelabError


def paint(run: str, repeats: int = 3) -> dict[str, float]:
    """Median seconds from opening a feature's page to first paint, and to the text of its first example.

    Each is the first page that its server shows, in a browser with an empty cache; starting the server is left out.
    """
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise SaelabError("there is no chromium here")
    paints, contents = [], []
    for _ in range(repeats):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = subprocess.Popen(
            [sys.executable, "-m", "saelab.cli", "app", run, "--port", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait(port)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                page = browser.new_page(viewport={"width": 1280, "height": 800})
                began = time.perf_counter()
                page.goto(f"http://127.0.0.1:{port}/feature?run={Path(run).name}&feature=0", wait_until="commit")
                page.locator(".line .token").first.wait_for(timeout=60_000)
                contents.append(time.perf_counter() - began)
                first = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null")
                paints.append(first / 1000)
                browser.close()
        finally:
            server.terminate()
            server.wait()
    return {"first_paint": statistics.median(paints), "content": statistics.median(contents)}


def _wait(port: int) -> None:
    for _ in range(600):
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1):
            return
        time.sleep(0.1)
    raise SaelabError(f"the explorer did not start (process {os.getpid()})")
