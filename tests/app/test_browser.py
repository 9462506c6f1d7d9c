"""The explorer in a real browser, for what AppTest cannot test: the server, the address and the rendered HTML."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from saelab.features import database

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)}; Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def server(main_script, runs, tmp_path_factory):
    """The address of an explorer of `runs`, and the file with its output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [
        sys.executable,
        "-m",
        "streamlit",
        "run",
        str(main_script),
        f"--server.port={port}",
        "--",
        str(runs),
    ]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=log.parent, env=os.environ | {"PYTHONPATH": paths}
        )
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(300):
                if process.poll() is not None:
                    pytest.fail(f"streamlit ended: {log.read_text()}")
                try:
                    urllib.request.urlopen(f"{address}/_stcore/health", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.2)
            else:
                pytest.fail(f"streamlit did not answer: {log.read_text()}")
            yield address, log
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def test_a_deep_link_shows_text_as_text_and_a_neighbour_changes_the_address(browser, server, runs):
    address, log = server
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(60_000)
    elsewhere, dialogs = [], []

    def only_here(route):
        if route.request.url.startswith((address, "data:", "blob:")):
            return route.continue_()
        elsewhere.append(route.request.url)
        return route.abort()

    page.route("**/*", only_here)
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))

    # The first request to this server is for a page other than the first page.
    page.goto(f"{address}/feature?run=whole&feature=0")
    page.wait_for_selector(".sl-context")
    assert page.locator("h2").first.inner_text() == "Feature 0"
    assert page.locator(".sl-context").count() == 20
    first = database.contexts(runs / "whole" / "features", 0)[0]
    shown = page.locator(".sl-context").first
    assert "<script>window.pwned = 1</script>" in shown.inner_text()
    assert shown.locator(".sl-token").count() == len(first.tokens)
    assert shown.locator(".sl-peak").get_attribute("title").split()[-1] == f"{first.activation:#.3g}".rstrip(".")
    assert page.evaluate("window.pwned === undefined")
    assert (
        page.locator("img[src='x'], [onmouseover], [onerror], .stMain script, .stMain [href*='example']").count() == 0
    )

    neighbour = database.feature(runs / "whole" / "features", 0).neighbours[0][0]
    page.locator(".st-key-neighbours a").first.click()
    page.wait_for_url(f"**/feature?run=whole&feature={neighbour}")
    page.wait_for_function(f"document.querySelector('h2').innerText === 'Feature {neighbour}'")
    page.get_by_role("button", name="Next").click()
    page.wait_for_url(f"**/feature?run=whole&feature={neighbour + 1}")
    page.go_back()
    page.wait_for_function(f"document.querySelector('h2').innerText === 'Feature {neighbour}'")

    page.get_by_role("link", name="Features", exact=True).click()
    table = page.locator("[data-testid='stDataFrame'] canvas").first
    table.wait_for()
    assert page.url.endswith("/features?run=whole")
    page.wait_for_timeout(500)  # the table is a canvas, without elements to wait for
    table.click(position={"x": 150, "y": 60}, force=True)  # the first row; a layer for scrolling covers it
    page.wait_for_url("**/feature?run=whole&feature=0")

    page.goto(f"{address}/feature?run=whole&feature=abc")
    page.wait_for_selector("[data-testid='stAlert']")
    assert "feature=abc is not a whole number" in page.locator("[data-testid='stAlert']").inner_text()
    page.close()

    assert elsewhere == [] and dialogs == []
    output = log.read_text()
    assert "127.0.0.1" in output
    assert not [word for word in ("Traceback", "Session State API", "deprecat") if word in output]
