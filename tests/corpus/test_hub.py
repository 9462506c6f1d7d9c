"""Datasets on the Hub: streamed, pinned to a revision, and an answer within 5 seconds if there is no network."""

import itertools
import random
import subprocess
import sys
import time
from collections import Counter

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from saelab.corpus import CorpusSettings
from saelab.corpus.documents import Lane
from saelab.corpus.sources import open_source
from saelab.errors import SaelabError
from tests.corpus.made import TEXTS, check_resuming, documents, opened, refuses

LOAD_DATASET = datasets.load_dataset


class FakeHub:
    """Stands in for the Hub: replaces `dataset_info` and `load_dataset` with a dataset of 4 files.

    The files are generated row by row; with `folder` they are Parquet files there, of several row groups each.
    """

    def __init__(self, monkeypatch, table, columns_known=False, fail_after=None, folder=None):
        def generate(shards):
            self.opened += shards
            for shard in shards:
                for index, row in enumerate(table[shard::4]):
                    if fail_after is not None and index == fail_after:
                        raise ConnectionError("the network went away")
                    yield row

        def load_dataset(*args, **kwargs):
            self.asked.append((args, kwargs))
            if folder is not None:
                return LOAD_DATASET("parquet", data_files=parquet_files(table, folder), split="train", streaming=True)
            if columns_known:
                return datasets.Dataset.from_list(table).to_iterable_dataset(num_shards=4)
            return datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": list(range(4))})

        self.asked: list[tuple] = []
        self.opened: list[int] = []
        """The files that were read, one entry per reading."""
        info = huggingface_hub.DatasetInfo(
            id="someone/texts", sha="abc123", private=False, downloads=0, likes=0, tags=[]
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: info)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def parquet_files(table, folder):
    """Paths of 4 files with the rows of `table`."""
    paths = [str(folder / f"{n}.parquet") for n in range(4)]
    for n, path in enumerate(paths):
        pq.write_table(pa.Table.from_pylist(table[n::4]), path, row_group_size=7)
    return paths


@pytest.mark.parametrize("columns_known", [True, False])
def test_a_hub_dataset_is_streamed_at_a_fixed_revision(monkeypatch, tokenizer, columns_known):
    fake = FakeHub(monkeypatch, [{"text": text, "id": n} for n, text in enumerate(TEXTS)], columns_known)
    corpus = opened("someone/texts", tokenizer, subset="en", split="train")
    assert fake.asked == [(("someone/texts", "en"), {"split": "train", "streaming": True, "revision": "abc123"})]
    train, held_out = list(corpus.train_rows(seed=0)), corpus.held_out_rows(10**9)
    found = documents(train) + documents(held_out)
    assert {tokenizer.decode(document[:-1]) for document in found} <= set(TEXTS) and len(found) >= len(TEXTS) - 2
    assert np.array_equal(train, list(corpus.train_rows(seed=0)))
    assert not np.array_equal(train, list(corpus.train_rows(seed=0, epoch=1)))
    assert np.array_equal(held_out, corpus.held_out_rows(10**9))
    assert corpus.fingerprint != opened("someone/texts", tokenizer, subset="de").fingerprint


def make_hub(monkeypatch, tmp_path, kind, texts):
    """A Hub with files of one kind: rows without known columns, rows with known columns, or Parquet."""
    table = [{"text": text, "id": n} for n, text in enumerate(texts)]
    return FakeHub(monkeypatch, table, columns_known=kind == "columns", folder=tmp_path if kind == "parquet" else None)


FILES = pytest.mark.parametrize("kind", ["generated", "columns", "parquet"])


@FILES
@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.usefixtures("small_parts")
def test_a_stream_resumes_after_any_row(monkeypatch, tmp_path, tokenizer, kind, lanes):
    """Through the library's own state of the stream, also if lanes share files (3 lanes, 4 files)."""
    texts = [*TEXTS[:70], " ", "\n"]
    make_hub(monkeypatch, tmp_path, kind, random.Random(0).sample(texts, len(texts)))
    check_resuming(lambda: opened("someone/texts", tokenizer), lane=lanes - 1, lanes=lanes)


@FILES
@pytest.mark.parametrize("lanes", [2, 3, 4, 5])
def test_lanes_share_out_a_stream(monkeypatch, tmp_path, kind, lanes):
    """Each document is in exactly one lane, whether or not each lane can have whole files."""
    make_hub(monkeypatch, tmp_path, kind, TEXTS)
    source = open_source(CorpusSettings("someone/texts"))

    def contents(lane):
        return Counter(document.content for document, _ in source.documents(random.Random(7), lane, None))

    shares = [contents(Lane(index, lanes)) for index in range(lanes)]
    assert sum(shares, Counter()) == contents(Lane()) == Counter(TEXTS)
    assert min(share.total() for share in shares) >= len(TEXTS) // lanes - 4


