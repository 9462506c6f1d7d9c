"""Pictures of the explorer for docs/img, taken in a real browser.

    python scripts/screenshots.py RUN OTHER_RUN DEAD_RUN HEADS_RUN DARK_RUN

Runs of the demo model. RUN and OTHER_RUN are evaluated and indexed, and RUN has the analyses `steering` and
`similarity` (with OTHER_RUN); the others have `dead`, `attention` (of blocks.N.attn.hook_z) and `dark_matter`, and
DEAD_RUN and DARK_RUN are indexed. Needs playwright and a Chromium.
"""

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parents[1] / "docs" / "img"
DESKTOP, TALL, PHONE = {"width": 1280, "height": 800}, {"width": 1280, "height": 1400}, {"width": 390, "height": 844}
TEXT = "def%20main(argv):%0A%20%20%20%20return%20json.dumps(argv)"
LONGEST = 120_000
"""Milliseconds that a page may take: the first text loads the language model."""


def pictures(run: str, other: str, dead: str, heads: str, dark: str) -> list[tuple[str, str, dict[str, int], str, str]]:
    """Name, address, size, colour scheme, and the text or selector whose appearance ends the wait."""
    return [
        ("runs", "runs", DESKTOP, "light", "text=FVU over training"),
        ("run", f"run?run={run}", DESKTOP, "dark", ".js-plotly-plot"),
        ("features", f"features?run={run}&q=import%20os", DESKTOP, "light", "text=densities are of"),
        ("feature", f"feature?run={run}&feature=12", DESKTOP, "light", ".line .token"),
        ("feature-phone", f"feature?run={run}&feature=12", PHONE, "dark", ".line .token"),
        ("prompt", f"prompt?run={run}&text={TEXT}", DESKTOP, "dark", "text=Click on a token"),
        ("compare", f"compare?run={run}&other={other}", DESKTOP, "light", "text=The same features"),
        ("map", f"map?run={run}", DESKTOP, "dark", ".js-plotly-plot"),
        ("steer", f"steer?run={run}", TALL, "light", ".sl-effects"),
        ("dead", f"dead?run={dead}", DESKTOP, "light", "text=Dead features in training"),
        ("attention", f"attention?run={heads}&text={TEXT}", DESKTOP, "dark", "text=Heads on held-out text"),
        ("dark-matter", f"dark_matter?run={dark}", TALL, "light", ".line .token"),
    ]


def take(page: Page, address: str, until: str, path: Path) -> None:
    page.goto(address, timeout=LONGEST)
    page.locator(until).first.wait_for(timeout=LONGEST)
    page.wait_for_timeout(2500)  # charts and histograms draw themselves after their text
    page.screenshot(path=path)


def main() -> None:
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    runs = [Path(name) for name in sys.argv[1:]]
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("there is no chromium here")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "saelab.cli", "app", *map(str, runs), "--port", str(port)])
    try:
        for _ in range(600):
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1):
                break
            time.sleep(0.1)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for name, address, size, scheme, until in pictures(*(run.name for run in runs)):
                page = browser.new_page(viewport=size, color_scheme=scheme)
                take(page, f"http://127.0.0.1:{port}/{address}", until, IMAGES / f"{name}.png")
                page.close()
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
