"""The demo's corpus: the standard library of the Python that runs saelab.

This is real text that every machine with Python already has: the library's source files and the topics that ``help()``
prints. Nothing is downloaded. The split into training and held-out text is by file, so that neighbouring sentences are
on the same side. Held-out files that are mostly copies of training files are dropped.
"""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saelab.errors import SaelabError

HELD_OUT_SHARE = 0.20
"""Share of the files that are held out. 20% of the library without its tests is more than the 300 k tokens needed to
report dead features."""

NGRAM = 13
MAX_SHARED = 0.20
"""A held-out file is dropped if training files contain more than this share of its 13-grams."""

_SKIP_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings"}  # encodings/ holds generated tables
_TEST_FOLDERS = {"test", "tests", "idle_test"}
_LEXEME = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class StdlibText:
    """The library's texts by name (path relative to the library, or ``pydoc_data/topics/NAME``), split in two."""

    train: dict[str, str]
    held_out: dict[str, str]
    dropped: dict[str, float]
    """Held-out files that were dropped as near-copies, with the share of their 13-grams in training files."""


def read_stdlib(folder: Path | None = None, *, tests: bool = False) -> StdlibText:
    """The texts of the standard library in `folder` (default: the running interpreter's), split in two.

    With `tests`, the library's own tests join the training texts if they are installed; they are never held out. The
    demo language model was trained with them; SAEs are trained without.

    Raises SaelabError if the folder has too little source text to split, as with a zipped standard library.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for name, text, is_test in _texts(folder):
        if is_test and not tests:
            continue
        (held_out if not is_test and _is_held_out(name) else train)[name] = text
    shared = _shared_ngrams(train, held_out)
    dropped = {name: share for name, share in shared.items() if share > MAX_SHARED}
    held_out = {name: text for name, text in held_out.items() if name not in dropped}
    if not train or not held_out:
        raise SaelabError(
            f"The demo corpus is the source of the Python standard library, but {folder} has too little to split "
            f"({len(train)} files to train on, {len(held_out)} held out); the library may be zipped or stripped. Use a "
            "full Python installation, or another corpus (a folder, a text file, a Hub dataset)."
        )
    return StdlibText(train, held_out, dropped)


def _texts(folder: Path) -> Iterator[tuple[str, str, bool]]:
    seen: set[bytes] = set()  # each text once: a library has a few identical files
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if _SKIP_FOLDERS & set(relative.parts) or relative.name.startswith("_sysconfigdata"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, PermissionError):
            continue  # a few test files are deliberately not UTF-8
        digest = hashlib.sha256(text.encode()).digest()
        if not text.strip() or digest in seen or relative.as_posix() == "pydoc_data/topics.py":
            continue
        seen.add(digest)
        yield relative.as_posix(), text, bool(_TEST_FOLDERS & set(relative.parts))
    for topic, text in _topics(folder).items():
        yield f"pydoc_data/topics/{topic}", text, False


def _topics(folder: Path) -> dict[str, str]:
    """The pydoc topics of `folder`, parsed as a literal: the file is not executed."""
    path = folder / "pydoc_data" / "topics.py"
    if not path.is_file():
        return {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "topics":
            return dict(sorted(ast.literal_eval(node.value).items()))
    return {}


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < HELD_OUT_SHARE * 2**32


def _ngram_hashes(text: str) -> np.ndarray:
    """One 64-bit hash per run of 13 lexemes (words and punctuation marks)."""
    lexemes = np.array([hash(lexeme) for lexeme in _LEXEME.findall(text)], dtype=np.int64).astype(np.uint64)
    n = len(lexemes) - NGRAM + 1
    if n <= 0:
        return np.empty(0, dtype=np.uint64)
    hashes = np.zeros(n, dtype=np.uint64)
    for offset in range(NGRAM):  # polynomial hash modulo 2**64; overflow is intended
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + lexemes[offset : offset + n]
    return hashes


def _shared_ngrams(train: dict[str, str], held_out: dict[str, str]) -> dict[str, float]:
    """For each held-out text, the share of its 13-grams that occur in any training text (0 if it has no 13-gram)."""
    if not train:
        return dict.fromkeys(held_out, 0.0)
    known = np.sort(np.concatenate([_ngram_hashes(text) for text in train.values()]))
    shares = {}
    for name, text in held_out.items():
        grams = _ngram_hashes(text)
        nearest = np.minimum(np.searchsorted(known, grams), len(known) - 1)
        shares[name] = float((known[nearest] == grams).mean()) if len(grams) else 0.0
    return shares