@pytest.mark.usefixtures("small_parts")
def test_files_before_the_position_and_files_of_other_lanes_are_not_opened(monkeypatch, tmp_path, tokenizer):
    fake = make_hub(monkeypatch, tmp_path, "generated", TEXTS * 2)
    corpus = opened("someone/texts", tokenizer)
    rows = corpus.train_rows(seed=0)
    states = [rows.state() for _ in rows]
    fake.opened.clear()
    left = list(corpus.train_rows(seed=0, start=states[len(states) * 9 // 10]))
    assert left and len(fake.opened) == 1
    fake.opened.clear()
    list(corpus.train_rows(seed=0, lane=1, lanes=2))
    assert len(fake.opened) == 2


def test_a_bad_row_is_named_by_file_and_number_also_after_resuming_and_if_lanes_share_files(monkeypatch, tokenizer):
    table = [{"text": text} for text in TEXTS]
    table[4 * 45 + 2] = {"text": 7}
    FakeHub(monkeypatch, table)
    corpus = opened("someone/texts", tokenizer)
    monkeypatch.setattr("saelab.corpus.rows.WINDOW", 1)
    for lane in range(3):
        rows = corpus.train_rows(seed=0, lane=lane, lanes=3)
        try:
            while True:
                state = rows.state()
                next(rows)
        except StopIteration:
            continue
        except SaelabError as error:
            first = str(error)
        with pytest.raises(SaelabError) as second:
            list(corpus.train_rows(seed=0, lane=lane, lanes=3, start=state))
        assert first == str(second.value) and "file 2 of the Hub dataset someone/texts, row 45: 'text'" in first
        return
    pytest.fail("no lane met the bad row")


def test_trouble_in_a_hub_dataset(monkeypatch, tokenizer):
    FakeHub(monkeypatch, [{"body": text} for text in TEXTS])
    refuses("someone/texts", tokenizer, "someone/texts", "its columns are body")
    FakeHub(monkeypatch, [{"text": text} for text in TEXTS], fail_after=30)
    refuses("someone/texts", tokenizer, "failed at row", "the network went away")


def endless(monkeypatch, first, rest):
    """A Hub with one file: the texts `first`, then those of `rest` without end."""

    def generate(shards):
        for text in itertools.chain(first, itertools.cycle(rest)):
            yield {"text": text}

    FakeHub(monkeypatch, [])
    stream = datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": [0]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: stream)


@pytest.mark.parametrize(
    "first, rest, settings, message",
    [
        ([], [None], {}, "501 empty documents in a row .* up to file 0 .* row 500; use another `text_column`"),
        (TEXTS[:2], [None], {}, "empty documents in a row"),
        ([], TEXTS[:1], {}, "the same one repeated"),
        (TEXTS[:60], TEXTS[:1], {}, "none of the last .* documents .* is (not )?held out"),
        ([], TEXTS, {"min_tokens": 10_000}, "none of the last 501 documents .* has a length within min_tokens"),
    ],
)
def test_a_stream_without_end_in_which_nothing_can_come_is_noticed(
    monkeypatch, tokenizer, first, rest, settings, message
):
    """Empty documents, one document again and again, and documents that the limits leave out."""
    monkeypatch.setattr("saelab.corpus.usable.PATIENCE", 500)
    monkeypatch.setattr("saelab.corpus.rows.WINDOW", 1 << 12)
    endless(monkeypatch, first, rest)

    def read():
        corpus = opened("someone/texts", tokenizer, held_out=0.5, **settings)
        for row in corpus.train_rows(seed=0):
            assert row.any()
            corpus.held_out_rows(10**9)

    with pytest.raises(SaelabError, match=f"^corpus: .*{message}"):
        read()


def test_a_stream_without_end_is_read_with_what_it_has(monkeypatch, tokenizer):
    """A few documents, or nine empty ones of ten, are no reason to give up."""
    monkeypatch.setattr("saelab.corpus.usable.PATIENCE", 500)
    monkeypatch.setattr("saelab.corpus.rows.WINDOW", 1 << 12)
    for rest in (TEXTS[:3], [*[None] * 9, *TEXTS[:2]]):
        endless(monkeypatch, [], rest)
        corpus = opened("someone/texts", tokenizer, held_out=0.2)
        assert len(list(itertools.islice(corpus.train_rows(seed=0), 300))) == 300
        assert (corpus.held_out_rows(3000) != 0).sum() >= 3000
        assert (corpus.empty_documents() is None) == (None not in rest)


def test_a_file_of_a_stream_without_the_column(monkeypatch, tokenizer):
    FakeHub(monkeypatch, [{"text": text} if n % 4 else {"body": text} for n, text in enumerate(TEXTS)])
    corpus = opened("someone/texts", tokenizer, text_column="text")
    list(corpus.train_rows(seed=0))
    assert corpus.empty_documents().startswith("50 of 200 documents are empty")


def test_a_hub_that_does_not_answer(monkeypatch, tokenizer):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("saelab.hub.TIMEOUT", 0.3)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: time.sleep(3))
    begin = time.monotonic()
    refuses("someone/texts", tokenizer, "cannot be reached", "0.3 s", "corpus: demo")
    assert time.monotonic() - begin < 2


def test_offline_mode_is_honoured_and_named(monkeypatch, tokenizer):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuses("someone/texts", tokenizer, "HF_HUB_OFFLINE is set", "hf download someone/texts")
    refuses("demoo", tokenizer, "Nearest: demo")


def test_a_hub_that_cannot_be_reached_is_one_message_within_5_seconds_and_no_log(no_network):
    """In a fresh process, with the real library and no network."""
    script = """
import time
from saelab.corpus import CorpusSettings
from saelab.corpus.sources import open_source
begin = time.monotonic()
try:
    open_source(CorpusSettings("someone/texts"))
except Exception as error:
    print(type(error).__name__, error)
print(time.monotonic() - begin < 5)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    message, quick = done.stdout.splitlines()
    assert message.startswith("SaelabError corpus: the Hub dataset someone/texts cannot be reached")
    assert "hf download" in message and quick == "True" and done.stderr == ""
    no_network.unlink()  # it did try, as it should
