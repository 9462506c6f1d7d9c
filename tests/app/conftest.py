import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from tests.app.synthetic_run import OTHER, SCRIPT, write_run

ROOT = Path(__file__).parents[2]
APP = ROOT / "app"
# As Streamlit does, put the folder of main.py on the path, to import the modules in it.
sys.path.insert(0, str(APP))

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


@pytest.fixture(scope="session")
def main_script() -> Path:
    return APP / "main.py"


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    """A folder of runs: `whole`, with hostile text in its features; `OTHER`, of the same width with other weights and
    a hostile name and model; and `bare`, which was only trained."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "bare", features=False, evaluation=False)
    write_run(folder / OTHER, seed=1, model=SCRIPT)
    write_run(folder / "whole")
    return folder


@pytest.fixture
def explorer(main_script, monkeypatch):
    """Open the explorer as `streamlit run main.py -- ARGUMENTS`, at a page, with these parameters in its address."""

    def open_explorer(*arguments, page: str, **link: str) -> AppTest:
        monkeypatch.setattr(sys, "argv", [str(main_script), *map(str, arguments)])
        app = AppTest.from_file(str(main_script), default_timeout=60)
        app.query_params.update(link)
        app.switch_page(f"views/{page}.py").run()
        assert not app.exception
        return app

    return open_explorer


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)}; Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="session")
def server(main_script, runs, tmp_path_factory):
    with serving(main_script, runs, tmp_path_factory.mktemp("server") / "log.txt") as address:
        yield address


@contextmanager
def serving(main_script, runs, log):
    """The address of an explorer of `runs`. Its output must have no traceback and no warning of Streamlit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", str(main_script), f"--server.port={port}", "--", str(runs)]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = os.environ | {"PYTHONPATH": paths}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=log.parent, env=environment)
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
            yield address
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    output = log.read_text()
    assert "127.0.0.1" in output
    assert not [word for word in ("Traceback", "Session State API", "deprecat") if word in output], output


@pytest.fixture
def page(browser, server):
    """A page of 1280 x 800 in the browser. At its end it has asked only the server, and no hostile text has acted."""
    elsewhere, dialogs = [], []

    def only_here(route):
        if route.request.url.startswith((server, "data:", "blob:")):
            return route.continue_()
        elsewhere.append(route.request.url)
        return route.abort()

    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(60_000)
    page.route("**/*", only_here)
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    yield page
    assert page.evaluate("window.pwned === undefined")
    foreign = "img[src='x'], [onmouseover], [onerror], .stMain script, .stMain [href*='example']"
    assert page.locator(foreign).count() == 0
    page.close()
    assert elsewhere == [] and dialogs == []
