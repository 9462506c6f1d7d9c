"""The facts of a feature database: token ids and every activation, by feature and by token, mapped from disk.

`open_facts` checks sizes and reads nothing else; a question reads only its own entries. Needs only numpy. FORMAT.md
says how exact values are: to 2^-11 of an activation, except below 2^-14 of the feature's maximum.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saelab.errors import SaelabError
from saelab.features.layout import DTYPES, FACTS, FORMAT, MANIFEST, VERSION, shapes
from saelab.files import read_json, translate_read_errors

_SIZES = ("rows", "context", "n_features", "entries")


class Activations(NamedTuple):
    """The activations of a feature."""

    places: np.ndarray
    """row * context + position in the row, ``[n]`` int32, rising."""
    values: np.ndarray
    """``[n]`` float32"""


class ActiveFeatures(NamedTuple):
    """The features that are active on a token."""

    features: np.ndarray
    """``[n]`` int32, rising."""
    values: np.ndarray
    """Their activations, ``[n]`` float32."""


@dataclass(frozen=True, eq=False)
class Example:
    """An activation of a feature, with a window of text around it."""

    row: int
    position: int
    """Position of the activation in its row."""
    activation: float
    index: int
    """Index of the activation in the window."""
    token_ids: np.ndarray
    """``[window]`` int32"""
    activations: np.ndarray
    """Activation of the feature on each token of the window, ``[window]`` float32; 0 if inactive."""


@dataclass(frozen=True, eq=False)
class Facts:
    """An open database; `open_facts` makes it. Its methods raise SaelabError if a file turns out to be damaged."""

    folder: Path
    """The folder of the feature database, `features` in a run folder."""
    n_tokens: int
    """N: ordinary tokens, of which densities are fractions."""
    _arrays: dict[str, np.ndarray]
    _checksums: dict[str, str]

    @property
    def rows(self) -> np.ndarray:
        """Token ids ``[rows, context]`` int32."""
        return self._arrays["tokens"]

    @property
    def maxima(self) -> np.ndarray:
        """Largest activation of each feature, ``[n_features]`` float32; 0 if it is never active."""
        return self._arrays["by_feature.maxima"]

    @property
    def n_features(self) -> int:
        return len(self.maxima)

    def activations(self, feature: int) -> Activations:
        """All activations of a feature. Raises SaelabError if there is no such feature."""
        if not 0 <= feature < self.n_features:
            raise SaelabError(
                f"There is no feature {feature} in {self.folder}: its features are 0 to {self.n_features - 1}."
            )
        places, values = self._entries("by_feature", "places", feature, self.rows.size)
        return Activations(places, values.astype(np.float32) * self.maxima[feature])

    def at(self, row: int, position: int) -> ActiveFeatures:
        """The features that are active on a token; special tokens have none.

        Raises SaelabError if there is no such row or position.
        """
        n, context = self.rows.shape
        if not (0 <= row < n and 0 <= position < context):
            raise SaelabError(
                f"There is no place {row}, {position} in {self.folder}: its rows are 0 to {n - 1}, of {context} tokens."
            )
        features, values = self._entries("by_token", "features", row * context + position, self.n_features)
        return ActiveFeatures(features, values.astype(np.float32) * self.maxima[features])

    def examples(self, feature: int, low: float, high: float, n: int, window: int = 32) -> list[Example]:
        """At most n activations of a feature from `low` up to `high`, both included, drawn at random; strongest first.

        The draw is the same every time, and a larger n adds to it. Raises SaelabError if there is no such feature.
        """
        places, values = self.activations(feature)
        inside = np.flatnonzero((values >= low) & (values <= high))
        drawn = inside[np.argsort(_shuffled(places[inside], feature), kind="stable")[:n]]
        drawn = drawn[np.lexsort((drawn, -values[drawn]))]
        return [self._example(places, values, entry, window) for entry in drawn.tolist()]

    def verify(self) -> None:
        """Raises SaelabError if a file differs from its sha256 in the manifest. Reads all files."""
        for name, checksum in self._checksums.items():
            path = self.folder / FACTS / f"{name}.npy"
            reading = translate_read_errors(path, "an array of the feature database", _remake(self.folder))
            with reading, path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != checksum:
                raise self._damaged(name, "does not match its sha256")

    def _example(self, places: np.ndarray, values: np.ndarray, entry: int, window: int) -> Example:
        context = self.rows.shape[1]
        window = min(window, context)
        row, position = divmod(int(places[entry]), context)
        start = min(max(0, position - window * 2 // 3), context - window)  # text before a peak explains more
        shown = row * context + start
        first, stop = np.searchsorted(places, [shown, shown + window])
        activations = np.zeros(window, np.float32)
        activations[places[first:stop] - shown] = values[first:stop]
        token_ids = np.array(self.rows[row, start : start + window])
        return Example(row, position, float(values[entry]), position - start, token_ids, activations)

    def _entries(self, order: str, of: str, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices and values of the entries from ``offsets[index]`` up to ``offsets[index + 1]``.

        Raises SaelabError unless the indices rise and are below `size`.
        """
        first, stop = self._arrays[f"{order}.offsets"][index : index + 2].tolist()
        indices, values = (np.asarray(self._arrays[f"{order}.{name}"]) for name in (of, "values"))
        if not 0 <= first <= stop <= len(values):
            raise self._damaged(f"{order}.offsets", "does not rise from 0 to the number of entries")
        indices = indices[first:stop]
        if len(indices) and not (indices[0] >= 0 and indices[-1] < size and (np.diff(indices) > 0).all()):
            raise self._damaged(f"{order}.{of}", f"does not rise within 0 to {size - 1}")
        return indices, values[first:stop]

    def _damaged(self, name: str, what: str) -> SaelabError:
        return SaelabError(f"{self.folder / FACTS / name}.npy is damaged: it {what}. {_remake(self.folder)}")


