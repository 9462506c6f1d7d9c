"""Which files of a local folder are the corpus: those of one kind and, if the folder has splits or subsets (splits.py),
of one of each.

In a folder of texts, names are often not meant as splits (``test_x.py`` of a program). There they count only if .txt
files are named for train and another split, or if every file is in one of several splits; else the corpus is all texts.
But in a dataset from the Hub only .txt files are texts, as for the library; its scripts and README.md are not.

Names that begin with a dot, and `__pycache__`, are skipped. A link to a folder elsewhere is followed.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from saelab.corpus.decoding import is_compressed
from saelab.corpus.files import kind_of
from saelab.corpus.splits import Files, files_of, files_of_subset, is_dataset, named_splits, read_card
from saelab.errors import SaelabError

TEXT = frozenset(
    "." + name
    for names in (
        "txt text md markdown rst adoc org tex htm html xml",
        "py pyi c h cc cpp hpp cu rs go java kt scala js jsx ts tsx cs swift rb php pl lua jl r hs ml sh sql el lisp",
    )
    for name in names.split()
)
"""Suffixes of text files in a folder."""
TXT = frozenset({".txt"})
"""Those that the datasets library reads."""
KINDS = [
    frozenset({".parquet"}),
    frozenset({".jsonl", ".ndjson"}),
    frozenset({".json"}),
    frozenset({".csv", ".tsv"}),
    TEXT,
]
SUFFIXES = frozenset().union(*KINDS)
_ABOUT_DATA = frozenset({"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"})
"""Files that the datasets library does not take for data either."""
_DOCUMENTATION = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|authors|contributing|changelog|code_of_conduct|security)\b.*", re.I
)


class Chosen(NamedTuple):
    """The files of a folder that are the corpus."""

    files: Files
    """Sorted by name, all of one kind."""
    named: dict[str, str]
    """The split and the subset, if the folder has any."""
    about: str
    """A description for messages."""


def choose_files(folder: Path, split: str, subset: str | None) -> Chosen:
    """The files of `folder` in `split` and `subset`.

    Raises SaelabError if there are none, if the folder has no such split or subset, or if it has several subsets and
    none is given.
    """
    found = _files_below(folder)
    configs = read_card(folder)
    if configs:
        data = {name: path for name, path in found.items() if not _is_documentation(path)}
        files, subset = files_of_subset(configs, data, split, subset, str(folder))
        return _chosen(folder, found, _of_kind(files, _choose_kind(files)), {"split": split, "subset": subset})
    if subset is not None:
        raise SaelabError(
            f"corpus: subset: {folder} has no subsets (no README.md with `configs`); remove that setting, or set "
            "`source` to the folder of the subset"
        )
    data, of_names = found, _text_splits
    if is_dataset(folder):
        data, of_names = _of_kind(found, SUFFIXES - TEXT | TXT), named_splits
        data = {name: path for name, path in data.items() if not _is_documentation(path)}
    kind = _choose_kind(data)
    files = _of_kind(data, kind)
    splits = of_names(files) if kind is TEXT else named_splits(files)
    if splits and split not in splits and kind is not TEXT:  # it may be of another kind
        every = named_splits(_of_kind(data, SUFFIXES - TEXT))
        splits |= {name: _of_kind(some, _choose_kind(some)) for name, some in every.items() if name not in splits}
    if splits:
        return _chosen(folder, found, files_of(splits, split, str(folder)), {"split": split})
    if split != "train" and files:
        raise SaelabError(f"corpus: split: {folder} has no splits, so there is no {split!r}; remove that setting")
    return _chosen(folder, found, files, {})


def _files_below(folder: Path) -> Files:
    """All files below `folder`, sorted."""
    found: list[Path] = []
    root, followed = Path(os.path.realpath(folder)), set[Path]()

    def refuse(error: OSError) -> None:
        raise error

    def is_entered(path: Path) -> bool:
        if path.name.startswith(".") or path.name == "__pycache__":
            return False
        if not path.is_symlink():
            return True
        target = Path(os.path.realpath(path))
        new = target not in followed and not target.is_relative_to(root) and not root.is_relative_to(target)
        followed.add(target)
        return new

    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in sorted(folders) if is_entered(Path(parent, name))]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


def _choose_kind(files: Mapping[str, Path]) -> frozenset[str]:
    """The kind of files to read.

    It is one of rows whose names say train and another split, else Parquet or JSON Lines, else the kind with most
    files, and in a tie the first in `KINDS`: a folder of texts may have some JSON or CSV beside them. Files about the
    data, such as README.md and config.json, do not count.
    """

    def rank(kind: frozenset[str]) -> tuple[bool, bool, bool, bool, int]:
        some = _of_kind(files, kind)
        data = {name: path for name, path in some.items() if not _is_documentation(path)}
        splits = {} if kind is TEXT else named_splits(data)
        first = bool(kind & {".parquet", ".jsonl"})
        return bool(data), bool(some), "train" in splits and len(splits) > 1, first, len(data)

    return max(KINDS, key=rank)


def _of_kind(files: Mapping[str, Path], kind: frozenset[str]) -> Files:
    return {name: path for name, path in files.items() if kind_of(path) in kind and path.name not in _ABOUT_DATA}


def _is_documentation(path: Path) -> bool:
    return kind_of(path) in TEXT and bool(_DOCUMENTATION.fullmatch(path.name))


def _text_splits(files: Files) -> dict[str, Files]:
    """The splits of a folder of texts; none if its names are not meant as splits."""
    plain = _of_kind(files, TXT)
    splits = named_splits(plain)
    if "train" in splits and len(splits) > 1:
        return splits
    splits = named_splits(files)
    meant = len(plain) == len(files) or ("train" in splits and len(splits) > 1)
    return splits if meant and files.keys() == {name for some in splits.values() for name in some} else {}


def _chosen(folder: Path, found: Files, files: Files, named: dict[str, str]) -> Chosen:
    """`files` as the result. Raises SaelabError if they are no corpus."""
    others = [path for name, path in found.items() if name not in files and path.name not in _ABOUT_DATA]
    if not files or (others and all(map(_is_documentation, files.values()))):
        raise SaelabError(
            f"corpus: {folder} has no file that can be read as a corpus ({_counted(found.values()) or 'it is empty'}); "
            "a corpus is .parquet, .jsonl, .json, .csv or .tsv files, or texts such as .txt and .md"
        )
    names = "".join(f", {name} {value}" for name, value in named.items())
    unread = _counted(path for path in others if kind_of(path) in SUFFIXES and not _is_documentation(path))
    about = f"{folder} (files found below it{names}: {_counted(files.values())}" + (
        f"; not read: {unread})" if unread else ")"
    )
    return Chosen(files, named, about)


def _counted(paths: Iterable[Path]) -> str:
    """How many files there are with each suffix, the most frequent first."""
    counts = Counter("".join(path.suffixes[-2:] if is_compressed(path) else path.suffixes[-1:]) for path in paths)
    return ", ".join(f"{n} {suffix or 'without a suffix'}" for suffix, n in counts.most_common(5))
