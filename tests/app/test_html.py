import re
from html.parser import HTMLParser

from explorer import html
from explorer.components.mount import LONGEST, marked, packed
from hypothesis import given
from hypothesis import strategies as st

from saelab.features.database import TokenValue
from saelab.features.marks import pieces
from tests.app.synthetic_run import HOSTILE

STYLE = re.compile(r"background: linear-gradient\(90deg, rgba\([\d., ]+\) \d+%, rgba\([\d., ]+\) \d+%\)")
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


@given(st.lists(tokens, min_size=1, max_size=10))
def test_bars_and_tables_contain_only_our_elements(words):
    bars = Inventory(html.bars_html([TokenValue(0, word, float(i)) for i, word in enumerate(words)]))
    assert bars.elements == {"div", "span"} and bars.other == []
    table = Inventory(html.facts_html([(word, word, word, word) for word in words]))
    assert table.elements == {"table", "tbody", "tr", "td"} and table.other == []


@given(tokens.filter(lambda token: len(token) <= LONGEST))
def test_a_token_is_sent_with_its_marks_enclosed_and_no_other_control_character(token):
    parts = re.split("[\x01\x02]", marked(token))
    shown = [(text, i % 2 == 1) for i, text in enumerate(parts) if text]
    merged = pieces(token)
    assert "".join(text for text, _ in shown) == "".join(text for text, _ in merged)
    assert [text for text, mark in shown if mark] == [text for text, mark in merged if mark]
    assert not re.search(r"[\x00\x03-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "".join(parts))


def test_a_long_token_is_sent_cut_with_its_length():
    assert marked("w" * 10_000) == "w" * LONGEST + "\x01… 10,000 characters\x02"


def test_data_are_compact_json():
    assert packed({"a": [1, 0.5], "é": "日"}) == '{"a":[1,0.5],"é":"日"}'.encode()
