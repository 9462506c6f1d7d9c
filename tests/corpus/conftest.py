"""A corpus of each kind, and a tokenizer."""

import pytest

from tests.corpus.made import KINDS, make_tokenizer, write


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(params=KINDS)
def source(request, tmp_path):
    return write(tmp_path / request.param)
