"""The shell, Runs, Run, Compare and Map in a browser: the address, Back, selections in charts, phones, contrast."""

import shutil

import pytest

from tests.app.synthetic_run import OTHER, write_run, write_sweep

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")

BOX = ".js-plotly-plot .nsewdrag"
PLACES = """(plot) => {
  const points = plot._fullData.find((trace) => trace.customdata), at = plot.getBoundingClientRect();
  const { xaxis, yaxis } = plot._fullLayout;
  return [...points.x].map((x, i) => [
    at.x + xaxis._offset + xaxis.l2p(x), at.y + yaxis._offset + yaxis.l2p(points.y[i]), points.customdata[i],
  ]);
}"""
CONTRAST = """() => {
  const rgba = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const light = (c) => c.slice(0, 3).map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const over = (top, under) => top.slice(0, 3).map((v, i) => v * top[3] + under[i] * (1 - top[3]));
  const ground = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) layers.push(rgba(getComputedStyle(at).backgroundColor));
    return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
  };
  const found = [];
  for (const element of document.querySelectorAll(".stMain *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility() || element.closest("svg, .stCode, [aria-disabled=true]")) continue;
    let opacity = 1;
    for (let at = element; at; at = at.parentElement) opacity *= getComputedStyle(at).opacity;
    const style = rgba(getComputedStyle(element).color), below = ground(element);
    const [a, b] = [light(over([...style.slice(0, 3), style[3] * opacity], below)), light(below)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${element.className} ${element.textContent.slice(0, 40)}`);
  }
  return found;
}"""


@pytest.fixture
def another(runs):
    """Writes another run, which is removed after the test: other tests count the runs."""
    written = []

    def write(name, **facts):
        written.append(write_run(runs / name, **facts))
        return written[-1]

    yield write
    for run in written:
        shutil.rmtree(run)


@pytest.fixture
def swept(runs):
    """A sweep among the runs, which is removed after the test."""
    yield write_sweep(runs / "grid")
    shutil.rmtree(runs / "grid")


def opened(page, server, path, wait):
    page.goto(f"{server}/{path}")
    page.wait_for_selector(wait)
    settled(page)


def settled(page):
    page.wait_for_function("!document.querySelector('[data-testid=stStatusWidget], [data-testid=stSkeleton]')")
    page.wait_for_timeout(300)


def test_pages_have_titles_and_links_that_keep_the_run(page, server):
    opened(page, server, "run?run=bare", "h2")  # the first request is for a page other than the first page
    assert page.title() == "Run · bare"
    page.get_by_test_id("stSidebar").get_by_role("link", name="Runs").click()
    page.wait_for_function("document.title === 'Runs · bare'")
    page.wait_for_url(f"{server}/runs?run=bare")  # the title may come first
    page.get_by_test_id("stMain").get_by_role("link", name="whole").click()
    page.wait_for_function("document.title === 'Run · whole'")
    page.wait_for_url(lambda url: url.startswith(f"{server}/run?run=whole"))
    page.go_back()
    page.wait_for_function("document.title === 'Runs · bare'")
    page.wait_for_timeout(800)  # Streamlit loses a Back within some 0.2 s of another
    page.go_back()
    page.wait_for_function("document.title === 'Run · bare'")
    page.wait_for_url(f"{server}/run?run=bare")
    opened(page, server, "?run=whole", "h2")  # the bare address leads on
    page.wait_for_url("**/run?run=whole")


def test_a_view_survives_a_reload_and_back_leaves_it(page, server):
    opened(page, server, "run?run=whole", ".st-key-view")
    page.get_by_text("Dead and under-used").click()
    page.wait_for_url("**view=dead*")
    page.reload()
    page.wait_for_selector("text=1 of 40 features are never active")
    page.go_back()
    page.wait_for_selector("text=FVU")
    page.wait_for_url(f"{server}/run?run=whole")


def test_a_range_of_the_rank_plot_opens_those_features(page, server):
    opened(page, server, "run?run=whole", BOX)
    box = page.locator(BOX).first.bounding_box()
    page.mouse.move(box["x"] + 3, box["y"] + 3)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + box["height"] - 3, steps=5)
    page.mouse.up()
    page.wait_for_url("**/features?run=whole&density=*")
    page.wait_for_selector(".st-key-rows tbody tr")
    page.go_back()
    page.wait_for_url(f"{server}/run?run=whole")
    page.wait_for_selector(BOX)


def test_two_ticked_runs_are_compared(page, server):
    opened(page, server, "runs?run=bare", "h2")
    page.locator(".st-key-tick-whole label").click()
    page.wait_for_selector("text=Tick a second run")
    settled(page)
    page.locator(".st-key-tick-bare label").click()
    page.wait_for_url("**/compare?run=whole&other=bare")
    page.wait_for_selector("text=Each other's best")


