"""Rows of every kind of corpus resume from a saved position without reading what lies before it; lanes share out the
documents."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from saelab.corpus import CorpusSettings, arrow_files, encoder, files, json_files
from saelab.corpus.documents import Lane
from saelab.corpus.sources import open_source
from saelab.errors import SaelabError
from tests.corpus.made import KINDS, TEXTS, check_resuming, documents, opened, tokenised, write

pytestmark = pytest.mark.usefixtures("small_parts")


# -- resuming


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [{}, {"epoch": 2, "lane": 1, "lanes": 3}], ids=["whole", "lane"])
def test_rows_resume_after_any_row(tmp_path, tokenizer, kind, which):
    source = write(tmp_path / kind, TEXTS[:80])
    check_resuming(lambda: opened(source, tokenizer), **which)


@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet", "saved"])
def test_rows_of_token_ids_resume_after_any_row(tmp_path, tokenizer, kind):
    source = write(tmp_path / kind, tokenised(150), "input_ids")
    check_resuming(lambda: opened(source, tokenizer))


def test_rows_resume_beside_documents_left_out_and_within_long_documents(tmp_path, tokenizer):
    """A position counts documents that the limits leave out, too, and one document may fill many rows."""
    texts = [text * (1 + 12 * (n % 7 == 0)) for n, text in enumerate(TEXTS[:60])]
    source = write(tmp_path / "a.jsonl", texts)
    check_resuming(lambda: opened(source, tokenizer))
    check_resuming(lambda: opened(source, tokenizer, min_tokens=100))
    check_resuming(lambda: opened(source, tokenizer, max_tokens=300))


def test_the_demo_resumes_too(tokenizer):
    corpus = opened("demo", tokenizer, context=64)
    rows = corpus.train_rows(seed=1)
    for _ in range(40):
        state = rows.state()
        left = [next(rows) for _ in range(3)]
        again = corpus.train_rows(seed=1, start=state)
        assert np.array_equal(left, [next(again) for _ in range(3)])


@pytest.mark.parametrize(
    "kind, module, reader",
    [
        ("a.jsonl", json_files, "_read_json_lines"),
        ("folder", files, "_read_text"),
        ("a.parquet", arrow_files, "_read_parquet"),
        ("saved", arrow_files, "_read_saved"),
    ],
)
def test_resuming_reads_and_tokenises_nothing_before_the_position(
    tmp_path, tokenizer, monkeypatch, kind, module, reader
):
    """Parts before the current window are not opened, and texts before the current document are not tokenised."""
    parts, texts = [], []
    read, encode = getattr(module, reader), encoder.Encoder.encode

    def counted_read(*args):
        parts.append(args)
        return read(*args)

    def counted_encode(self, documents):
        return encode(self, (texts.append(document) or document for document in documents))

    monkeypatch.setattr(module, reader, counted_read)
    monkeypatch.setattr(encoder.Encoder, "encode", counted_encode)
    corpus = opened(write(tmp_path / kind, TEXTS * 2), tokenizer)
    rows = corpus.train_rows(seed=0)
    states = [rows.state() for _ in rows]
    for share in (0.5, 0.95):
        parts.clear(), texts.clear()
        start = states[int(share * len(states))]
        left = len(list(corpus.train_rows(seed=0, start=start)))
        n_parts, n_texts = len(parts), len(texts)
        parts.clear(), texts.clear()
        list(corpus.train_rows(seed=0))
        window = 1 << 12  # the current window, and the part that it begins in, are read from the beginning
        assert n_parts <= (1 - share + 2 * window / sum(map(len, TEXTS * 2))) * len(parts) + 2
        assert n_texts <= left / len(states) * len(texts) + 2


def test_a_state_that_is_damaged_or_belongs_to_other_rows_is_refused(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl")
    corpus = opened(source, tokenizer)
    rows = corpus.train_rows(seed=1, epoch=2, lane=0, lanes=2)
    for _ in range(100):
        next(rows)
    state = rows.state()
    own = {"seed": 1, "epoch": 2, "lane": 0, "lanes": 2}
    assert len(list(corpus.train_rows(**own, start=state)))
    for other in ({"seed": 2}, {"epoch": 1}, {"lane": 1}, {"lanes": 3}):
        (name,) = other
        with pytest.raises(SaelabError, match=rf"to other rows \({name} {own[name]}, not {other[name]}\)"):
            corpus.train_rows(**own | other, start=state)
    with pytest.raises(SaelabError, match=r"to other rows \(corpus "):
        opened(source, tokenizer, min_tokens=1).train_rows(**own, start=state)
    for name, value in state.items():
        less = {key: state[key] for key in state if key != name}
        changed = f"{value}x" if isinstance(value, str) else value[:-1] if isinstance(value, list) else value + 1
        for damaged in (less, state | {name: None}, state | {name: changed}):
            with pytest.raises(SaelabError, match="is damaged"):
                corpus.train_rows(**own, start=damaged)


def test_the_state_given_is_a_copy(tmp_path, tokenizer):
    corpus = opened(write(tmp_path / "a.jsonl"), tokenizer)
    rows = corpus.train_rows(seed=0)
    next(rows)
    before = json.dumps(rows.state())
    state = rows.state()
    state.clear()
    state["source"] = "changed"
    assert json.dumps(rows.state()) == before


# -- lanes


@pytest.mark.parametrize("lanes", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_lanes_share_out_all_documents_evenly(tmp_path, kind, lanes):
    """Each document of the source is in exactly one lane, and each lane has about as many."""
    source = open_source(CorpusSettings(str(write(tmp_path / kind))))

    def contents(lane):
        return Counter(document.content for document, _ in source.documents(random.Random(7), lane, None))

    shares = [contents(Lane(index, lanes)) for index in range(lanes)]
    assert sum(shares, Counter()) == contents(Lane())
    counts = [share.total() for share in shares]
    assert min(counts) > 0.7 * max(counts)


def test_each_lane_is_packed_by_itself(tmp_path, tokenizer):
    corpus = opened(write(tmp_path / "a.jsonl"), tokenizer)
    whole = documents(list(corpus.train_rows(seed=0)))
    found = [documents(list(corpus.train_rows(seed=0, lane=lane, lanes=3))) for lane in range(3)]
    assert all(len(lane) > 0.2 * len(whole) for lane in found)
    all_lanes = sum(found, Counter())
    assert set(all_lanes.values()) == {1}
    assert len(all_lanes.keys() ^ whole.keys()) <= 4, "all but the last document of each lane, which is cut off"
    held_out = documents(corpus.held_out_rows(10**9))
    assert not all_lanes.keys() & held_out.keys()


def test_a_lane_of_several_may_be_empty(tmp_path, tokenizer):
    corpus = opened(write(tmp_path / "a.jsonl", TEXTS[:4]), tokenizer)
    counts = [len(list(corpus.train_rows(seed=0, lane=lane, lanes=8))) for lane in range(8)]
    assert 0 in counts and any(counts)
    for lane, lanes in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="is not one of"):
            corpus.train_rows(seed=0, lane=lane, lanes=lanes)
