"""A feature as HTML: only our elements, all of its facts, legible in both themes."""

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from saelab.features import card
from saelab.features.database import Database, open_database
from saelab.features.export import html
from saelab.features.marks import number, visible
from tests.app.synthetic_run import HOSTILE, LONG, NEVER_ACTIVE, OTHER, SCRIPT, write_run
from tests.features.dense import write_database

ATTRIBUTES = {
    "class": r"saelab-card|columns|wide|narrow|(ends )?dim|example|value|text|mark|list|bar( down)?|"
    r"token( active)?( peak)?",
    "id": r"feature-\d+",
    "style": r"--share: [01](\.\d\d)?",
    "title": r"[\d.,]+",
    "href": r"#feature-\d+",
    "aria-label": r"tokens in 50 bins of activation from [\d.,]+ to [\d.,]+, at most [\d,]+ in a bin(, logarithmic)?",
    "role": "img",
    "viewbox": r"0 0 \d+ 60",
    "preserveaspectratio": "none",
    **dict.fromkeys(("x", "y", "width", "height"), r"[\d.]+"),
}
CARD = {"section", "h2", "h3", "span", "div", "svg", "rect"}


class Inventory(HTMLParser):
    """The elements and the text that a browser would find; asserts that every attribute is one of ours."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)
        self.elements.add(tag)
        for name, value in attrs:
            assert value is not None and re.fullmatch(ATTRIBUTES[name], value), (name, value)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name == "href"]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    run = write_run(tmp_path_factory.mktemp("runs") / OTHER.replace("/", ""), model=SCRIPT)
    return open_database(run / "features")


@pytest.mark.parametrize("index", [0, 3, NEVER_ACTIVE, 39])
@pytest.mark.parametrize("whole", [False, True])
def test_a_card_has_only_our_elements(database: Database, index: int, whole: bool) -> None:
    found = Inventory(card.card(database.feature(index), whole=whole))
    assert found.elements <= CARD | ({"details", "summary"} if whole else set())
    assert found.ids == [f"feature-{index}"] and found.links == []
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", found.text)
    assert OTHER.replace("/", "") in found.text and SCRIPT in found.text, "the names of run and model, as text"


def test_a_card_has_every_fact_of_the_feature(database: Database) -> None:
    feature = database.feature(3)
    text = Inventory(card.card(feature)).text
    for fact in (
        "Feature 3",
        database.site,
        f"density {100 * feature.density:.3g}% ({feature.n_active:,} of {feature.n_tokens:,} tokens)",
        f"maximum {number(feature.maximum)}",
        "norm folded in",
        f"{feature.top_logits[0].value:+.2f}",
        f"{feature.bottom_logits[-1].value:+.2f}",
        f"{feature.top_tokens[0].value:.1%}",
        *(visible(token.text[:100]) for token in feature.top_logits + feature.bottom_logits + feature.top_tokens),
    ):
        assert fact in text, fact
    for neighbours in feature.neighbours.values():
        for neighbour in neighbours[:5]:
            assert re.search(rf"{neighbour.feature}  .*?{neighbour.value:.3f}", text)
    for example in database.examples(3, n=10, distinct=True):
        assert f"{number(example.activation)}" in text
        assert f"row {example.row}, token {example.position}" in text


def test_the_histogram_has_a_bar_for_every_bin_with_tokens(database: Database) -> None:
    feature = database.feature(3)
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', card.card(feature))]
    expected = feature.histogram[feature.histogram > 0] * 60 / feature.histogram.max()
    assert heights == pytest.approx(expected.clip(1.5).tolist(), abs=0.006)


def test_a_huge_activation_stretches_neither_shading_nor_histogram(tmp_path: Path) -> None:
    tokens = np.arange(1, 31).reshape(2, 15)
    z = np.linspace(2, 8, 30, dtype=np.float32).reshape(2, 15, 1)
    z[1, 1] = 4000
    database = open_database(write_database(tmp_path / "features", z, tokens, [b"t%d" % i for i in range(31)]))
    drawn = card.card(database.feature(0))
    assert "<span>2.00</span>" in drawn and "in a bin, logarithmic</span><span>4,000</span>" in drawn
    shares = {title: float(share) for share, title in re.findall(r'--share: ([\d.]+)" title="([\d.,]+)"', drawn)}
    assert shares["4,000"] == shares["8.00"] == 1 and shares["2.00"] == 0.25


def test_whole_cards_have_intervals_and_near_misses(database: Database) -> None:
    text = Inventory(card.card(database.feature(3), whole=True)).text
    for low, high, _, examples in database.intervals(3, 3):
        assert f"{number(low)} to {number(high)}" in text
        assert f"row {examples[0].row}, token {examples[0].position}" in text
    for example in database.near_misses(3, 3).same_token:
        assert f"row {example.row}, token {example.position}" in text


def test_hostile_tokens_are_shown_and_long_ones_cut(database: Database) -> None:
    """Feature 0's strongest examples are of hostile tokens."""
    page = card.card(database.feature(0))
    text = Inventory(page).text
    for token in HOSTILE:
        if token not in (LONG, "\n", "\t", "\r\n", "        ", "\x00", "\u202egnp.exe"):
            assert token in text, token
    assert LONG[:300] not in text and "(10,000 characters)" in text and len(page) < 200_000


