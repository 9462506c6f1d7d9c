"""The memory that reading and tokenising text needs."""

from saelab.corpus.encoder import BATCH
from saelab.corpus.rows import WINDOW
from saelab.memory import Need

_TOKENISED_BYTES = 100
"""Measured, of each character that is being tokenised, if every character is a token."""


def text_needs() -> list[Need]:
    """A window of documents as Python strings, which take up to 4 bytes a character; and, in a phase of its own, one
    batch being tokenised."""
    tokenised = f"{BATCH:,} characters x {_TOKENISED_BYTES} bytes"
    return [
        Need("text", 4 * WINDOW, "memory", f"{WINDOW:,} characters x 4 bytes being shuffled"),
        Need("tokenising", _TOKENISED_BYTES * BATCH, "memory", tokenised, ("tokenising",)),
    ]