def open_facts(folder: Path | str) -> Facts:
    """The facts of the feature database in `folder`, `features` in a run folder.

    Raises SaelabError if they are missing, damaged or of another version.
    """
    folder, path = Path(folder), Path(folder) / FACTS / MANIFEST
    if not path.is_file():
        raise SaelabError(
            f"{folder} has no {FACTS} ({path.name} is missing). `saelab index {folder.parent}` makes them."
        )
    manifest = read_json(path, _remake(folder))
    if manifest.get("format") != FORMAT:
        raise SaelabError(f"{path} is not the manifest of a feature database. {_remake(folder)}")
    if manifest.get("version") != VERSION:
        raise SaelabError(
            f"{path}: written in version {manifest.get('version')!r} of the format, and this saelab reads version "
            f"{VERSION}. {_remake(folder)}"
        )
    try:
        expected = shapes(*(int(manifest[size]) for size in _SIZES))
        n_tokens, files = int(manifest["n_tokens"]), {name: manifest["files"][f"{name}.npy"] for name in DTYPES}
        lengths = {name: int(file["bytes"]) for name, file in files.items()}
        checksums = {name: str(file["sha256"]) for name, file in files.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise SaelabError(f"{path} is not a whole manifest: {error!r}. {_remake(folder)}") from error
    arrays = {name: _map(folder, name, expected[name], lengths[name]) for name in DTYPES}
    return Facts(folder, n_tokens, arrays, checksums)


def _map(folder: Path, name: str, shape: tuple[int, ...], length: int) -> np.ndarray:
    """The array in a file, mapped into memory. Raises SaelabError if it is not of this shape and length."""
    path = folder / FACTS / f"{name}.npy"
    with translate_read_errors(path, "an array of the feature database", _remake(folder)):
        if path.stat().st_size != length:
            raise ValueError(f"it has {path.stat().st_size:,} bytes instead of {length:,}")
        found = np.lib.format.open_memmap(path, mode="r")
        if found.shape != shape or found.dtype != DTYPES[name]:
            raise ValueError(f"it is {found.dtype}{list(found.shape)} instead of {DTYPES[name]}{list(shape)}")
    return found


def _remake(folder: Path) -> str:
    return f"`saelab index {folder.parent}` makes it again."


def _shuffled(places: np.ndarray, feature: int) -> np.ndarray:
    """A number for each place, uniform and without order (the finaliser of splitmix64), another for each feature."""
    x = places.astype(np.uint64) + (np.uint64(feature + 1) << np.uint64(32))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))
