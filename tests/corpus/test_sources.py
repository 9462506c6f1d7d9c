"""Which files of a folder are the corpus, and one clear message for every kind of bad corpus."""

import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saelab.corpus import CorpusSettings, files
from saelab.errors import SaelabError, SettingError
from tests.corpus.made import TEXTS, documents, opened, refuses, write


def test_a_folder_is_read_as_the_first_kind_it_holds(tmp_path, tokenizer):
    write(tmp_path / "a.jsonl")
    write(tmp_path / "b.jsonl", [text.upper() for text in TEXTS])
    (tmp_path / "README.md").write_text("not part of the corpus")
    (tmp_path / ".hidden.parquet").write_text("nor this")
    corpus = opened(tmp_path, tokenizer)
    found = documents(list(corpus.train_rows(seed=0))) + documents(corpus.held_out_rows(10**9))
    assert len(found) >= 2 * len(TEXTS) - 2, "the last document of a side is cut off"
    assert {tokenizer.decode(document[:-1]) for document in found} <= {*TEXTS, *(text.upper() for text in TEXTS)}


def test_a_saved_dataset_with_splits(tmp_path, tokenizer):
    datasets.disable_progress_bars()
    splits = {"train": TEXTS[:100], "extra": TEXTS[100:]}
    data = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
    datasets.DatasetDict(data).save_to_disk(tmp_path / "saved")
    found = documents(list(opened(tmp_path / "saved", tokenizer, split="extra").train_rows(seed=0)))
    assert {tokenizer.decode(document[:-1]) for document in found} <= set(TEXTS[100:])
    refuses(tmp_path / "saved", tokenizer, "'extar'", "train, extra", "Nearest: extra", split="extar")


@pytest.mark.parametrize(
    "name, value",
    [
        ("held_out", 0.0),
        ("held_out", 1.0),
        ("source", ""),
        ("split", ""),
        ("text_column", ""),
        ("min_tokens", -1),
        ("max_tokens", 0),
    ],
)
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(SettingError, match=f"^{name}: "):
        CorpusSettings(**{name: value})


def test_limits_of_length_that_exclude_each_other_are_refused():
    with pytest.raises(SettingError, match=r"^max_tokens: 9 is less than min_tokens"):
        CorpusSettings(min_tokens=10, max_tokens=9)
    assert CorpusSettings(min_tokens=10, max_tokens=10).max_tokens == 10


def test_a_context_without_room_is_refused(tokenizer):
    with pytest.raises(SettingError, match=r"^context: 1"):
        opened("demo", tokenizer, context=1)


def test_missing_files_offer_the_nearest(tmp_path, tokenizer):
    write(tmp_path / "book.txt")
    refuses(tmp_path / "bok.txt", tokenizer, "bok.txt", "Nearest: book.txt")
    refuses(tmp_path / "nowhere" / "book", tokenizer, "no file or folder")


