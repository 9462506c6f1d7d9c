"""Which files of a folder are the corpus: as the datasets library finds the splits and subsets of a dataset."""

import gzip
import json
import random
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saelab.corpus import CorpusSettings
from saelab.corpus.documents import Lane, Source
from saelab.corpus.sources import open_source
from saelab.errors import SaelabError
from tests.corpus.made import TEXTS

CARD = """---
configs:
- config_name: large
  data_files:
  - split: train
    path: large/train-*
- config_name: small
  data_files:
  - split: train
    path: small/train-*
  - split: test
    path: ["small/test-*"]
---
# A dataset
"""


def lay(folder: Path, *names: str, card: str = "# A dataset\n", downloaded: bool = True) -> Path:
    """Write files with texts that begin with the file's name, a README.md, and what a download leaves beside them."""
    for name in names:
        path, texts = folder / name, [f"{name} {text}" for text in TEXTS[:4]]
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        kind = "".join(path.suffixes[-2:]) if path.suffix in (".gz", ".zst") else path.suffix
        if kind == ".parquet":
            pq.write_table(pa.table({"text": texts}), path)
        elif kind in (".csv", ".tsv"):
            path.write_text("\n".join(["text", *texts]) + "\n")
        elif kind in (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst"):
            packed = {".gz": gzip.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
            path.write_bytes(packed.get(path.suffix, bytes)(lines))
        else:
            path.write_text("\n".join(texts))
    (folder / "README.md").write_text(card)
    if downloaded:
        (folder / "dataset_infos.json").write_text("{}")
        (folder / ".cache" / "huggingface").mkdir(parents=True)
        (folder / ".cache" / "huggingface" / "train.csv").write_text("text\nnot this\n")
    return folder


def opened(folder: Path, split: str = "train", **settings: str) -> Source:
    return open_source(CorpusSettings(str(folder), split=split, **settings))


def read(source: Source) -> set[str]:
    """The names of the files that a source gives texts of."""
    documents = (document.content for document, _ in source.documents(random.Random(0), Lane(), None))
    return {line.split(" ")[0] for content in documents for line in content.splitlines() if line}


LAYOUTS = {
    "csv": ["train.csv", "test.csv"],
    "shards": [
        f"data/{name}.parquet" for name in ("train-00000-of-00002", "train-00001-of-00002", "extra-00000-of-00001")
    ],
    "shards of several subsets": ["a/train-0.parquet", "b/train-0.parquet", "b/dev-0.parquet"],
    "folders": ["train/0.jsonl", "train/1.jsonl", "data/validation/0.jsonl", "other.jsonl"],
    "names": ["train_0.json", "my-dev.json", "eval.json"],
    "compressed": ["c4-train.00000.json.gz", "c4-validation.00000.json.gz"],
    "no split": ["a.csv", "b.csv", "deep/c.csv"],
    "one split": ["train.csv", "extra.csv"],
    "texts": ["train.txt", "valid.txt", "test.txt"],
    "folders of texts": ["train/a.txt", "test/a.txt"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_those_of_the_datasets_library(tmp_path, layout):
    """Each split has the library's texts; a split that the library does not find is refused, and those named."""
    folder = lay(tmp_path / layout, *LAYOUTS[layout])
    patterns = datasets.load_dataset(str(folder), streaming=True)
    assert patterns
    for split, rows in patterns.items():
        assert read(opened(folder, str(split))) == {row["text"].split(" ")[0] for row in rows if row["text"]}
    with pytest.raises(SaelabError, match=r"^corpus: split: .*no_such_split") as error:
        opened(folder, "no_such_split")
    named = str(error.value).partition("its splits are ")[2].rstrip(".").split(", ")
    assert "has no splits" in str(error.value) or sorted(named) == sorted(map(str, patterns))


def test_a_card_names_the_subsets_and_their_splits(tmp_path):
    files = ["large/train-0.parquet", "small/train-0.parquet", "small/test-0.parquet"]
    folder = lay(tmp_path / "a", *files, card=CARD)
    for subset in ("large", "small"):
        for split, rows in datasets.load_dataset(str(folder), subset, streaming=True).items():
            source = opened(folder, str(split), subset=subset)
            assert read(source) == {row["text"].split(" ")[0] for row in rows}
            assert source.identity["split"] == split and source.identity["subset"] == subset
    for settings, message in (
        ({}, "subset: .*set it to one of large, small"),
        ({"subset": "smal"}, "subset: .* has no subset 'smal'; its subsets are large, small. Nearest: small"),
        ({"subset": "large", "split": "test"}, "split: .*subset large.* no split 'test'; its splits are train"),
    ):
        with pytest.raises(SaelabError, match=f"^corpus: {message}"):
            opened(folder, **settings)
    (folder / "small" / "test-0.parquet").unlink()
    with pytest.raises(SaelabError, match=r"split test of 'small', and none of them is there"):
        opened(folder, "test", subset="small")


def test_cards_with_defaults_folders_and_mistakes(tmp_path):
    card = (
        "---\nconfigs:\n- {config_name: en, data_dir: en, default: true}\n- {config_name: de, data_files: 'de/*'}\n---"
    )
    folder = lay(tmp_path / "a", "en/train.csv", "en/test.csv", "de/train.csv", "de/test.csv", card=card)
    assert read(opened(folder)) == {"en/train.csv"} and read(opened(folder, "test")) == {"en/test.csv"}
    assert read(opened(folder, subset="de")) == {"de/train.csv", "de/test.csv"}
    for n, wrong in enumerate(("3", "[a: b", "[{config_name: x, data_files: 3}]", "[{config_name: x, sep: ';'}]")):
        folder = lay(tmp_path / str(n), "a.csv", card=f"---\nconfigs: {wrong}\n---\n")
        with pytest.raises(SaelabError, match=r"README\.md"):
            opened(folder)
    folder = lay(tmp_path / "notes", "a.md", card="---\ntitle: [not yaml\n---\nREADME.md", downloaded=False)
    assert len({*read(opened(folder))}) > 2, "a README.md without configs is a text among texts"


def test_names_in_a_folder_of_texts_are_splits_only_if_they_are_meant_so(tmp_path):
    program = lay(tmp_path / "program", "train.py", "test.py", "test_a.py", "model.py", "deep/a.py", downloaded=False)
    assert len(read(opened(program))) >= 5
    with pytest.raises(SaelabError, match="has no splits"):
        opened(program, "test")
    tests = lay(tmp_path / "tests", "test_a.py", "test_b.py", downloaded=False)
    (tests / "README.md").unlink()
    assert len(read(opened(tests))) >= 2
    book = lay(tmp_path / "book", "one.txt", "test of time.txt", downloaded=False)
    assert {"one.txt", "test"} <= read(opened(book))
    wiki = lay(tmp_path / "wiki", "train.txt", "test.txt", "vocab.txt", downloaded=False)
    assert read(opened(wiki)) == {"train.txt"}
    folders = lay(tmp_path / "folders", "train/a.md", "train/b.md", "test/a.md", downloaded=False)
    (folders / "README.md").unlink()
    assert read(opened(folders)) == {"train/a.md", "train/b.md"}


def test_documentation_is_a_text_only_in_a_folder_of_texts(tmp_path):
    assert "#" in read(opened(lay(tmp_path / "notes", "a.md", "b.md", "package.json", downloaded=False)))
    assert read(opened(lay(tmp_path / "dataset", "a.txt", "loader.py"))) == {"a.txt"}
    card = "---\ntask_categories: [text-generation]\n---\n"
    assert read(opened(lay(tmp_path / "card", "a.txt", card=card, downloaded=False))) == {"a.txt"}
    only = lay(tmp_path / "only", "a.arrow", downloaded=False)
    with pytest.raises(SaelabError, match="has no file that can be read as a corpus"):
        opened(only)
    (only / "a.arrow").unlink()
    assert read(opened(only)) == {"#"}


def test_pointers_of_git_lfs_are_no_data(tmp_path):
    folder = lay(tmp_path / "a", "train.csv", "test.csv")
    (folder / "train.csv").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(SaelabError, match=r"train\.csv is a Git LFS pointer"):
        opened(folder)


def test_split_and_subset_are_part_of_the_identity_and_a_plain_folder_has_none(tmp_path):
    folder = lay(tmp_path / "a", "train.csv", "test.csv")
    assert opened(folder).identity["split"] == "train" != opened(folder, "test").identity["split"]
    (folder / "test.csv").write_bytes((folder / "train.csv").read_bytes())
    assert opened(folder).identity != opened(folder, "test").identity
    assert opened(lay(tmp_path / "b", "a.txt", downloaded=False)).identity.keys() == {"source", "text"}


@pytest.mark.parametrize(
    "names, expected, unread",
    [
        (["data.csv", "LICENSE.txt", "NOTICE.md"], "data.csv", None),
        (["data.json", "config.json", "a.txt"], "data.json", "1 .txt"),
        (["data.json", "a.md", "b.md"], "data.json", "2 .md"),
        (["a.txt", "b.txt", "package.json", "c.md"], "a.txt", "1 .md, 1 .json"),
        (["a.jsonl", "b.parquet", "c.txt", "d.txt"], "b.parquet", "2 .txt, 1 .jsonl"),
        (["a.jsonl", "b.jsonl", "c.parquet"], "a.jsonl", "1 .parquet"),
        (["train.csv", "test.csv", "a.txt", "b.txt", "c.txt"], "train.csv", "3 .txt, 1 .csv"),
        (["train.csv", "test.jsonl"], "train.csv", "1 .jsonl"),
        (["a.jsonl.zst", "b.jsonl.gz"], "a.jsonl.zst", None),
        (["Train.csv", "Test.csv"], "Train.csv", "1 .csv"),
        (["a.parquet", "b.parquet", "eval/results.json"], "a.parquet", "1 .json"),
    ],
)
def test_the_kind_that_is_read_and_a_word_about_the_others(tmp_path, names, expected, unread):
    source = opened(lay(tmp_path / "a", *names))
    assert min(read(source)) == expected
    assert source.about.endswith(f"; not read: {unread})") if unread else "not read" not in source.about


def test_the_folders_name_is_no_pattern(tmp_path):
    assert read(opened(lay(tmp_path / "[a-b] test*", "train.csv", "test.csv"))) == {"train.csv"}


def test_folders_that_are_refused(tmp_path):
    for names, message in (
        (["a.arrow"], "has no file that can be read as a corpus .*1 .arrow"),
        (["LICENSE.txt", "a.tar"], "has no file that can be read as a corpus"),
        (["loads_the_data.py"], "has no file that can be read as a corpus .*1 .py"),
        (["train_test.csv"], "train_test.csv .* is in both splits, train and test"),
        (["dev.csv", "eval.csv"], "no split 'train'; its splits are validation, test"),
    ):
        with pytest.raises(SaelabError, match=message):
            opened(lay(tmp_path / names[0], *names))


@pytest.mark.parametrize("setting", ["split", "subset", "revision", "text_column"])
def test_settings_that_a_source_cannot_honour_are_refused(tmp_path, setting):
    """They would be ignored, and the test split of another source would be trained on."""
    folder = lay(tmp_path / "a", "a.txt", "b.csv", "c.txt")
    saved = tmp_path / "saved"
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": TEXTS[:9]}).save_to_disk(saved)
    sources = ["demo", folder, folder / "a.txt"]
    if setting != "text_column":
        sources += [folder / "b.csv", saved]
    for source in sources:
        with pytest.raises(SaelabError, match=f"^corpus: {setting}: .*remove that setting"):
            open_source(CorpusSettings(str(source), **{setting: "other"}))
