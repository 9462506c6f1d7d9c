"""Reads the tables of the feature database, for the explorer, notebooks and analyses; facts.py reads its arrays.

Everything was computed when the database was written. Reading needs only pyarrow and pandas, no torch and no language
model, so a page opens at once. A database is named by its folder, `features` in a run folder.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saelab.errors import SaelabError
from saelab.features.layout import CONTEXTS, FEATURES, SUMMARY
from saelab.files import read_json, translate_read_errors

# Between the tokens of one feature in a searched text, so that no search matches across two tokens.
_SEPARATOR = "\x1f"
_UNREADABLE = (OSError, ValueError, pa.ArrowException)
_SCALARS = ["feature", "density", "n_active", "mean_activation", "max_activation"]


@dataclass(frozen=True)
class Summary:
    """Facts about a whole feature database."""

    n_tokens: int
    """N: ordinary held-out tokens, encoded in inference mode. Densities are fractions of N."""
    n_features: int
    never_active: int
    """Features that are active on none of the N tokens: dead, as reported."""
    site: str
    model: str
    d_in: int


@dataclass(frozen=True)
class Feature:
    """One feature. Pairs are (token or feature, value), strongest first."""

    index: int
    density: float
    """Fraction of the N tokens on which the feature is active."""
    n_active: int
    mean_activation: float
    """Mean over the tokens on which the feature is active; 0 if there is none."""
    max_activation: float
    histogram: list[int]
    """Tokens in each of equal bins of activation from 0 to `max_activation`; zeros are not counted."""
    top_logits: list[tuple[str, float]]
    bottom_logits: list[tuple[str, float]]
    neighbours: list[tuple[int, float]]
    """Other features by the cosine of their decoder rows."""

    @property
    def never_active(self) -> bool:
        return self.n_active == 0

    @property
    def bin_centres(self) -> np.ndarray:
        """The middle of each bin of `histogram` ``[bins]``."""
        edges = np.linspace(0.0, self.max_activation, len(self.histogram) + 1)
        return (edges[:-1] + edges[1:]) / 2


@dataclass(frozen=True)
class Context:
    """A window of text around one of a feature's strongest activations, at most one per row of text."""

    rank: int
    """0 is the strongest."""
    row: int
    position: int
    """Position of the peak in its row."""
    activation: float
    """Activation at the peak."""
    peak: int
    """Index of the peak in `tokens`."""
    tokens: list[str]
    activations: list[float]
    """Activation of the feature on each of `tokens`; 0 if inactive."""


def summary(folder: Path | str) -> Summary:
    """Facts about the whole feature database (`summary.json`). Raises SaelabError if they are missing or damaged."""
    _require_features(folder)
    path = Path(folder) / SUMMARY
    found = read_json(path, _remake(folder))
    try:
        whole = {name: int(found[name]) for name in ("n_tokens", "n_features", "never_active", "d_in")}
        return Summary(**whole, site=str(found["site"]), model=str(found["model"]))
    except (KeyError, TypeError, ValueError) as error:
        raise SaelabError(f"{path} is not the summary of a feature database: {error!r}. {_remake(folder)}") from error


def feature_table(folder: Path | str) -> pd.DataFrame:
    """One line per feature, sorted by it.

    Columns: `feature`, `density` (fraction of the N tokens), `n_active`, `mean_activation`, `max_activation`,
    `top_logit_tokens` (the tokens it promotes, strongest first) and `peak_tokens` (the different tokens at the peaks of
    its top contexts, strongest first), the last two lists of text.
    """
    table = _parquet(folder, FEATURES, [*_SCALARS, "top_logit_tokens"])
    frame = table.select(_SCALARS).to_pandas()
    frame["top_logit_tokens"] = [tokens or [] for tokens in table["top_logit_tokens"].to_pylist()]
    peaks = _peak_tokens(_parquet(folder, CONTEXTS, ["feature", "peak", "tokens"]))
    frame["peak_tokens"] = [peaks.get(index, []) for index in frame["feature"]]
    return frame


def feature(folder: Path | str, index: int) -> Feature:
    """One feature. Raises SaelabError if there is no feature of that index."""
    lists = ["top_logit_tokens", "top_logits", "bottom_logit_tokens", "bottom_logits"]
    columns = [*_SCALARS, "histogram", *lists, "neighbours", "neighbour_cosines"]
    found = _parquet(folder, FEATURES, columns, ("feature", "=", index)).to_pylist()
    if not found:
        last = summary(folder).n_features - 1
        raise SaelabError(f"There is no feature {index} in {folder}: its features are 0 to {last}.")
    line = found[0]

    def pairs(names: str, values: str) -> list:
        return list(zip(line[names] or [], line[values] or [], strict=False))

    return Feature(
        index=line["feature"],
        density=line["density"],
        n_active=line["n_active"],
        mean_activation=line["mean_activation"],
        max_activation=line["max_activation"],
        histogram=line["histogram"] or [],
        top_logits=pairs("top_logit_tokens", "top_logits"),
        bottom_logits=pairs("bottom_logit_tokens", "bottom_logits"),
        neighbours=pairs("neighbours", "neighbour_cosines"),
    )


