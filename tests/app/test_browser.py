"""The Features and Feature pages in a browser: the components, the address, keys, touch, contrast."""

import json
import re

import pytest

from saelab.features.database import open_database
from saelab.features.marks import number
from tests.app.synthetic_run import LONG, NEVER_ACTIVE, SCRIPT

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
pytestmark = pytest.mark.slow

MAIN = "document.querySelector('[data-testid=stMain]')"
CONTRASTS = """(elements) => {
  const channels = (text) => {
    const found = text.match(/[\\d.]+(e-?\\d+)?/g).map(Number), unit = text.startsWith("color(") ? 1 : 255;
    return found.slice(0, 3).map((value) => value / unit).concat(found[3] ?? 1);
  };
  const light = (rgb) => rgb.slice(0, 3).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (from) => {
    for (let at = from; at; at = at.parentElement ?? at.getRootNode().host) {
      const colour = channels(getComputedStyle(at).backgroundColor);
      if (colour[3] > 0.99) return light(colour);
    }
    throw new Error("no background");
  };
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  return elements.map((element) => {
    const style = getComputedStyle(element), shadow = style.boxShadow.match(/(rgb|color)[^)]*\\)/);
    return {
      text: ratio(light(channels(style.color)), ground(element)),
      line: shadow ? ratio(light(channels(shadow[0])), ground(element.parentElement)) : null,
    };
  });
}"""


@pytest.fixture
def database(runs):
    return open_database(runs / "whole" / "features")


def opened(page, server, path, wait):
    page.set_default_timeout(30_000)  # a busy machine takes seconds for a page
    page.goto(f"{server}/{path}")
    page.wait_for_selector(wait)


def feature_shown(page, index):
    page.wait_for_function(f"document.querySelector('h3')?.innerText === 'Feature {index}'")


def test_examples_come_first_and_a_token_is_a_door_to_the_others_there(page, server, database):
    opened(page, server, "feature?run=whole&feature=0", ".line")
    lines = page.locator(".line")
    example, *_ = database.examples(0)
    assert lines.first.bounding_box()["y"] < 500
    assert page.evaluate(f"{MAIN}.scrollHeight") < 20_000
    assert lines.first.locator(".token").count() == len(example.tokens)
    assert SCRIPT in page.locator(".lines").first.inner_text()
    assert LONG not in page.locator(".lines").first.inner_text()

    peak, card = lines.first.locator(".token.peak"), page.locator(".card:popover-open")
    peak.hover()
    shown = card.inner_text(timeout=500)
    others = database.at(example.row, example.position)
    strongest = [f for f in others.features[(-others.values).argsort(kind="stable")].tolist() if f != 0][:5]
    assert f"activation {number(example.activation)}, its largest" in shown
    assert f"id {example.token_ids[example.index]} · row {example.row}, token {example.position}" in shown
    assert [int(each) for each in card.locator("a").all_inner_texts()] == strongest != []
    page.mouse.move(5, 5)
    card.wait_for(state="hidden")

    weaker = lines.first.locator(".token.on:not(.peak)").first
    weaker.hover()
    value, share = re.search(r"activation ([\d.]+), at or above ([\d.]+)% of", card.inner_text()).groups()
    values = database.facts.activations(0).values
    (exact,) = {v for v in example.activations.tolist() if number(v) == value}
    assert float(share) == pytest.approx(100 * (values <= exact).mean(), abs=0.051)

    peak.click()
    page.mouse.move(5, 5)  # the card is pinned
    card.locator("a").first.click()
    page.wait_for_selector(".st-key-beside .line")
    assert f"beside={strongest[0]}" in page.url and "feature=0" in page.url
    assert page.locator(".st-key-beside").inner_text().startswith(f"Feature {strongest[0]}")
    assert card.is_visible()
    page.keyboard.press("Escape")
    card.wait_for(state="hidden")
    with page.expect_download() as download:
        page.get_by_role("button", name="JSON").click()
    assert json.loads(download.value.path().read_text())["index"] == 0
    page.locator(".st-key-beside a").first.click()
    feature_shown(page, strongest[0])
    page.go_back()
    feature_shown(page, 0)


