"""Tokens as text that shows everything in them, and numbers of three digits."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saelab.features.marks import LONGEST, cut, number, pieces, typed, visible

tokens = st.one_of(st.text(max_size=8), st.text("<>&\"'/=` \n\ta\u0336\u202e", max_size=12))


@given(tokens)
def test_every_token_is_visible(token: str) -> None:
    shown = visible(token)
    assert shown and shown.strip() == shown
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" def", "␣def"),
        ("\n", "↵"),
        ("\t", "⇥"),
        ("        ", "␣×8"),
        ("", "∅"),
        (" ", "␣"),
        ("a b", "a b"),
        ("\n    x", "↵␣×4x"),
        ("🦊", "🦊"),
        ("👩‍🔬", "👩‍🔬"),
        ("日本", "日本"),
        ("\u202egnp", "\\u202egnp"),
        ("\x00", "\\u0000"),
        ("x  ", "x␣×2"),
        ("\u00a0", "\\u00a0"),
        ("e\u0301", "e\u0301"),
        ("\u0336x", "◌\u0336x"),
        ("\n\u0336x", "↵◌\u0336x"),
    ],
)
def test_how_white_space_and_invisible_characters_are_shown(token: str, shown: str) -> None:
    assert visible(token) == shown


@given(st.text("ab\n\t\r ", max_size=12))
def test_a_shown_token_can_be_typed_to_search_for_it(token: str) -> None:
    assert typed(visible(token)) == (token or "∅")


@given(st.text("ab \n\t", max_size=12))
def test_breaks_keep_line_breaks_and_indents(token: str) -> None:
    kept = "".join(text for text, mark in pieces(token, breaks=True) if not mark)
    assert kept == token


def test_a_long_token_is_cut_and_its_length_stated() -> None:
    assert cut("x" * LONGEST) == "x" * LONGEST
    assert cut("ab" * 5120) == "ab" * (LONGEST // 2) + "… (10,240 characters)"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (12.345, "12.3"), (0.045, "0.0450"), (1234.5, "1,234"), (5.0, "5.00"), (123.4, "123"), (-2.0, "-2.00")],
)
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert number(value) == shown
