"""The read side of the feature database: what the explorer, notebooks and later analyses read of a run folder.

Everything was computed when the database was written; reading takes pyarrow and pandas alone, no torch and no language
model, so that a page opens at once. A run is named by its folder; the files in it are described in each function.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from saelab.errors import SaelabError

RUN_MARKER = "train.json"
FEATURES = Path("features", "features.parquet")
CONTEXTS = Path("features", "contexts.parquet")
SUMMARY = Path("features", "summary.json")

# Between the tokens of one feature in a searched text: no search matches across two tokens.
_SEPARATOR = "\x1f"
_SCALARS = ["feature", "density", "n_active", "mean_activation", "max_activation"]

T = TypeVar("T")


@dataclass(frozen=True)
class RunInfo:
    """A run folder and how far it has come."""

    path: Path
    name: str
    """Where the run lies below the folder that was searched; the folder's own name if it is the run."""
    has_eval: bool
    has_features: bool


@dataclass(frozen=True)
class Summary:
    """What the feature database as a whole says."""

    n_tokens: int
    """N: the held-out tokens, in inference mode and without special tokens, that every density is a fraction of."""
    n_features: int
    never_active: int
    """Features that were active on none of the N tokens: dead, as reported."""
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
    """Over the tokens on which it is active; 0 if there is none."""
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
    """Of the peak in its row."""
    activation: float
    """At the peak."""
    peak: int
    """Index of the peak in `tokens`."""
    tokens: list[str]
    activations: list[float]
    """Of this feature on each of `tokens`; 0 where it is inactive."""


def find_runs(folder: Path | str, depth: int = 3) -> list[RunInfo]:
    """The runs in a folder, sorted by name: the folder itself if it holds `train.json`, otherwise those below it.

    A run is not searched for further runs, and nothing is searched deeper than `depth` levels. Raises SaelabError if
    there is no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise SaelabError(f"There is no folder {root}. Name a run folder, or a folder that holds run folders.")

    def below(path: Path, levels: int) -> list[Path]:
        try:
            if (path / RUN_MARKER).is_file():
                return [path]
            inside = [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")] if levels else []
        except PermissionError:  # a folder that may not be read is none of the user's runs
            return []
        return [run for p in inside for run in below(p, levels - 1)]

    def info(path: Path) -> RunInfo:
        name = root.resolve().name if path == root else path.relative_to(root).as_posix()
        has_features = (path / FEATURES).is_file() and (path / CONTEXTS).is_file() and (path / SUMMARY).is_file()
        return RunInfo(path, name, (path / "eval.json").is_file(), has_features)

    return [info(path) for path in below(root, depth)]


def settings_text(run: Path | str) -> str:
    """The run's settings as they were resolved: `config.yaml`, as text."""
    path = Path(run) / "config.yaml"
    return _read(path, "the run's settings", "Train the run again.", lambda: path.read_text(encoding="utf-8"))


