"""Every kind of corpus gives full rows with each document once, in an order set by the seed, with a part held out."""

import json

import numpy as np
import pytest

from saelab.corpus import files
from saelab.errors import SettingError
from tests.corpus.made import CONTEXT, EOT, TEXTS, documents, make_tokenizer, opened, refuses, tokenised, write


@pytest.mark.usefixtures("small_parts")
def test_rows_are_full_begin_with_bos_and_hold_every_document_once(source, tokenizer):
    corpus = opened(source, tokenizer)
    train, held_out = list(corpus.train_rows(seed=0)), corpus.held_out_rows(10**9)
    for row in [*train, *held_out]:
        assert row.shape == (CONTEXT,) and row.dtype == np.int32 and row[0] == 0
    found = documents(train) + documents(held_out)
    assert not documents(train).keys() & documents(held_out).keys()
    assert set(found.values()) == {1}
    decoded = [tokenizer.decode(document[:-1]) for document in found]
    if source.suffix == ".txt":  # cut into pieces between lines
        assert all(text in TEXTS for piece in decoded for text in piece.strip().split("\n\n"))
        assert sum(len(piece.strip().split("\n\n")) for piece in decoded) > 0.9 * len(TEXTS)
    else:
        assert set(decoded) <= set(TEXTS) and len(decoded) >= len(TEXTS) - 2, "the last document of a side is cut off"
        assert 4 <= len(documents(held_out)) <= 50


def test_order_follows_from_seed_and_epoch_alone(source, tokenizer):
    def train(seed, epoch):
        return np.stack(list(opened(source, tokenizer).train_rows(seed=seed, epoch=epoch)))

    first = train(0, 0)
    assert np.array_equal(first, train(0, 0))
    for other in (train(1, 0), train(0, 1)):
        assert not np.array_equal(first, other)
        assert sum((documents(first) - documents(other)).values()) <= 1, "all but the one cut off at the end"


def test_held_out_rows_are_the_first_that_suffice_and_always_the_same(source, tokenizer):
    corpus = opened(source, tokenizer)
    everything = corpus.held_out_rows(10**9)
    for tokens in (1, 100, 200):
        some = corpus.held_out_rows(tokens)
        assert np.array_equal(some, everything[: len(some)])
        assert (some != 0).sum() >= tokens > (some[:-1] != 0).sum()
    list(corpus.train_rows(seed=3))
    assert np.array_equal(everything, opened(source, tokenizer).held_out_rows(10**9))


def test_nothing_is_written_into_the_folder(source, tokenizer):
    before = {path: path.stat().st_mtime_ns for path in source.parent.rglob("*")}
    list(opened(source, tokenizer).train_rows(seed=0))
    assert {path: path.stat().st_mtime_ns for path in source.parent.rglob("*")} == before


