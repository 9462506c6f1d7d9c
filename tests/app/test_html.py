import re
from html.parser import HTMLParser

from explorer import html
from hypothesis import given
from hypothesis import strategies as st

from saelab.features.database import Context
from tests.app.synthetic_run import HOSTILE

STYLE = re.compile(
    r"background: (rgba\([\d., ]+\)|linear-gradient\(90deg, rgba\([\d., ]+\) \d+%, rgba\([\d., ]+\) \d+%\))"
)
tokens = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=8), st.text("<>&\"'/=` \n\ta", max_size=12))


class Inventory(HTMLParser):
    """The elements, attributes, comments and text that a browser would find."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: set[str] = set()
        self.other: list[str] = []
        self.text = ""
        self.titles: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.elements.add(tag)
        for name, value in attributes:
            assert name in ("class", "title", "style"), (name, value)
            if name == "class":
                assert re.fullmatch(r"sl-[a-z]+( sl-[a-z]+)?", value)
            if name == "style":
                assert STYLE.fullmatch(value), value
            if name == "title":
                self.titles.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        self.other.append(data)

    def handle_decl(self, decl):
        self.other.append(decl)

    def handle_pi(self, data):
        self.other.append(data)

    def unknown_decl(self, data):
        self.other.append(data)


def context(words: list[str], peak: int = 0) -> Context:
    activations = [float(i % 3) for i in range(len(words))]
    return Context(0, 3, 17, 2.0, peak, words, activations)


@given(st.lists(tokens, min_size=1, max_size=40), st.booleans())
def test_contexts_contain_only_our_elements_and_all_of_the_text(words, breaks):
    found = Inventory(html.contexts_html([context(words)], 2.0, breaks=breaks))
    assert found.elements <= {"div", "span"} and found.other == []
    for word in words:
        for piece in re.findall(r"[^\W_]+", word):
            assert piece in found.text
    assert len(found.titles) == len(words)
    assert all(title.startswith(html.visible(word)) for title, word in zip(found.titles, words, strict=True))


@given(st.lists(tokens, min_size=1, max_size=10))
def test_the_logit_lens_and_tables_contain_only_our_elements(words):
    lens = Inventory(html.logits_html([(word, float(i)) for i, word in enumerate(words)]))
    assert lens.elements == {"div", "span"} and lens.other == []
    table = Inventory(html.facts_html([(word, word, word, word) for word in words]))
    assert table.elements == {"table", "tbody", "tr", "td"} and table.other == []
    assert Inventory(html.tokens_html(words)).elements == {"div", "span"}


@given(st.lists(st.text("ab \n", min_size=1, max_size=4), min_size=1, max_size=10))
def test_line_breaks_are_marked_and_kept_or_only_marked(words):
    compact = Inventory(html.contexts_html([context(words)], 2.0)).text
    broken = Inventory(html.contexts_html([context(words)], 2.0, breaks=True)).text
    assert "\n" not in compact and compact.count("↵") == "".join(words).count("\n")
    assert "".join(words).replace("\n", "↵\n") in broken


def test_shading_rises_with_the_activation_and_ends_at_the_strongest():
    alphas = [float(html.shading(share).split(",")[-1].rstrip(")")) for share in (0.01, 0.3, 0.7, 1.0, 2.0)]
    assert alphas == sorted(alphas) and alphas[-1] == alphas[-2] == html.STRONGEST
    assert html.shading(0.0) == html.shading(-1.0) == html.shading(float("nan")) == ""


def test_only_active_tokens_are_shaded_and_the_peak_is_marked_once():
    page = html.contexts_html([context(["a", "b", "c", "d"], peak=2)], 2.0)
    spans = re.findall(r'<span class="sl-token[^>]*>', page)
    assert [("background" in span) for span in spans] == [False, True, True, False]
    assert [("sl-peak" in span) for span in spans] == [False, False, True, False]
