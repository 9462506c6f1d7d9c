"""Which peer wrote the files of a folder, by the names of the tensors in them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from saelab.errors import SaelabError, did_you_mean, printable
from saelab.sae.interop import (
    dictionary_learning,
    gemma_scope,
    goodfire,
    llama_scope,
    openai,
    qwen_scope,
    saelens,
    sparsify,
)
from saelab.sae.interop.stored import Stored, open_file
from saelab.sae.layout import FOLDER, WEIGHTS
from saelab.sae.model import SparseAutoencoder

USUAL = (
    WEIGHTS,
    "sae.safetensors",
    "params.npz",
    "params.safetensors",
    "checkpoints/final.safetensors",
    "ae.pt",
)
"""Names that peers give to files of weights, in the folder of an autoencoder."""
SUFFIXES = (".safetensors", ".npz", ".pt", ".pth")
"""What names of files of weights end in."""
_DEEPEST = 3
"""Levels of folders in which autoencoders are looked for, to name them."""


class Peer(NamedTuple):
    """A trainer whose checkpoints can be loaded."""

    name: str
    suffix: str
    marks: tuple[set[str], ...]
    """Sets of names of tensors, one of which its files have."""
    read: Callable[[Stored], SparseAutoencoder]
    lacks: frozenset[str] = frozenset()
    """Names of tensors that its files do not have."""

    def wrote(self, stored: Stored) -> bool:
        """Whether the file is one of this peer."""
        names = set(stored.kinds)
        if isinstance(backup := stored.other.get("ae"), dict):
            names |= {str(name) for name in backup}
        suffix = stored.path.suffix if stored.path.suffix in (".safetensors", ".npz") else ".pt"
        return suffix == self.suffix and any(mark <= names for mark in self.marks) and not self.lacks & names


PEERS = (
    Peer(saelens.NAME, saelens.SUFFIX, saelens.MARKS, saelens.read),
    Peer(llama_scope.NAME, llama_scope.SUFFIX, llama_scope.MARKS, llama_scope.read),
    Peer(sparsify.NAME, sparsify.SUFFIX, sparsify.MARKS, sparsify.read),
    Peer(gemma_scope.NAME, ".npz", gemma_scope.MARKS, gemma_scope.read),
    Peer(gemma_scope.NAME, ".safetensors", gemma_scope.MARKS_2, gemma_scope.read),
    Peer(openai.NAME, openai.SUFFIX, openai.MARKS, openai.read),
    Peer(qwen_scope.NAME, qwen_scope.SUFFIX, qwen_scope.MARKS, qwen_scope.read, qwen_scope.LACKS),
    Peer(goodfire.NAME, goodfire.SUFFIX, goodfire.MARKS, goodfire.read),
    Peer(dictionary_learning.NAME, dictionary_learning.SUFFIX, dictionary_learning.MARKS, dictionary_learning.read),
)
"""In the order in which they are tried: a later one may have tensors of the same names as an earlier one."""


def find(path: Path) -> tuple[Peer, Stored]:
    """The file of weights that `path` is, or that is in the folder `path`, and the peer that wrote it.

    Raises SaelabError, which says what is there, if there is none, or more than one.
    """
    if path.is_file():
        stored = open_file(path)
        return _peer(stored), stored
    if not path.is_dir():
        raise SaelabError(f"{path}: no checkpoint here: there is no such file or folder{_beside(path)}")
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    usual = [path / name for name in USUAL if (path / name).is_file()]
    if len(usual) == 1:
        stored = open_file(usual[0])
        return _peer(stored), stored
    if len(usual) > 1:
        raise SaelabError(f"{path}: holds several checkpoints: {_listed(usual)}; load one of them, by its file")
    readable, why = _readable(files)
    if len(readable) == 1:
        return readable[0]
    if readable:
        found = [stored.path for _, stored in readable]
        raise SaelabError(f"{path}: holds several checkpoints: {_listed(found)}; load one of them, by its file")
    raise SaelabError(f"{path}: no checkpoint here: {_content(path, files, why)}")


def _readable(files: list[Path]) -> tuple[list[tuple[Peer, Stored]], str]:
    """The files that a peer wrote; and why another cannot be read, "" if all can."""
    readable, why = [], ""
    for file in files:
        try:
            stored = open_file(file)
        except SaelabError as error:
            why = str(error)
            continue
        readable += [(peer, stored) for peer in PEERS if peer.wrote(stored)][:1]
    return readable, why


def _peer(stored: Stored) -> Peer:
    for peer in PEERS:
        if peer.wrote(stored):
            return peer
    others = f"; and {', '.join(sorted(map(printable, stored.other)))[:200]}" if stored.other else ""
    names = ", ".join(dict.fromkeys(peer.name for peer in PEERS))
    raise SaelabError(f"{stored.path}: no autoencoder of {names}: it has {stored.found()}{others}")


def _content(path: Path, files: list[Path], why: str) -> str:
    """What is in a folder without a checkpoint, in words."""
    inside = _inside(path)
    if inside:
        names = [str(folder.relative_to(path)) for folder in inside]
        return f"{len(names)} are in its folders: {_listed(names)}; load one, such as {path / names[0]}"
    if why:
        return why
    if files:
        return f"none of {_listed(files)} has tensors of an autoencoder"
    names = sorted(file.name for file in path.iterdir())
    return (
        f"no file of weights ({', '.join(USUAL)}) among {_listed(names) or 'no files'}; give a run folder, its sae/ "
        "folder, or the folder of another trainer's checkpoint"
    )


def _beside(path: Path) -> str:
    """The checkpoints and runs that are beside a path that does not exist, in words."""
    inside = _inside(path.parent, 2) if path.parent.is_dir() else []
    names = [str(folder.relative_to(path.parent)).removesuffix(f"/{FOLDER}") for folder in inside]
    names = [name for name in names if "/" not in name]
    if not names:
        return ""
    return f"; {path.parent} has {_listed(names)}.{did_you_mean(path.name, names)}"


def _inside(path: Path, depth: int = _DEEPEST) -> list[Path]:
    """The folders in `path` that hold weights under a usual name, in natural order; links are not followed."""
    found = []
    try:
        with os.scandir(path) as entries:
            folders = [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:  # a folder that may not be read holds nothing for this user
        return []
    for folder in sorted(folders, key=_natural):
        if any(os.path.isfile(folder / name) for name in USUAL):  # False if it may not be looked into
            found.append(folder)
        elif depth > 1:
            found += _inside(folder, depth - 1)
    return found


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    parts = path.name.replace("_", ".").split(".")
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _listed(names: list[Path] | list[str]) -> str:
    shown = [printable(name.name if isinstance(name, Path) else name) for name in names]
    return ", ".join(shown[:10]) + (f" and {len(shown) - 10} more" if len(shown) > 10 else "")
