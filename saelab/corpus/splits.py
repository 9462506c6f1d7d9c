"""The splits and subsets of a folder of data files, as the datasets library finds them.

Names decide the split: ``data/SPLIT-00000-of-00001.parquet``, or a folder, or else a file with train, valid, dev, test,
eval or the like in its name. (The library reads small letters only; here Train.csv and Test.csv are two splits, too.)
The dataset's card, README.md, may list subsets, and for each the files of its splits.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from saelab.errors import SaelabError, brief, did_you_mean

Files = dict[str, Path]
"""Files by their names relative to the folder."""
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_WORD = re.compile(r"train|val|dev|test|eval", re.I)
_FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\n---[ \t]*(?:\r?\n|$)", re.S)
_CARD = re.compile(r"^(dataset_info|configs|task_categories|size_categories|annotations_creators) *:", re.M)
_READING = frozenset(
    ("sep", "delimiter", "names", "column_names", "header", "skiprows", "field", "quoting", "quotechar", "escapechar")
)
"""Options of a subset that change how its files are read."""


def named_splits(files: Mapping[str, Path]) -> dict[str, Files]:
    """The splits that the names of `files` say, and their files; none if no name does."""
    splits: dict[str, Files] = {}
    for name, path in files.items():
        shard = _SHARD.fullmatch(name)
        if shard:
            splits.setdefault(shard[1], {})[name] = path
    if splits or not any(map(_WORD.search, files)):
        return splits
    from datasets import data_files

    for patterns in (data_files.DEFAULT_PATTERNS_SPLIT_IN_DIR_NAME, data_files.DEFAULT_PATTERNS_SPLIT_IN_FILENAME):
        every = {str(split): _matching(files, some, re.I) for split, some in patterns.items()}
        splits = {split: matching for split, matching in every.items() if matching}
        if splits:
            break
    return splits


def files_of(splits: Mapping[str, Files], split: str, where: str) -> Files:
    """The files of `split`. Raises SaelabError if `where` has no such split, or if a file is in another one, too."""
    if split not in splits:
        raise SaelabError(
            f"corpus: split: {where} has no split {split!r}; its splits are {', '.join(splits)}."
            + did_you_mean(split, splits)
        )
    for other, files in splits.items():
        twice = files.keys() & splits[split].keys()
        if other != split and twice:
            raise SaelabError(
                f"corpus: split: {min(twice)} in {where} is in both splits, {split} and {other}; rename it, or set "
                "`source` to the file to read"
            )
    return splits[split]


def is_dataset(folder: Path) -> bool:
    """Whether the folder was downloaded from the Hub, or has the card of a dataset."""
    return (
        (folder / ".cache" / "huggingface").is_dir()
        or (folder / "dataset_infos.json").is_file()
        or bool(_CARD.search(_front_matter(folder / "README.md")))
    )


def read_card(folder: Path) -> Mapping[str, Any]:
    """The subsets that a dataset's card lists, by name, as the library's MetadataConfigs; {} if it lists none."""
    card: dict[str, Any] = {}
    for path in (folder / "README.md", folder / ".huggingface.yaml"):
        text = _front_matter(path)
        if re.search(r"^configs *:", text, re.M):
            card |= _checked(path, lambda text=text: dict(yaml.safe_load(text)))
    if not card.get("configs"):
        return {}
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCardData

    return _checked(folder / "README.md", lambda: MetadataConfigs.from_dataset_card_data(DatasetCardData(**card)))


def _front_matter(path: Path) -> str:
    """The YAML at the head of a Markdown file, or all of another file; "" if there is none."""
    text = path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""
    if path.suffix != ".md":
        return text
    match = _FRONT_MATTER.match(text)
    return match[1] if match else ""


def files_of_subset(
    configs: Any, data: Mapping[str, Path], split: str, subset: str | None, where: str
) -> tuple[Files, str]:
    """The files among `data` that the card names for a split of a subset, and the subset; None: the default one.

    Raises SaelabError if there is no such subset or split, or no file of it.
    """
    subsets = {str(name): facts for name, facts in configs.items()}
    subset = subset or _checked(where, configs.get_default_config_name)
    if subset is None or str(subset) not in subsets:
        wrong = f"has no subset {subset!r}; its subsets are" if subset else "has several subsets; set it to one of"
        raise SaelabError(
            f"corpus: subset: {where} {wrong} {', '.join(subsets)}." + did_you_mean(subset or "", subsets)
        )
    facts = subsets[subset := str(subset)]
    options = sorted(facts.keys() & _READING)
    if options:
        raise SaelabError(
            f"corpus: README.md in {where} sets how to read the files of {subset!r} ({', '.join(options)}), and saelab "
            "does not follow that; convert them, to JSON Lines for instance"
        )
    if facts.get("data_dir"):
        below = f"{PurePosixPath(str(facts['data_dir']))}/"
        data = {name.removeprefix(below): path for name, path in data.items() if name.startswith(below)}
    if facts.get("data_files") is None:
        splits = named_splits(data) or {"train": dict(data)}
    else:
        from datasets.data_files import sanitize_patterns

        patterns = _checked(where, lambda: sanitize_patterns(facts["data_files"]))
        splits = {name: _checked(where, lambda some=some: _matching(data, some)) for name, some in patterns.items()}
    files = files_of(splits, split, f"{where}, subset {subset},")
    if not files:
        raise SaelabError(
            f"corpus: README.md in {where} names files for the split {split} of {subset!r}, and none of them is there; "
            "download the dataset again, with all files"
        )
    return files, subset


def _matching(files: Mapping[str, Path], patterns: Iterable[str], flags: re.RegexFlag = re.NOFLAG) -> Files:
    """The files whose names match one of some patterns of the datasets library."""
    from fsspec.utils import glob_translate

    one = re.compile("|".join(glob_translate(PurePosixPath(pattern).as_posix()) for pattern in patterns), flags)
    return {name: path for name, path in files.items() if one.match(name)}


def _checked(path: Path | str, read: Callable[[], Any]) -> Any:
    """What `read` returns. Raises SaelabError if the card at `path` is not one that the library can read."""
    try:
        return read()
    except Exception as error:  # the libraries raise many kinds
        raise SaelabError(f"corpus: {path}: `configs` of the dataset's card cannot be read: {brief(error)}") from error