def test_the_arrow_keys_walk_from_token_to_token_and_enter_pins(page, server, database):
    opened(page, server, "feature?run=whole&feature=1", ".line")
    first, second, *_ = database.examples(1)
    page.locator(".line .token.peak").first.focus()
    card = page.locator(".card:popover-open")
    page.keyboard.press("Home")
    assert f"id {first.token_ids[0]} · row {first.row}, token {first.start}" in card.inner_text()
    page.keyboard.press("ArrowRight")
    assert f"token {first.start + 1}" in card.inner_text()
    page.keyboard.press("ArrowDown")
    assert f"row {second.row}, token {second.start + 1}" in card.inner_text()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.shadowRoot.activeElement.tagName") == "A"
    page.keyboard.press("Escape")
    card.wait_for(state="hidden")
    assert page.evaluate("document.activeElement.shadowRoot.activeElement.className").startswith("token")
    assert page.url.endswith("feature?run=whole&feature=1")  # the keys are not those of the page


def test_long_tokens_are_cut_with_more_on_the_card_and_line_breaks_are_marked_or_kept(page, server):
    opened(page, server, "feature?run=whole&feature=0", ".line")
    token = page.locator(".line .token", has_text="wwwww").first
    assert len(token.inner_text()) < 150
    token.hover()
    shown = page.locator(".card:popover-open").inner_text()
    assert "w" * 2000 in shown and "10,000 characters" in shown
    text = page.locator(".line .text").first
    assert "↵" in text.inner_text() and "\n" not in text.text_content()
    page.get_by_label("line breaks").first.check()
    assert "↵\n" in text.text_content() and "␣×8" not in text.text_content()


def test_a_range_of_the_histogram_gives_examples_from_that_range(page, server, database):
    opened(page, server, "feature?run=whole&feature=1", ".plot")
    plot = page.locator(".root.brush .plot")
    box, before = plot.bounding_box(), None
    while box != before:  # until nothing above or beside it moves it any more
        page.wait_for_timeout(300)
        box, before = plot.bounding_box(), box
    at = lambda share: (box["x"] + share * box["width"], box["y"] + 20)  # noqa: E731
    page.mouse.move(*at(0.105))
    page.mouse.down()
    page.mouse.move(*at(0.31))
    page.mouse.up()
    page.wait_for_url("**range=5%2C15*")
    page.wait_for_selector("text=/activations from/")  # and what they have in common
    maximum = float(database.facts.maxima[1])
    sides = page.locator(".line:visible .side")
    sync_api.expect(sides.first).not_to_have_text(number(maximum))  # these were the top examples
    inside = [float(text.split()[0]) for text in sides.all_inner_texts()]
    assert inside and all(0.995 * maximum * 5 / 50 <= value <= 1.005 * maximum * 16 / 50 for value in inside)

    page.locator(".handle").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**range=6%2C15*")
    page.reload()
    page.wait_for_selector("text=/activations from/")
    page.get_by_role("button", name="all", exact=True).click()
    page.wait_for_url(lambda url: "range" not in url)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_are_legible_and_the_weakest_shading_is_visible(page, server, scheme):
    page.emulate_media(color_scheme=scheme)
    opened(page, server, "feature?run=whole&feature=0", ".line")
    page.locator(".line .token.peak").first.click()
    for what in (".line .token.on", ".line .mark", ".line .side", ".bar .dim", ".card .dim", ".card a", ".axis span"):
        assert page.locator(what).count(), what
        for contrast in page.locator(what).evaluate_all(CONTRASTS):
            assert contrast["text"] >= 4.5, (what, contrast)
            if what == ".line .token.on":
                assert contrast["line"] >= 3, contrast
    page.goto(f"{server}/features?run=whole")
    page.wait_for_selector("td.text")
    for what in ("tbody a", "th button", "td small", "tbody .mark", "tbody .on", ".head .readout"):
        for contrast in page.locator(what).evaluate_all(CONTRASTS):
            assert contrast["text"] >= 4.5, what