def test_fingerprint_tells_apart_what_gives_other_rows(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl")
    first = opened(source, tokenizer)
    assert opened(source, tokenizer).fingerprint == first.fingerprint
    others = [
        opened(source, tokenizer, held_out=0.2),
        opened(source, tokenizer, context=8),
        opened(source, make_tokenizer(bos_token="<s>", eos_token="</s>")),
        opened(write(tmp_path / "b.jsonl", TEXTS[1:]), tokenizer),
    ]
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 5
    moved = tmp_path / "elsewhere" / "other.jsonl"
    moved.parent.mkdir()
    source.rename(moved)
    assert opened(moved, tokenizer).fingerprint == first.fingerprint, "neither folder nor name matters"


def test_fingerprint_ignores_what_else_the_tokenizer_was_used_for(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl")
    used = make_tokenizer()
    used(TEXTS[:2], truncation=True, max_length=4)
    used.backend_tokenizer.enable_padding(length=8)
    assert opened(source, used).fingerprint == opened(source, tokenizer).fingerprint
    list(opened(source, used).train_rows(seed=0))
    assert used.backend_tokenizer.padding["length"] == 8 and used.encode(EOT)[:1] == [0], "it is left as it was"


# -- the split


def test_equal_rows_are_on_one_side_and_adding_rows_moves_none(tmp_path, tokenizer):
    def side(texts):
        corpus = opened(write(tmp_path / "a.jsonl", texts), tokenizer, context=4)
        return documents(corpus.held_out_rows(10**9)).keys()

    held_out = side(TEXTS)
    assert len(side(TEXTS * 2) - held_out) <= 1  # one document was cut off at the end
    assert len(side([*TEXTS[::-1], "another text", "and another"]) ^ held_out) <= 3


def test_a_tiny_corpus_still_has_two_sides(tmp_path, tokenizer):
    for held_out in (0.001, 0.999):
        corpus = opened(write(tmp_path / "a.jsonl", TEXTS[:4]), tokenizer, context=8, held_out=held_out)
        assert list(corpus.train_rows(seed=0)) and len(corpus.held_out_rows(1))


def test_a_long_file_among_others_is_cut_but_stays_on_one_side(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(files, "PART", 1 << 11)
    monkeypatch.setattr(files, "PIECE", 1 << 10)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, texts in (("long", TEXTS[:100]), ("short", TEXTS[100:101]), ("other", TEXTS[101:102])):
        write(folder / f"{name}.txt", texts)
    corpus = opened(folder, tokenizer)
    sides = [documents(list(corpus.train_rows(seed=0))), documents(corpus.held_out_rows(10**9))]
    long = [sum("line 50." in tokenizer.decode(document) for document in side) for side in sides]
    assert sorted(long) == [0, 1]
    assert max(map(len, sides)) > 5


def test_a_text_is_cut_between_characters_and_nothing_is_lost(tmp_path):
    path = tmp_path / "a.txt"
    for text in ("ä€😀" * 3000, "word " * 3000, "line\r\n" * 2000, "\ufeffbegin\n\n" + "text\n\n" * 2000):
        path.write_bytes(text.encode())
        pieces = [document.content for part in files.text_parts(path, path.stat().st_size, None) for document in part()]
        assert "".join(pieces) == text.removeprefix("\ufeff") and len(pieces) > 8
        assert all(len(piece.encode()) <= 1.5 * 1024 + 4 for piece in pieces)


# -- tokens


@pytest.mark.parametrize("model", ["bpe", "unigram", "words"])
def test_text_that_spells_a_special_token_stays_text(tmp_path, model):
    tokenizer = make_tokenizer(model, bos_token="<s>", eos_token=EOT)
    texts = [f"{text} {EOT} <s>{EOT}" for text in TEXTS]
    corpus = opened(write(tmp_path / "a.jsonl", texts), tokenizer)
    train = np.stack(list(corpus.train_rows(seed=0)))
    bos, eos = tokenizer.convert_tokens_to_ids(["<s>", EOT])
    assert (train[:, 0] == bos).all() and not (train[:, 1:] == bos).any()
    assert (train == eos).sum() <= len(texts)
    if model == "bpe":
        assert all(tokenizer.decode(document[:-1]) in texts for document in documents(train, eos))
    assert corpus.special_ids == set(tokenizer.all_special_ids)


@pytest.mark.parametrize("special", [{"bos_token": "<s>"}, {"eos_token": "</s>"}])
def test_a_lone_bos_or_eos_stands_for_both(tmp_path, special):
    corpus = opened(write(tmp_path / "a.jsonl"), make_tokenizer(**special))
    train = np.stack(list(corpus.train_rows(seed=0)))
    assert (train[:, 0] == 0).all() and len(documents(train)) > 150


def test_a_tokenizer_without_either_gives_rows_without(tmp_path):
    tokenizer = make_tokenizer(pad_token="<pad>")
    train = np.stack(list(opened(write(tmp_path / "a.jsonl"), tokenizer).train_rows(seed=0)))
    assert (train != 0).all()


def test_long_documents_raise_no_warning(tmp_path, tokenizer, caplog, capfd):
    list(opened(write(tmp_path / "a.jsonl"), tokenizer).train_rows(seed=0))
    assert not caplog.records and capfd.readouterr() == ("", "")


# -- documents left out by length


def test_documents_outside_the_limits_are_left_out_of_both_sides_and_no_others(tmp_path, tokenizer):
    """The limits count tokens without EOS, are inclusive, and move no document to the other side."""
    texts = [" ".join(text.split()[: 3 + n % 20]) for n, text in enumerate(TEXTS)]
    source = write(tmp_path / "a.jsonl", texts)

    def sides(**limits):
        corpus = opened(source, tokenizer, context=8, **limits)
        return [documents(list(corpus.train_rows(seed=0))), documents(corpus.held_out_rows(10**9))]

    everything = sides()
    lengths = sorted(len(document) - 1 for side in everything for document in side)
    low, high = lengths[len(lengths) // 4], lengths[3 * len(lengths) // 4]
    for limits in ({"min_tokens": low}, {"max_tokens": high}, {"min_tokens": low, "max_tokens": high}):
        for some, side in zip(sides(**limits), everything, strict=True):
            least, most = limits.get("min_tokens", 0), limits.get("max_tokens", 10**9)
            expected = {document for document in side if least <= len(document) - 1 <= most}
            unfinished = expected - some.keys()
            assert some.keys() <= expected and len(unfinished) <= 1, "all but the one cut off at the end"


def test_limits_are_part_of_the_identity_only_where_set(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl")
    corpora = [opened(source, tokenizer, **limits) for limits in ({}, {"min_tokens": 5}, {"max_tokens": 500})]
    assert len({corpus.fingerprint for corpus in corpora}) == 3
    assert not {"min_tokens", "max_tokens"} & corpora[0].identity.keys()
    assert corpora[1].identity["min_tokens"] == 5 and corpora[2].identity["max_tokens"] == 500


def test_limits_that_leave_nothing_and_limits_on_token_ids_are_refused(tmp_path, tokenizer):
    refuses(write(tmp_path / "a.jsonl"), tokenizer, "does not fill one row", "text within min_tokens", min_tokens=1000)
    source = write(tmp_path / "b.jsonl", tokenised(), "input_ids")
    refuses(source, tokenizer, "max_tokens", "holds token ids", max_tokens=20)
    with pytest.raises(SettingError):
        opened(source, tokenizer, min_tokens=2)


# -- tokenised corpora


@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet", "saved"])
@pytest.mark.parametrize("column", ["input_ids", "tokens"])
def test_token_ids_are_taken_as_they_are(tmp_path, tokenizer, kind, column):
    corpus = opened(write(tmp_path / kind, tokenised(), column), tokenizer)
    train = list(corpus.train_rows(seed=0))
    held_out = corpus.held_out_rows(10**9)
    assert sorted(row.tolist() for row in [*train, *held_out]) == sorted(tokenised())
    assert all(row.dtype == np.int32 for row in train) and held_out.dtype == np.int32
    other = list(corpus.train_rows(seed=1))
    assert sorted(row.tolist() for row in train) == sorted(row.tolist() for row in other)
    assert not np.array_equal(train, other)


def test_token_ids_of_another_length_or_tokenizer_are_refused(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", tokenised(), "input_ids")
    refuses(source, tokenizer, "holds 16 token ids", "`context: 16`", "line 1", context=32)
    bad = tokenised()
    bad[20][3] = len(tokenizer) + 5
    refuses(write(tmp_path / "b.jsonl", bad, "input_ids"), tokenizer, "line 21", str(len(tokenizer) + 5), "tokenizer")
    bad[20] = [0, -1] + [1] * 14
    refuses(write(tmp_path / "b.jsonl", bad, "input_ids"), tokenizer, "line 21", "-1")
    bad[20] = [0, None] + [1] * 14
    refuses(write(tmp_path / "b.jsonl", bad, "input_ids"), tokenizer, "line 21", "None")
    bad[20] = [0, 1.5] + [1] * 14
    refuses(write(tmp_path / "b.jsonl", bad, "input_ids"), tokenizer, "line 21", "1.5")
    bad[20] = "text"
    refuses(write(tmp_path / "b.jsonl", bad, "input_ids"), tokenizer, "line 21", "is text, not a list of token ids")


def test_text_is_preferred_and_a_column_can_be_named(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    table = [{"text": t, "title": f"{t} again", "input_ids": i} for t, i in zip(TEXTS, tokenised(200), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in table))

    def first(**settings):
        return tokenizer.decode(next(opened(path, tokenizer, **settings).train_rows(seed=0))[1:8])

    assert len({first(), first(text_column="title"), first(text_column="input_ids")}) == 3
    refuses(path, tokenizer, "'titel'", "text, title, input_ids", "Nearest: title", text_column="titel")


def test_the_demo_brings_its_own_split(tokenizer):
    corpus = opened("demo", tokenizer, context=64)
    assert corpus.fingerprint == opened("demo", tokenizer, context=64, held_out=0.5).fingerprint
    held_out = corpus.held_out_rows(20_000)
    first = [row for row, _ in zip(corpus.train_rows(seed=0), range(50), strict=False)]
    assert (held_out[:, 0] == 0).all() and 20_000 <= (held_out != 0).sum() < 20_100
    assert not {row.tobytes() for row in first} & {row.tobytes() for row in held_out}
