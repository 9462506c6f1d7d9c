"""Errors that the user can fix. Each message says what is wrong, where, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class SaelabError(Exception):
    """Base of all errors meant for the user. The CLI prints the message, without a traceback, and exits with 2."""


class WriteError(SaelabError):
    """A file that cannot be written: the disk is full, or the folder is not writable."""


class SettingError(SaelabError, ValueError):
    """An impossible setting. It is a ValueError too, so that pydantic reports it as the error of that field."""


def check_positive(settings: object, *names: str) -> None:
    """Raises SettingError if one of the named settings is below 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise SettingError(f"{name}: {getattr(settings, name)} is not a positive number")


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The options nearest to a misspelt name, as `` Nearest: a, b.`` to append to a message; "" if none is near."""
    near = get_close_matches(name, list(options), n=3, cutoff=0.6)
    return f" Nearest: {', '.join(near)}." if near else ""


def brief(error: Exception) -> str:
    """A library's error on one line of at most 300 characters, to quote in our own messages.

    The text of a KeyError is the key and says nothing without the name of the error.
    """
    text = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(text.split())[:300] or type(error).__name__


def printable(text: str) -> str:
    """`text` on one line, with codes in place of invisible characters: file names and data may have any."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
