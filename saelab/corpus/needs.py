"""The memory that reading and tokenising text needs."""

from saelab.corpus.encoder import BATCH
from saelab.corpus.rows import WINDOW
from saelab.memory import Need

_TOKENISED_BYTES = 100
"""Measured, of each character that is being tokenised, if every character is a token."""


def text_need() -> Need:
    """A window of documents as Python strings, which take up to 4 bytes a character, and one batch being tokenised."""
    how = f"{WINDOW:,} characters x 4 bytes being shuffled, {BATCH:,} x {_TOKENISED_BYTES} bytes being tokenised"
    return Need("text", 4 * WINDOW + _TOKENISED_BYTES * BATCH, "memory", how)
