"""What an AppTest page shows, as text."""

import re

from streamlit.testing.v1 import AppTest

from tests.app.synthetic_run import HOSTILE


def html(app: AppTest) -> str:
    """All HTML of the page."""
    return "".join(element.proto.body for element in app.get("html"))


def unescaped(markdown: str) -> str:
    """Text that `state.plain` escaped."""
    return re.sub(r"\\(.)", r"\1", markdown).replace("\u200b", "")


def message(app: AppTest) -> str:
    """The only error on the page."""
    assert len(app.error) == 1 and not app.exception
    return unescaped(app.error[0].value)


def check_inert(app: AppTest) -> None:
    """Asserts that no hostile token is an element of the page, and that none reaches Markdown."""
    page = html(app)
    assert "<script" not in page and "<img" not in page
    assert page.count("</style>") == page.count("<style>") <= 2, "ours"
    markdown = [
        *app.markdown,
        *app.caption,
        *app.title,
        *app.header,
        *app.subheader,
        *app.warning,
        *app.info,
        *app.error,
    ]
    labels = [element.value for element in markdown] + [link.proto.label for link in app.get("page_link")]
    hostile = [token for token in HOSTILE if len(token) > 2 and token != "        "]
    assert not [label for label in labels for token in hostile if token in label]