def test_rows_are_links_that_keys_walk_and_headers_sort(page, server, database):
    opened(page, server, "features?run=whole", "td.text")
    rows = page.locator("tbody a")
    active = [i for i in range(database.n_features) if i != NEVER_ACTIVE]
    assert [int(index) for index in rows.all_inner_texts()] == active
    assert rows.first.get_attribute("href") == "feature?run=whole&feature=0"
    page.get_by_role("button", name="density").click()
    page.wait_for_url("**sort=density*")
    page.wait_for_selector("th[aria-sort=descending]")
    densest = database.table.page(sort="density", n=3).features.tolist()
    assert [int(index) for index in rows.all_inner_texts()[:3]] == densest
    rows.first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    feature_shown(page, densest[2])
    assert "3 of 39" in page.locator(".st-key-feature_bar").inner_text()
    page.get_by_role("button", name="Previous").wait_for()
    page.keyboard.press("k")
    feature_shown(page, densest[1])
    assert "sort=density" in page.url
    with page.context.expect_page() as other:
        page.get_by_role("link", name="2 of 39").click()
        page.locator("td.text").nth(4).click(button="middle", force=True)  # the link covers its row
    other.value.wait_for_url("**/feature?run=whole&sort=density&feature=*")
    other.value.close()


def test_back_and_reload_keep_filter_sort_and_position(page, server):
    page.set_viewport_size({"width": 1024, "height": 600})
    opened(page, server, "features?run=whole", "td.text")
    page.get_by_role("textbox", name="Search").fill("日本語")
    page.get_by_role("textbox", name="Search").press("Enter")
    page.wait_for_selector("th:has-text('match')")
    assert "".join(page.locator("td.text").first.locator(".hit").all_inner_texts()) == "日本語"
    page.go_back()
    page.wait_for_selector("th:has-text('match')", state="detached")
    assert page.get_by_role("textbox", name="Search").input_value() == "" and page.locator("td.text").count() == 39
    page.get_by_role("button", name="max").click()
    page.wait_for_selector("th[aria-sort]")
    page.get_by_text("all", exact=True).first.click()
    page.wait_for_url("**show=all*")
    page.wait_for_selector(f"tbody a:text-is('{NEVER_ACTIVE}')")
    address = page.url
    row = page.locator("tbody a").nth(30)
    row.scroll_into_view_if_needed()
    index, top = int(row.inner_text()), page.evaluate(f"{MAIN}.scrollTop")
    assert top > 300
    row.click()
    feature_shown(page, index)
    page.go_back()
    page.wait_for_selector("td.text")
    page.wait_for_function(f"Math.abs({MAIN}.scrollTop - {top}) < 3")
    assert page.url == address and page.locator("th[aria-sort]").inner_text().startswith("max")
    page.reload()
    page.wait_for_selector("td.text")
    page.wait_for_function(f"Math.abs({MAIN}.scrollTop - {top}) < 3")
    assert page.locator(f"tbody a:text-is('{NEVER_ACTIVE}')").count() == 1


def test_a_finger_sorts_and_pins_and_every_width_fits(browser, server):
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    opened(page, server, "features?run=whole", "td.text")
    for width in (1280, 1024, 768, 390):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate(f"{MAIN}.scrollWidth - {MAIN}.clientWidth") <= 0, width
        right = page.evaluate(
            "Math.max(...[...document.querySelectorAll('*')].flatMap((each) =>"
            " [...(each.shadowRoot?.querySelectorAll('td, th') ?? [])])"
            ".map((cell) => cell.getBoundingClientRect().right))"
        )
        assert right <= width, width
    page.get_by_role("button", name="density").tap()
    page.wait_for_url("**/features?run=whole&sort=density")

    opened(page, server, "feature?run=whole&feature=0", ".line")
    assert page.locator(".line .text").first.bounding_box()["width"] > 330
    page.locator(".line .token.peak").first.tap()
    assert "pinned" in page.locator(".card:popover-open").get_attribute("class")
    assert page.evaluate(f"{MAIN}.scrollWidth - {MAIN}.clientWidth") <= 0
    context.close()
