"""Packing loses no token, pads nothing, and keeps the boundaries between documents."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saelab.corpus.packing import pack, pack_document

BOS, EOS = 0, 1
DOCUMENTS = st.lists(st.lists(st.integers(2, 9), max_size=20), max_size=12)
MAYBE_BOS, MAYBE_EOS = st.sampled_from([None, BOS]), st.sampled_from([None, EOS])


@given(DOCUMENTS, st.integers(2, 9), MAYBE_BOS, MAYBE_EOS)
def test_rows_hold_the_stream_of_documents_in_order_and_nothing_else(documents, context, bos, eos):
    rows = list(pack(documents, context, bos=bos, eos=eos))
    stream = [i for document in documents for i in [*document, *([] if eos is None else [eos])]]
    head = 0 if bos is None else 1
    packed = [int(i) for row in rows for i in row[head:]]
    assert packed == stream[: len(packed)]
    assert len(stream) - len(packed) < context - head, "only what does not fill a row is left out"


@given(DOCUMENTS, st.integers(2, 9), MAYBE_BOS, MAYBE_EOS)
def test_every_row_is_full_and_begins_with_bos(documents, context, bos, eos):
    for row in pack(documents, context, bos=bos, eos=eos):
        assert row.shape == (context,) and row.dtype == np.int32
        assert bos is None or row[0] == bos
        assert bos is None or BOS not in row[1:]


@given(st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=20), max_size=12), st.integers(2, 9))
def test_eos_marks_exactly_the_ends_of_documents(documents, context):
    packed = [int(i) for row in pack(documents, context, bos=BOS, eos=EOS) for i in row[1:]]
    ends = np.cumsum([len(document) + 1 for document in documents]) - 1
    assert [i for i, token in enumerate(packed) if token == EOS] == [end for end in ends if end < len(packed)]


@given(DOCUMENTS, st.integers(2, 9))
def test_documents_are_taken_as_they_are_needed(documents, context):
    taken = 0

    def counted():
        nonlocal taken
        for document in documents:
            taken += 1
            yield document

    rows = pack(counted(), context, bos=BOS, eos=EOS)
    if next(rows, None) is not None:
        needed = next(n for n in range(1, len(documents) + 1) if sum(len(d) + 1 for d in documents[:n]) >= context - 1)
        assert taken == needed


@given(DOCUMENTS, st.integers(2, 9), MAYBE_BOS, MAYBE_EOS)
def test_a_document_at_a_time_gives_the_same_rows(documents, context, bos, eos):
    rows, rest = [], []
    for document in documents:
        before, copies = rest, (list(rest), list(document))
        some, rest = pack_document(before, document, context, bos=bos, eos=eos)
        assert (before, document) == copies, "neither list is changed"
        assert some.shape[1:] == (context,) and some.dtype == np.int32 and len(rest) < context
        rows += some.tolist()
    assert rows == [row.tolist() for row in pack(documents, context, bos=bos, eos=eos)]


def test_a_context_without_room_is_refused():
    with pytest.raises(ValueError, match="context 1"):
        next(pack([[2]], 1, bos=BOS, eos=EOS))
