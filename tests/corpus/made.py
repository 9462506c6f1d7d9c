"""Corpora of every kind with the same texts, a tokenizer for them, and checks that several tests share."""

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from saelab.corpus import Corpus, CorpusSettings, open_corpus
from saelab.errors import SaelabError

EOT, CONTEXT = "<|endoftext|>", 16
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu"]
TEXTS = [f"{n} " + " ".join(WORDS[(n * k) % len(WORDS)] for k in range(3, 30)) + f" line {n}." for n in range(200)]


def make_tokenizer(model="bpe", **special):
    """A tokenizer that numbers its special tokens first; BOS = EOS unless `special` says otherwise."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = special or {"bos_token": EOT, "eos_token": EOT}
    names = list(dict.fromkeys(special.values()))
    if model == "bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=names, initial_alphabet=alphabet, show_progress=False
        )
    elif model == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["<unk>", *names], unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", *names], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    if model != "bpe":
        special["unk_token"] = "<unk>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8, **special)


def write(path: Path, texts=TEXTS, column="text") -> Path:
    """Write the texts as a corpus; the suffix of `path` decides the kind, and without one it is a folder."""
    table = [{"id": n, column: text} for n, text in enumerate(texts)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table))
    elif path.suffix == ".json":
        path.write_text(json.dumps(table, indent=1))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(table), path, row_group_size=64)
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(texts) + "\n")
    elif path.name == "saved":
        import datasets

        datasets.disable_progress_bars()
        datasets.Dataset.from_list(table).with_format("numpy").save_to_disk(path)
    else:
        (path / "deep").mkdir(parents=True)
        for n, text in enumerate(texts):
            (path / ("deep" if n % 2 else "") / f"{n}.txt").write_text(text)
    return path


def tokenised(n=50, length=CONTEXT):
    """Rows of token ids, all different."""
    return [[0, *((np.arange(length - 1) * (n + 7)) % 300 + 1).tolist()] for n in range(n)]


def opened(source, tokenizer, context=CONTEXT, held_out=0.1, **settings) -> Corpus:
    return open_corpus(CorpusSettings(str(source), held_out=held_out, **settings), tokenizer, context)


def documents(rows, eos=0) -> Counter:
    """How often each whole document occurs in rows of BOS + tokens (the last one is cut off)."""
    stream = np.concatenate([row[1:] for row in rows])
    return Counter(tuple(piece.tolist()) for piece in np.split(stream, np.flatnonzero(stream == eos) + 1)[:-1])


def refuses(source, tokenizer, *parts, **settings) -> str:
    """The message of the error that opening or reading `source` raises; it contains all `parts`."""

    def read():
        corpus = opened(source, tokenizer, **settings)
        return list(corpus.train_rows(seed=0)), corpus.held_out_rows(10**9)

    with pytest.raises(SaelabError) as error:
        read()
    message = str(error.value)
    assert message.startswith("corpus: ")
    assert all(part in message for part in parts), message
    return message


def check_resuming(open_again: Callable[[], Corpus], **which) -> None:
    """A corpus opened anew gives the remaining rows from every state: before the first row and after each row."""
    rows = open_again().train_rows(seed=5, **which)
    states, given = [json.dumps(rows.state())], []
    for row in rows:
        given.append(row)
        states.append(json.dumps(rows.state()))
    assert json.dumps(rows.state()) == states[-1], "at the end the state stays after the last row"
    assert max(map(len, states)) < 7 * CONTEXT + 1000
    assert len(given) > 20
    given, again = np.stack(given), open_again()
    for n, state in enumerate(states):
        left = list(again.train_rows(seed=5, **which, start=json.loads(state)))
        assert np.array_equal(np.reshape(left, (-1, CONTEXT)), given[n:]), f"resumed before row {n} of {len(given)}"


KINDS = ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt", "folder", "saved"]