def test_files_that_are_not_text(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n" * 2000 + b"\xff\xfe" + b"fine\n" * 2000)
    refuses(path, tokenizer, str(path), "UTF-8", "0xff at byte 10000")
    path.write_bytes(b"fine\n" * 10 + bytes(300))
    refuses(path, tokenizer, str(path), "binary", "byte 50")
    path.write_bytes(b"")
    refuses(path, tokenizer, str(path), "empty")
    path.write_bytes(b" \n" * 500)
    refuses(path, tokenizer, str(path), "no text")
    path.write_text("one short line")
    refuses(path, tokenizer, str(path), "single document")


def test_bad_bytes_in_datasets_are_located(tmp_path, tokenizer):
    for name in ("a.jsonl", "a.csv"):
        path = write(tmp_path / name)
        data = path.read_bytes()
        at = data.index(b"line 150") + 4
        path.write_bytes(data[:at] + b"\xe9" + data[at + 1 :])
        refuses(path, tokenizer, str(path), f"0xe9 at byte {at}")


def test_json_that_does_not_parse(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(files, "PART", 1 << 10)
    path = write(tmp_path / "a.jsonl")
    lines = path.read_text().splitlines()
    lines[120] = '{"text": "no end'
    path.write_text("\n".join(lines))
    refuses(path, tokenizer, f"{path}, line 121", "JSON")
    lines[120] = '"a text alone"'
    path.write_text("\n".join(lines))
    refuses(path, tokenizer, f"{path}, line 121", "text, not an object")
    lines[120] = '{"text": "half \\ud800 a character"}'
    path.write_text("\n".join(lines))
    refuses(path, tokenizer, f"{path}, line 121", "surrogate")
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"},\n {"text": }]')
    refuses(path, tokenizer, f"{path}, line 2", "JSON")
    path.write_text('{\n "text": "an object on its own, over lines"\n}')
    refuses(path, tokenizer, "single document")


@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet", "saved", "a.csv"])
def test_a_missing_text_column_names_those_there_are(tmp_path, tokenizer, kind):
    refuses(write(tmp_path / kind, column="body"), tokenizer, "'text'", "id, body", "`text_column`")


def test_a_row_that_is_not_text(tmp_path, tokenizer):
    for value, what in ((7, "int"), (2.5, "float"), (["a"], "a list"), ({"a": 1}, "an object")):
        refuses(write(tmp_path / "a.jsonl", [*TEXTS[:120], value, "more"]), tokenizer, "line 121", what, "not text")
    for kind in ("a.parquet", "saved"):
        refuses(write(tmp_path / kind, [["a"]] * 9), tokenizer, "row 0", "a list, not text")


def test_shards_with_other_columns(tmp_path, tokenizer):
    folder = tmp_path / "shards"
    folder.mkdir()
    write(folder / "a.parquet")
    write(folder / "b.parquet", column="body")
    refuses(folder, tokenizer, "b.parquet, row 0", "'text'", "id, body")


def test_parquet_with_a_damaged_name_of_a_column(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS, "source": TEXTS}), path)
    content = path.read_bytes()
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    path.write_bytes(content[:footer] + content[footer:].replace(b"source", b"sou\xfcce"))
    refuses(path, tokenizer, "a.parquet", "not a readable Parquet file", "utf-8")