def contexts(folder: Path | str, index: int) -> list[Context]:
    """The top contexts of a feature, strongest first; none if it was never active."""
    columns = ["rank", "row", "position", "activation", "peak", "tokens", "activations"]
    lines = _parquet(folder, CONTEXTS, columns, ("feature", "=", index)).to_pylist()
    lines = [line | {"tokens": line["tokens"] or [], "activations": line["activations"] or []} for line in lines]
    return sorted((Context(**line) for line in lines), key=lambda context: context.rank)


def search_tokens(table: pd.DataFrame, text: str) -> pd.Series:
    """Which lines of a `feature_table` contain `text`, in any case, in a token they promote or peak on: booleans."""
    tokens = table["top_logit_tokens"] + table["peak_tokens"]
    joined = [_SEPARATOR.join(of_one) for of_one in tokens]
    hits = _contains(pa.array(joined, pa.large_string()), text).to_numpy(zero_copy_only=False)
    return pd.Series(hits, index=table.index, dtype=bool)


def search_contexts(folder: Path | str, text: str) -> np.ndarray:
    """Indices of the features with `text`, in any case and over any number of tokens, in a top context; sorted."""
    table = _parquet(folder, CONTEXTS, ["feature", "tokens"])
    tokens = table["tokens"].cast(pa.large_list(pa.large_string()))
    windows = pc.call_function("binary_join", [tokens, pa.scalar("", pa.large_string())])
    return np.unique(table["feature"].filter(_contains(windows, text)).to_numpy())


def density_histogram(table: pd.DataFrame, bins: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Features counted by the log10 of their density: edges ``[bins + 1]``, counts ``[bins]``, of those ever active."""
    density = table["density"].to_numpy()
    logs = np.log10(density[density > 0])
    counts, edges = np.histogram(logs, bins=bins, range=(min(-4.0, *logs) if len(logs) else -4.0, 0.0))
    return edges, counts


def _contains(strings: pa.Array | pa.ChunkedArray, text: str) -> pa.Array | pa.ChunkedArray:
    """Which of the strings contain `text`, in any case."""
    options = pc.MatchSubstringOptions(text, ignore_case=True)
    return pc.call_function("match_substring", [strings], options)


def _peak_tokens(table: pa.Table) -> dict[int, list[str]]:
    """The different tokens at the peaks of each feature's contexts, in the table's order."""
    found: dict[int, dict[str, None]] = {}
    for batch in table.to_batches():
        starts, stops = batch["tokens"].offsets.to_numpy()[:-1], batch["tokens"].offsets.to_numpy()[1:]
        peaks = starts + batch["peak"].to_numpy()
        inside = (peaks >= starts) & (peaks < stops)
        strings = batch["tokens"].values.take(pa.array(peaks[inside])).to_pylist()
        for index, token in zip(batch["feature"].to_numpy()[inside].tolist(), strings, strict=True):
            found.setdefault(index, {})[token] = None
    return {index: list(different) for index, different in found.items()}


def _require_features(folder: Path | str) -> None:
    missing = [name for name in (FEATURES, CONTEXTS, SUMMARY) if not (Path(folder) / name).is_file()]
    if missing:
        run = Path(folder).parent
        raise SaelabError(f"{run} has no features yet ({missing[0]} is missing). `saelab index {run}` makes them.")


def _remake(folder: Path | str) -> str:
    return f"`saelab index {Path(folder).parent}` makes it again."


def _parquet(folder: Path | str, name: str, columns: list[str], where: tuple | None = None) -> pa.Table:
    _require_features(folder)
    path = Path(folder) / name
    # An open file, not a path: pyarrow takes a path such as "run=3/..." for a partitioned data set. And a pyarrow file:
    # its threads may release a Python file after the interpreter's end, which aborts the process.
    with (
        translate_read_errors(path, "a Parquet file of the feature database", _remake(folder), _UNREADABLE),
        pa.OSFile(str(path)) as file,
    ):
        table = pq.read_table(file, columns=columns, filters=[where] if where else None)
    lacking = [column for column in columns if column not in table.column_names]
    if lacking:
        raise SaelabError(f"{path} has no column {', '.join(lacking)}. {_remake(folder)}")
    return table
