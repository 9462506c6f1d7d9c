"""An exported page in a real browser, opened as a file."""

from pathlib import Path

import pytest

from saelab.runs.export import export
from tests.app.synthetic_run import NEVER_ACTIVE


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_exported_page_is_inert_and_fits_the_window(browser, runs: Path, tmp_path: Path, scheme: str) -> None:
    """Feature 0 is active on hostile tokens, one of them of 10,000 characters."""
    path = export(runs / "whole", "html", f"0,3,{NEVER_ACTIVE}", out=tmp_path / "page.html")
    page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    requests, dialogs, problems = [], [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.on("console", lambda message: problems.append(message.text))
    page.goto(path.as_uri())
    assert page.locator("section").count() == 3
    page.evaluate("document.querySelectorAll('details').forEach(folded => folded.open = true)")
    assert page.evaluate("window.pwned === undefined") and dialogs == [] and problems == []
    assert requests == [path.as_uri()]
    assert page.locator("script, img, iframe, link, [onerror], [onmouseover]").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.documentElement.scrollHeight") < 3 * 20_000
    background = page.locator("section").first.evaluate("element => getComputedStyle(element).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(29, 30, 33)"}[scheme]
    shades = page.locator(".active").evaluate_all("all => all.map(each => getComputedStyle(each).backgroundColor)")
    assert len(set(shades)) > 10 and "rgba(0, 0, 0, 0)" not in shades
    page.close()