def test_a_never_active_feature_says_so(database: Database) -> None:
    text = Inventory(card.card(database.feature(NEVER_ACTIVE), whole=True)).text
    assert f"never active on {database.n_tokens:,} tokens" in text
    assert "Strongest" not in text and "deciles" not in text and "Near misses" not in text


def test_a_feature_draws_itself_in_a_notebook(database: Database) -> None:
    feature = database.feature(3)
    drawn = feature._repr_html_()
    assert drawn == card.STYLE + card.card(feature)
    assert "Database(" not in repr(feature)


def test_neighbours_on_the_same_page_are_links(database: Database) -> None:
    feature = database.feature(3)
    near = feature.neighbours["decoder"][0].feature
    assert set(Inventory(card.card(feature, {near, 3})).links) == {f"#feature-{near}"}


def variables(style: str) -> list[dict[str, str]]:
    """The style's variables in light and in dark."""
    light, dark = style.split("prefers-color-scheme: dark")
    found = [dict(re.findall(r"--([a-z]+): ([^;]+);", part)) for part in (light, dark)]
    return [found[0], found[0] | found[1]]


def colour(text: str) -> list[float]:
    if text.startswith("#"):
        return [int(text[i : i + 2], 16) for i in (1, 3, 5)]
    return [float(part) for part in text.split(",")]


def over(top: list[float], alpha: float, below: list[float]) -> list[float]:
    return [alpha * a + (1 - alpha) * b for a, b in zip(top, below, strict=True)]


def contrast(a: list[float], b: list[float]) -> float:
    """As WCAG 2 defines it."""

    def luminance(rgb: list[float]) -> float:
        parts = [c / 255 / 12.92 if c <= 10.3 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted([luminance(a), luminance(b)], reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_has_a_contrast_of_4_5_in_both_themes() -> None:
    assert contrast([0, 0, 0], [255, 255, 255]) == pytest.approx(21)
    bars = [float(alpha) for alpha in re.findall(r"rgba\(var\(--(?:up|down)\), (\.\d+)\)", card.STYLE)]
    assert len(bars) == 4
    for found in variables(card.STYLE):
        page, text, dim, link = (colour(found[name]) for name in ("page", "text", "dim", "link"))
        up, down = colour(found["up"]), colour(found["down"])
        shaded = [over(up, float(found[name]), page) for name in ("weakest", "strongest")]
        shaded += [over(hue, alpha, page) for hue in (up, down) for alpha in bars]
        for background in [page, *shaded]:
            assert contrast(text, background) >= 4.5
        lightest = over(up, min(bars), page)  # of a neighbour's bar
        assert min(contrast(each, background) for each in (dim, link) for background in (page, lightest)) >= 4.5
    light, dark = html._STYLE.split("prefers-color-scheme: dark")
    for part in (light, dark):
        background, text = re.search(r"background: (#\w+); color: (#\w+)", part).groups()  # type: ignore[union-attr]
        (link,) = re.findall(r"nav a \{ color: (#\w+)", part)
        assert min(contrast(colour(text), colour(background)), contrast(colour(link), colour(background))) >= 4.5
