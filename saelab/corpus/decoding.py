"""Bytes and text of local files: decompressed, checked to be UTF-8, and checked not to change while they are read."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from saelab.errors import SaelabError, brief

_T = TypeVar("_T")


def _open_zstd(path: Path) -> BinaryIO:
    import pyarrow as pa

    stream: Any = pa.CompressedInputStream(path.open("rb"), "zstd")
    return cast(BinaryIO, io.BufferedReader(stream))


_COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_FORMATS = "a corpus is UTF-8 text, or JSON Lines, JSON, CSV, TSV or Parquet with the usual suffix"


def is_compressed(path: Path) -> bool:
    """Whether the suffix says so."""
    return path.suffix.lower() in _COMPRESSED


def open_binary(path: Path) -> BinaryIO:
    """The file, decompressed if its suffix is .gz, .bz2, .xz or .zst."""
    return _COMPRESSED.get(path.suffix.lower(), lambda path: path.open("rb"))(path)


def decode(data: bytes, path: Path, at: int) -> str:
    """`data`, read at byte `at` of `path`, as text. Raises SaelabError if it is not UTF-8."""
    encoding = _BYTE_ORDER_MARKS.get(data[:2]) if at == 0 else None
    if encoding is not None:
        raise SaelabError(
            f"corpus: {path} is {encoding} text; convert it: `iconv -f {encoding} -t UTF-8 {path.name} > NEW_FILE`"
        )
    zero = data.find(b"\0")
    if zero >= 0:
        raise SaelabError(
            f"corpus: {path} is a binary file, or damaged, or UTF-16 (it has a zero at byte {at + zero}); {_FORMATS}"
        )
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise SaelabError(
            f"corpus: {path} is not UTF-8 text: 0x{data[error.start]:02x} at byte {at + error.start}; {_FORMATS} "
            "(`iconv` converts from other encodings)"
        ) from error
    return text.removeprefix("\ufeff") if at == 0 else text


def text_lines(file: BinaryIO, path: Path) -> Iterator[str]:
    """The lines of `file`, each with its line end. Only a line feed ends a line."""
    at = 0
    for line in file:
        yield decode(line, path, at)
        at += len(line)


def unchanged(path: Path, size: int, read: Callable[..., Iterable[_T]], *arguments: Any) -> Iterator[_T]:
    """What ``read(*arguments)`` yields from the file at `path`.

    Raises SaelabError if the file cannot be read, or if it no longer has `size` bytes, before or after reading: its
    parts were found when it had, and the corpus is identified by what was in it then.
    """

    def check() -> None:
        now = path.stat().st_size
        if now != size:
            raise SaelabError(
                f"corpus: {path} changed while it was read: it had {size:,} bytes and now has {now:,}; start again "
                "when nothing writes to it"
            )

    try:
        check()
        try:
            yield from read(*arguments)
        except SaelabError:
            check()  # a changed file may not parse: report the cause
            raise
        check()
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or brief(error)
        raise SaelabError(f"corpus: {path} cannot be read: {reason}") from error
