"""The errors that a user can do something about: each message says what is wrong, where, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class SaelabError(Exception):
    """Base of all errors meant for the user. The CLI prints the message, without a traceback, and exits with 2."""


class SettingError(SaelabError, ValueError):
    """An impossible setting. A ValueError too, so that pydantic reports it as the error of its field."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The options nearest to a misspelt name, as `` Nearest: a, b.`` to add to a message; "" where none is near."""
    near = get_close_matches(name, list(options), n=3, cutoff=0.6)
    return f" Nearest: {', '.join(near)}." if near else ""


def brief(error: Exception) -> str:
    """A library's error on one line of at most 300 characters, to go into a message of ours."""
    return " ".join(str(error).split())[:300] or type(error).__name__
