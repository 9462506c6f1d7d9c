"""A cache on disk: names, headers, checksums, the manifest. FORMAT.md in this folder is the reference."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from saelab.errors import SaelabError
from saelab.files import PAGE
from saelab.tensors import DTYPES

FORMAT = "saelab activations"
VERSION = 1
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"
IDENTITY = "identity.json"
BLOCK_TOKENS = 1024
"""Tokens per block: they share a checksum and are read together. 1.5 MB at d_in 768 in bfloat16."""
ORIGIN = ("tokens", "rows", "positions")
"""The tensors that locate each token in the text."""


class Column(NamedTuple):
    """A tensor of the cache: one entry, or one vector, per token."""

    name: str
    dtype: torch.dtype
    width: int | None
    """None for a one-dimensional tensor."""

    @property
    def token_bytes(self) -> int:
        return self.dtype.itemsize * (self.width or 1)

    def shape(self, n: int) -> list[int]:
        return [n] if self.width is None else [n, self.width]


class File(NamedTuple):
    """A kind of file: its folder and suffix, and its tensors."""

    folder: str
    suffix: str
    columns: tuple[Column, ...]

    def path(self, shard: str) -> str:
        return f"{self.folder}/{shard}{self.suffix}"

    def size(self, n: int) -> int:
        """Size in bytes of this file in a shard of n tokens."""
        return len(self.header(n)) + sum(column.token_bytes for column in self.columns) * n

    def header(self, n: int) -> bytes:
        """The bytes before the first tensor."""
        entries, at = {}, 0
        for column in self.columns:
            end = at + column.token_bytes * n
            entries[column.name] = {
                "dtype": DTYPES[column.dtype],
                "shape": column.shape(n),
                "data_offsets": [at, end],
            }
            at = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % PAGE)
        return len(text).to_bytes(8, "little") + text

    def offset(self, column: str, n: int, token: int) -> int:
        """The byte at which `token` of `column` begins."""
        at = len(self.header(n))
        for other in self.columns:
            if other.name == column:
                return at + other.token_bytes * token
            at += other.token_bytes * n
        raise KeyError(column)


TOKENS = File("tokens", ".safetensors", tuple(Column(name, torch.int32, None) for name in ORIGIN))


def activations_file(site: str, d_in: int, dtype: str) -> File:
    return File(site, ".safetensors", (Column("activations", getattr(torch, dtype), d_in),))


def gradients_file(site: str, d_in: int, dtype: str) -> File:
    stored = torch.float32 if dtype == "float32" else torch.bfloat16
    return File(site, ".gradients.safetensors", (Column("gradients", stored, d_in),))


def files_of(identity: Mapping[str, Any]) -> list[File]:
    """All kinds of files in a cache with this identity."""
    files = [TOKENS]
    for site, d_in in identity["sites"].items():
        files.append(activations_file(site, d_in, identity["dtype"]))
        if identity["gradients"]:
            files.append(gradients_file(site, d_in, identity["dtype"]))
    return files


def token_bytes(files: Iterable[File]) -> int:
    """Bytes that a token takes in `files` together."""
    return sum(column.token_bytes for file in files for column in file.columns)


def shard_name(lane: int, index: int) -> str:
    return f"{lane:02d}-{index:05d}"


def spans(n: int, length: int) -> Iterator[tuple[int, int]]:
    """Start and end of each block of `length` tokens in a shard of n."""
    return ((start, min(start + length, n)) for start in range(0, n, length))


DIGITS = 16
"""Hexadecimal digits of a block's checksum."""


def checksum(parts: Iterable[memoryview]) -> str:
    """The checksum of a block: xxh3 (64 bits) of its bytes in each tensor of a file, one after the other."""
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json (FORMAT.md)."""

    identity: dict[str, Any]
    shards: list[dict[str, Any]]
    """The entries of the shards; without `start` in a cache that is open for reading."""

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards)

    def to_bytes(self) -> bytes:
        content = {
            "format": FORMAT,
            "version": VERSION,
            "identity": self.identity,
            **{name: sum(shard[name] for shard in self.shards) for name in ("tokens", "rows", "skipped")},
            "shards": self.shards,
        }
        return with_checksum(content)


_END = b'"\n}\n'
"""The bytes after the checksum, which is the last value."""


def with_checksum(content: Mapping[str, Any]) -> bytes:
    """`content` as a JSON file that ends in its own checksum: sha256 of the same file with an empty checksum."""
    without = json.dumps({**content, "checksum": ""}, indent=1).encode() + b"\n"
    return without.removesuffix(_END) + hashlib.sha256(without).hexdigest().encode() + _END


def is_intact(data: bytes) -> bool:
    """Whether the bytes of a file from `with_checksum` are unchanged."""
    stored = _stored_checksum(data)
    digest = hashlib.sha256(memoryview(data)[: -len(stored) - len(_END)])
    digest.update(_END)
    return digest.hexdigest().encode() == stored and data.endswith(_END)


def _stored_checksum(data: bytes) -> bytes:
    """The checksum at the end of a file from `with_checksum`."""
    return data[-64 - len(_END) : -len(_END)]


def manifest_checksum(folder: Path) -> str:
    """The sha256 stored in the manifest of a finished cache. Raises SaelabError like `read_manifest`."""
    return _stored_checksum(_read(folder)).decode(errors="replace")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished cache. Raises SaelabError if it is missing, damaged or of another version."""
    path = folder / MANIFEST
    data = _read(folder)
    intact = is_intact(data)
    try:
        text = data.decode()
        del data  # a large cache has a manifest of tens of megabytes
        content = json.loads(text)
        del text
    except ValueError as error:
        raise _damaged_manifest(path) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SaelabError(f"{path}: not the manifest of an activation cache; nothing was read")
    if content.get("version") != VERSION:
        raise SaelabError(
            f"{path}: written in version {content.get('version')!r} of the format, but this saelab reads version "
            f"{VERSION}; read it with the saelab that wrote it, or write the cache again elsewhere"
        )
    if not intact:
        raise _damaged_manifest(path)
    return Manifest(content["identity"], content["shards"])


def _read(folder: Path) -> bytes:
    """The bytes of a manifest."""
    try:
        return (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        if (folder / UNFINISHED).is_dir():
            raise SaelabError(f"{folder}: this cache is not finished; `saelab cache` continues it") from None
        raise SaelabError(f"{folder}: no activation cache (`saelab cache CONFIG --out DIR` writes one)") from None
    except NotADirectoryError:
        raise SaelabError(f"{folder}: is a file, but an activation cache is a folder; name another path") from None
    except OSError as error:
        raise SaelabError(f"{folder / MANIFEST}: cannot be read ({error.strerror})") from error


def _damaged_manifest(path: Path) -> SaelabError:
    return SaelabError(
        f"{path}: damaged (it does not match its own checksum); restore it from a backup, or delete the folder and "
        "write the cache again"
    )


def difference(found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> str | None:
    """The first field of `expected` that differs in `found`, with both values in words; None if none differs."""
    for name, value in expected.items():
        there = found.get(name)
        if isinstance(value, Mapping) and isinstance(there, Mapping):
            keys = dict.fromkeys([*value, *there])
            inner = difference(there, {key: value.get(key) for key in keys}, f"{prefix}{name}.")
            if inner is not None:
                return inner
        elif there != value:
            return f"{prefix}{name} {there!r}, not {value!r}"
    return None