def test_damaged_parquet(tmp_path, tokenizer):
    path = write(tmp_path / "a.parquet")
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    refuses(path, tokenizer, str(path), "Parquet")
    path.write_bytes(data[:100] + bytes(len(data) // 2) + data[100 + len(data) // 2 :])
    refuses(path, tokenizer, str(path), "damaged")


def test_arrow_files_whose_text_is_not_utf8(tmp_path, tokenizer):
    texts = pa.array([text.encode() for text in TEXTS] + [b"half of a \xc3"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    refuses(tmp_path / "a.parquet", tokenizer, "a.parquet", "damaged", "utf-8")
    datasets.Dataset(pa.table({"text": texts})).save_to_disk(tmp_path / "saved")
    refuses(tmp_path / "saved", tokenizer, "saved", "damaged", "utf-8")


def test_datasets_without_rows(tmp_path, tokenizer):
    for name, text in (("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "id,text\n")):
        (tmp_path / name).write_text(text)
        refuses(tmp_path / name, tokenizer, name, "no rows")
    refuses(write(tmp_path / "b.jsonl", ["", " \n"]), tokenizer, "no text")
    refuses(write(tmp_path / "b.jsonl", ["the same"] * 9), tokenizer, "same one repeated")


def test_folders_without_a_corpus(tmp_path, tokenizer):
    refuses(tmp_path, tokenizer, "it is empty")
    (tmp_path / "a.pkl").write_bytes(b"x")
    refuses(tmp_path, tokenizer, "1 .pkl", ".parquet")
    (tmp_path / "state.json").write_text("{}")
    refuses(tmp_path, tokenizer, "saved dataset")


def test_too_little_text_for_the_context(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", TEXTS[:5])
    refuses(source, tokenizer, "does not fill one row of 5000 tokens", "context", context=5000)
    with pytest.raises(SaelabError, match=r"held-out text .* does not fill one row"):
        opened(source, tokenizer, context=300).held_out_rows(1)


def test_files_that_cannot_be_read(tmp_path, tokenizer):
    folder = write(tmp_path / "folder")
    corpus = opened(folder, tokenizer)
    (folder / "8.txt").unlink()
    with pytest.raises(SaelabError, match=r"8\.txt cannot be read: No such file"):
        list(corpus.train_rows(seed=0))
    for target in ("nowhere", "8.txt"):
        (folder / "8.txt").symlink_to(target)
        refuses(folder, tokenizer, "8.txt", "cannot be read")
        (folder / "8.txt").unlink()
    refuses("x" * 300, tokenizer, "File name too long")
    refuses("https://example.org/a.txt", tokenizer, "is a URL; download it")
    for suffix, junk in (("gz", b"junk"), ("zst", b"junk"), ("xz", b"junk"), ("bz2", b"junk")):
        (tmp_path / f"a.jsonl.{suffix}").write_bytes(junk)
        refuses(tmp_path / f"a.jsonl.{suffix}", tokenizer, f"a.jsonl.{suffix} cannot be read: ")
    (tmp_path / "a.txt.gz").write_bytes(b"junk")
    refuses(tmp_path / "a.txt.gz", tokenizer, "decompress it")


def test_a_folder_without_permission(tmp_path, tokenizer, monkeypatch):
    """It is named; without it the corpus would be another one."""
    folder = write(tmp_path / "folder")
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    refuses(folder, tokenizer, "deep cannot be read: Permission denied")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_and_devices_are_not_waited_for(tmp_path, tokenizer):
    folder = write(tmp_path / "folder")
    os.mkfifo(folder / "pipe.txt")
    for source in (folder, folder / "pipe.txt", os.devnull):
        refuses(source, tokenizer, "is a pipe, a socket or a device; ", "copy it to a file")


def test_links_are_followed_once(tmp_path, tokenizer):
    folder = write(tmp_path / "folder", TEXTS[:6])
    fingerprint = opened(folder, tokenizer).fingerprint
    (folder / "again").symlink_to(folder)
    (folder / "deep" / "above").symlink_to(tmp_path)
    assert opened(folder, tokenizer).fingerprint == fingerprint
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "one").symlink_to(folder)
    (elsewhere / "two").symlink_to(folder)
    assert opened(elsewhere, tokenizer).about.endswith(": 6 .txt)")


@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt"])
def test_a_file_that_changes_while_it_is_read(tmp_path, tokenizer, kind):
    path = write(tmp_path / kind)
    data = path.read_bytes()
    for changed in (data[: len(data) // 2], data + data):
        path.write_bytes(data)
        corpus = opened(path, tokenizer)
        path.write_bytes(changed)
        with pytest.raises(SaelabError, match=f"{kind} changed while it was read: it had {len(data):,} bytes and now"):
            list(corpus.train_rows(seed=0))


def test_names_that_are_not_utf8(tmp_path, tokenizer):
    """Files are read, and messages can be printed and written; the name of the corpus itself must fit into a YAML."""
    folder = os.fsencode(write(tmp_path / "folder"))
    for name in (b"caf\xe9.txt", b"\xff.txt"):
        with open(folder + b"/" + name, "wb") as file:
            file.write(TEXTS[0].encode())
    rows = opened(os.fsdecode(folder), tokenizer)
    assert len(list(rows.train_rows(seed=0))) and rows.about.endswith(": 202 .txt)")
    parquet = write(tmp_path / "a.parquet")
    os.rename(parquet, os.fsencode(tmp_path) + b"/\xe9.parquet")
    assert "1 .parquet" in opened(tmp_path, tokenizer).about
    with pytest.raises(SettingError, match=r"^source: 'a\\udce9' is not UTF-8"):
        CorpusSettings(os.fsdecode(b"a\xe9"))
