"""The language model that the explorer was started with, if any: `saelab app RUNS --llm URL --model NAME`.

Its key comes from the environment (`saelab.autointerp.llm.openai_client`) and is nowhere shown. One budget serves all
pages until the explorer ends.
"""

import argparse
import sys
from typing import NamedTuple

import streamlit as st

from saelab.autointerp.lexical import LexicalJudge
from saelab.autointerp.llm.budget import Budget, parsed_budget
from saelab.autointerp.llm.named import client as named
from saelab.autointerp.llm.protocol import Client
from saelab.errors import SaelabError

CONCURRENCY = 8


class Options(NamedTuple):
    """What the explorer was started with."""

    runs: tuple[str, ...]
    llm: str | None
    model: str | None
    price: str | None
    max_tokens: float | None
    max_money: float | None


class Asked(NamedTuple):
    """Who can be asked to explain and to judge."""

    client: Client
    budget: Budget | None


OFFLINE = Asked(LexicalJudge(), None)


def options() -> Options:
    """The arguments of the explorer. Raises SaelabError if they cannot be read."""
    return _parsed(tuple(sys.argv[1:]))


@st.cache_data(max_entries=4, show_spinner=False)
def _parsed(arguments: tuple[str, ...]) -> Options:
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    for name in ("llm", "model", "price"):
        parser.add_argument(f"--{name}")
    for name in ("max-tokens", "max-money"):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("runs", nargs="*", default=["runs"])
    try:
        found, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise SaelabError(f"The explorer's arguments cannot be read: {error}") from error
    if unknown:
        raise SaelabError(
            f"The explorer has no option {unknown[0]!r}; it has --llm, --model, --price, --max-tokens, --max-money."
        )
    return Options(tuple(found.runs), found.llm, found.model, found.price, found.max_tokens, found.max_money)


def language_model() -> Asked | None:
    """The language model, if the explorer was started with one. Raises SaelabError if it cannot be used."""
    asked = options()
    if asked.llm is None:
        return None
    return _opened(asked.llm, *asked[2:])


@st.cache_resource(max_entries=2, show_spinner="Opening the language model ...")
def _opened(llm: str, model: str | None, price: str | None, max_tokens: float | None, max_money: float | None) -> Asked:
    return Asked(named(llm, model, CONCURRENCY), parsed_budget(price, max_tokens, max_money))
