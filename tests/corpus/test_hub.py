"""Datasets on the Hub: streamed, pinned to a revision, and an answer within 5 seconds where there is no network."""

import subprocess
import sys
import time

import datasets
import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from tests.corpus.made import TEXTS, documents, opened, refuses


class FakeHub:
    """Stands in for the Hub: what `dataset_info` and `load_dataset` give, in memory."""

    def __init__(self, monkeypatch, table, columns_known=False, fail_after=None):
        def generate(shards):
            for shard in shards:
                for index, row in enumerate(table[shard::4]):
                    if fail_after is not None and index == fail_after:
                        raise ConnectionError("the network went away")
                    yield row

        def load_dataset(*args, **kwargs):
            self.asked.append((args, kwargs))
            if columns_known:
                return datasets.Dataset.from_list(table).to_iterable_dataset(num_shards=4)
            return datasets.IterableDataset.from_generator(generate, gen_kwargs={"shards": list(range(4))})

        self.asked = []
        info = huggingface_hub.DatasetInfo(
            id="someone/texts", sha="abc123", private=False, downloads=0, likes=0, tags=[]
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: info)
        monkeypatch.setattr(datasets, "load_dataset", load_dataset)


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


def test_trouble_in_a_hub_dataset(monkeypatch, tokenizer):
    FakeHub(monkeypatch, [{"body": text} for text in TEXTS])
    refuses("someone/texts", tokenizer, "someone/texts", "its columns are body")
    FakeHub(monkeypatch, [{"text": text} for text in TEXTS], fail_after=30)
    refuses("someone/texts", tokenizer, "failed after", "the network went away")


def test_a_hub_that_does_not_answer(monkeypatch, tokenizer):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("saelab.hub.TIMEOUT", 0.3)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **kwargs: time.sleep(3))
    begin = time.monotonic()
    refuses("someone/texts", tokenizer, "cannot be reached", "0.3 s", "corpus: demo")
    assert time.monotonic() - begin < 2


def test_offline_mode_is_honoured_and_said(monkeypatch, tokenizer):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuses("someone/texts", tokenizer, "HF_HUB_OFFLINE is set", "hf download someone/texts")
    refuses("demoo", tokenizer, "Nearest: demo")


def test_a_hub_out_of_reach_is_said_within_5_seconds_and_without_a_log(no_network):
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
    said, quick = done.stdout.splitlines()
    assert (
        said.startswith("SaelabError corpus: the Hub dataset someone/texts cannot be reached") and "hf download" in said
    )
    assert quick == "True" and done.stderr == ""
    no_network.unlink()  # it did try, as it should
