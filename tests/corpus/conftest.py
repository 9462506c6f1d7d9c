"""A corpus of each kind, and a tokenizer."""

import pytest

from saelab.corpus import arrow_files, encoder, files, rows
from tests.corpus.made import KINDS, make_tokenizer, write


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(params=KINDS)
def source(request, tmp_path):
    return write(tmp_path / request.param)


@pytest.fixture
def small_parts(monkeypatch):
    """Parts, windows and batches so small that a corpus of these tests has several of each."""
    monkeypatch.setattr(files, "PART", 1 << 12)
    monkeypatch.setattr(arrow_files, "ROWS", 16)
    monkeypatch.setattr(rows, "WINDOW", 1 << 12)
    monkeypatch.setattr(encoder, "BATCH", 1 << 10)