def metrics(run: Path | str) -> pd.DataFrame:
    """What training logged: one line per logged step of `metrics.jsonl`, numeric columns only; empty if nothing was.

    A last line that was cut off, as a kill leaves it, is left out.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        return pd.DataFrame()
    todo = "Remove that line, or train the run again."
    lines = _read(path, "training metrics", todo, lambda: path.read_text(encoding="utf-8")).splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("it is not a JSON object")
            records.append(record)
        except ValueError as error:
            if number == len(lines):
                break
            raise SaelabError(f"{path}, line {number}: this is not a line of training metrics. {todo}") from error
    return pd.DataFrame(records).select_dtypes("number")


def evaluation(run: Path | str) -> dict[str, Any] | None:
    """The evaluation (`eval.json`, `saelab eval`), name to value; None if the run was not evaluated."""
    path = Path(run) / "eval.json"
    return _json(path, f"`saelab eval {run}` makes it again.") if path.is_file() else None


def summary(run: Path | str) -> Summary:
    """What the feature database as a whole says (`features/summary.json`)."""
    _require_features(run)
    path = Path(run) / SUMMARY
    found = _json(path, _remake(run))
    try:
        whole = {name: int(found[name]) for name in ("n_tokens", "n_features", "never_active", "d_in")}
        return Summary(**whole, site=str(found["site"]), model=str(found["model"]))
    except (KeyError, TypeError, ValueError) as error:
        raise SaelabError(f"{path} is not the summary of a feature database: {error!r}. {_remake(run)}") from error


def feature_table(run: Path | str) -> pd.DataFrame:
    """One line per feature, sorted by it.

    Columns: `feature`, `density` (fraction of the N tokens), `n_active`, `mean_activation`, `max_activation`,
    `top_logit_tokens` (the tokens it promotes, strongest first) and `peak_tokens` (the different tokens at the peaks of
    its top contexts, strongest first), the last two lists of text.
    """
    table = _parquet(run, FEATURES, [*_SCALARS, "top_logit_tokens"])
    frame = table.select(_SCALARS).to_pandas()
    frame["top_logit_tokens"] = [tokens or [] for tokens in table["top_logit_tokens"].to_pylist()]
    peaks = _peak_tokens(_parquet(run, CONTEXTS, ["feature", "peak", "tokens"]))
    frame["peak_tokens"] = [peaks.get(index, []) for index in frame["feature"]]
    return frame


def feature(run: Path | str, index: int) -> Feature:
    """One feature. Raises SaelabError if the run has no feature of that index."""
    lists = ["top_logit_tokens", "top_logits", "bottom_logit_tokens", "bottom_logits"]
    columns = [*_SCALARS, "histogram", *lists, "neighbours", "neighbour_cosines"]
    found = _parquet(run, FEATURES, columns, ("feature", "=", index)).to_pylist()
    if not found:
        last = summary(run).n_features - 1
        raise SaelabError(f"There is no feature {index} in {run}: its features are 0 to {last}.")
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


def contexts(run: Path | str, index: int) -> list[Context]:
    """The top contexts of a feature, strongest first; none if it was never active."""
    columns = ["rank", "row", "position", "activation", "peak", "tokens", "activations"]
    lines = _parquet(run, CONTEXTS, columns, ("feature", "=", index)).to_pylist()
    lines = [line | {"tokens": line["tokens"] or [], "activations": line["activations"] or []} for line in lines]
    return sorted((Context(**line) for line in lines), key=lambda context: context.rank)


def search_tokens(table: pd.DataFrame, text: str) -> pd.Series:
    """Which lines of a `feature_table` have `text`, in any case, in a token they promote or peak on: booleans."""
    tokens = table["top_logit_tokens"] + table["peak_tokens"]
    joined = [_SEPARATOR.join(of_one) for of_one in tokens]
    hits = _holds(pa.array(joined, pa.large_string()), text).to_numpy(zero_copy_only=False)
    return pd.Series(hits, index=table.index, dtype=bool)


def search_contexts(run: Path | str, text: str) -> np.ndarray:
    """Which features have `text`, in any case and over any number of tokens, in a top context: indices, sorted."""
    table = _parquet(run, CONTEXTS, ["feature", "tokens"])
    tokens = table["tokens"].cast(pa.large_list(pa.large_string()))
    windows = pc.call_function("binary_join", [tokens, pa.scalar("", pa.large_string())])
    return np.unique(table["feature"].filter(_holds(windows, text)).to_numpy())


def density_histogram(table: pd.DataFrame, bins: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Features counted by the log10 of their density: edges ``[bins + 1]``, counts ``[bins]``, of those ever active."""
    density = table["density"].to_numpy()
    logs = np.log10(density[density > 0])
    counts, edges = np.histogram(logs, bins=bins, range=(min(-4.0, *logs) if len(logs) else -4.0, 0.0))
    return edges, counts


def _holds(strings: pa.Array | pa.ChunkedArray, text: str) -> pa.Array | pa.ChunkedArray:
    """Which of the strings have `text` in them, in any case."""
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


def _require_features(run: Path | str) -> None:
    missing = [str(name) for name in (FEATURES, CONTEXTS, SUMMARY) if not (Path(run) / name).is_file()]
    if missing:
        raise SaelabError(f"{run} has no features yet ({missing[0]} is missing). `saelab index {run}` makes them.")


def _remake(run: Path | str) -> str:
    return f"`saelab index {run}` makes it again."


def _parquet(run: Path | str, name: Path, columns: list[str], where: tuple | None = None) -> pa.Table:
    _require_features(run)
    path = Path(run) / name

    def read() -> pa.Table:
        # An open file, not a path: pyarrow would take a path such as "run=3/..." for a partitioned data set. And a file
        # of its own kind: its threads may let go of a Python one after the interpreter's end, which aborts the process.
        with pa.OSFile(str(path)) as file:
            return pq.read_table(file, columns=columns, filters=[where] if where else None)

    table = _read(path, "a Parquet file of the feature database", _remake(run), read)
    lacking = [column for column in columns if column not in table.column_names]
    if lacking:
        raise SaelabError(f"{path} has no column {', '.join(lacking)}. {_remake(run)}")
    return table


def _json(path: Path, remedy: str) -> dict[str, Any]:
    found = _read(path, "a JSON object", remedy, lambda: json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(found, dict):
        raise SaelabError(f"{path} is not a JSON object. {remedy}")
    return found


def _read(path: Path, what: str, remedy: str, read: Callable[[], T]) -> T:
    """`read()`, with whatever is wrong with the file told as one message that names it."""
    try:
        return read()
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise SaelabError(f"{path} cannot be read as {what}: {reason}. {remedy}") from error