@pytest.mark.slow
def test_a_run_of_a_sweep_is_opened_and_compared(page, server, swept):
    opened(page, server, "runs?run=grid/0&sort=name", ".sl-sweep")
    page.locator(".sl-sweep a", has_text="compare").first.click()
    page.wait_for_selector("text=Tick a second run to compare it with grid/0")
    settled(page)
    page.locator(".sl-sweep a", has_text="compare").click()
    page.wait_for_url("**/compare?run=grid%2F0&other=grid%2F1")
    page.wait_for_selector("text=Each other's best")
    page.go_back()
    page.wait_for_selector("text=Tick a second run")
    page.locator(".sl-sweep a", has_text="1").first.click()
    page.wait_for_function("document.querySelector('h2')?.innerText === 'grid/1'")


def test_the_keyboard_walks_the_pairs_and_chooses_one(page, server, another):
    another("again", seed=2, n_features=30)
    opened(page, server, "compare?run=whole&other=again", ".st-key-pair_rows tbody tr")
    page.locator(".st-key-pair_rows tbody button").first.focus()
    for key in ("ArrowDown", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    row = page.locator(".st-key-pair_rows tbody tr").nth(2)
    a, b = row.locator("td.a").inner_text(), row.locator("td.b").inner_text()
    page.wait_for_url(f"**a={a}&b={b}*")
    sync_api.expect(page.get_by_role("link", name=f"Feature {b} of again")).to_be_visible()
    sync_api.expect(page.get_by_role("link", name=f"Feature {a} of whole")).to_be_visible()


@pytest.mark.slow
def test_a_point_of_the_map_opens_its_feature_and_a_line_around_all_lists_them(page, server):
    opened(page, server, "map?run=whole", BOX)
    places = page.locator(".js-plotly-plot").evaluate(PLACES)
    distance = lambda a, b: (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2  # noqa: E731
    alone = max(places, key=lambda at: min(distance(at, other) for other in places if other is not at))
    page.mouse.move(alone[0] - 4, alone[1])
    page.mouse.move(alone[0], alone[1])
    page.wait_for_function("document.querySelector('.hoverlayer').textContent.startsWith('feature')")
    page.mouse.click(alone[0], alone[1])
    page.wait_for_url(f"**/feature?run=whole&feature={alone[2]}")
    page.wait_for_function(f"document.title === 'Feature {alone[2]} · whole'")
    page.go_back()
    page.wait_for_selector(BOX)
    page.get_by_text("selects features").click()
    page.wait_for_url("**drag=lasso*")
    settled(page)
    page.locator(BOX).last.wait_for()
    box = page.locator(BOX).last.bounding_box()
    corners = [(0.02, 0.02), (0.98, 0.02), (0.98, 0.98), (0.02, 0.98), (0.02, 0.02)]
    at = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in corners]
    page.mouse.move(*at[0])
    page.mouse.down()
    for corner in at[1:]:
        page.mouse.move(*corner, steps=4)
    page.mouse.up()
    page.get_by_role("link", name="40 features are selected").click()
    page.wait_for_url("**/features?run=whole&q=id%3A0-39")


def test_a_training_is_followed_and_its_end_is_noticed(page, server, another):
    run = another("training", features=False, evaluation=False)
    record = (run / "train.json").read_text()
    (run / "train.json").write_text('{"complete": false, "planned_tokens": 400000}')
    opened(page, server, "run?run=training", "text=Training: 184,320 of 400,000 tokens")
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 100, "tokens": 204800, "fvu": 0.01, "l0": 32.0}\n')
    page.wait_for_selector("text=Training: 204,800 of 400,000 tokens")
    (run / "train.json").write_text(record)
    page.wait_for_selector("text=Training: 204,800", state="detached")


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_pages_fit_the_window_and_their_text_is_legible(browser, server, swept, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page.set_default_timeout(60_000)
    for path in (
        "runs?run=grid/0&tick=grid/1",
        "run?run=whole",
        "run?run=whole&view=allocation",
        "compare?run=whole&other=bare",
        "map?run=whole",
        "feature?run=whole&feature=1",
        "steer?run=whole&steer=1:add:1",
    ):
        opened(page, server, path, "h2, .st-key-feature_bar, button[kind=primary]")
        wide = "document.querySelector('.stMain').scrollWidth - document.querySelector('.stMain').clientWidth"
        assert (page.locator(".sl-sweep").count() == 1) == path.startswith("runs"), path
        assert page.evaluate(wide) <= 0, path
        assert page.evaluate("document.querySelector('.stMainBlockContainer').scrollHeight") < 20_000
        assert page.evaluate(CONTRAST) == [], path
    page.close()


def test_hostile_names_stay_text(page, server):
    opened(page, server, "run?view=allocation", "h2")
    page.get_by_test_id("stSelectbox").get_by_role("combobox").click()
    page.get_by_role("option", name=OTHER).click()
    page.wait_for_function("(name) => document.querySelector('h2')?.innerText === name", arg=OTHER)
    page.get_by_test_id("stSidebar").get_by_role("link", name="Compare").click()
    page.wait_for_selector("text=different models")
