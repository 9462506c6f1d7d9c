"""Our feature database, measured in this process (child.py calls these functions, features.py reports them).

forward       the language model and `encode` on held-out text of a run, with the results discarded
index         `saelab index` on the same text: the pass, and what is written after it; loading is left out of both
made_up       writes a large made-up database: Zipf densities, random tokens; saelab's writer, but random weights
queries       a feature's page, a page of the table and searches in a database: seconds, in and out of the page cache,
              and the growth of this process's own memory (RssAnon), mapped pages left out
"""

import mmap
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saelab.codes import Codes
from saelab.encoded import Block, Reader, read_together
from saelab.features import coactivation
from saelab.features.array_files import ArrayWriter
from saelab.features.database import Database, open_database
from saelab.features.facts_writer import write_activations, write_text
from saelab.features.index import open_index
from saelab.features.layout import ACTIVITY, FORMAT, MANIFEST, VERSION, WEIGHTS
from saelab.features.shards import ShardWriter, total
from saelab.files import write_json
from saelab.runs.job import Job, settings_of
from saelab.sae.checkpoint import load

WARMUP = 4
"""Forward passes before the clock starts."""


def forward(run: str, tokens: int) -> dict[str, float]:
    """Seconds and ordinary tokens of the pass over held-out text, with the results discarded."""
    job, sae, rows = _opened(run, tokens)
    seen = 0

    def discard(block: Block) -> None:
        nonlocal seen
        seen += len(block.x)

    _warm(job, sae, rows)
    began = time.perf_counter()
    _read(job, sae, rows, discard)
    return {"seconds": time.perf_counter() - began, "tokens": seen}


def index(run: str, folder: str, tokens: int) -> dict[str, float]:
    """Seconds of the pass into shards, of what follows, and of what follows that depends on no text; tokens, features.

    The last is measured once more, without the rest.
    """
    from saelab.features.weights import weight_columns
    from saelab.lm.attention import direct_lens

    job, sae, rows = _opened(run, tokens)
    _warm(job, sae, rows)
    began = time.perf_counter()
    made = open_index(
        sae, job.lm, rows, job.settings.site, Path(folder), job.settings.features.rows_per_forward, "benchmark"
    )
    _read(job, sae, rows, made.add)
    passed = time.perf_counter()
    manifest = made.finish()
    ended = time.perf_counter()
    for _ in weight_columns(sae, direct_lens(job.lm, job.settings.site)):
        pass
    weights = time.perf_counter() - ended
    return {
        "seconds": ended - began,
        "pass_seconds": passed - began,
        "weight_seconds": weights,
        "tokens": manifest["n_tokens"],
        "features": manifest["n_features"],
    }


def _opened(run: str, tokens: int) -> tuple[Job, Any, torch.Tensor]:
    job = Job(settings_of(Path(run) / "config.yaml"), lambda message: None)
    return job, load(Path(run), job.lm.device), job.held_out(tokens)


def _read(job: Job, sae: Any, rows: torch.Tensor, add: Callable[[Block], None]) -> None:
    reader = Reader(add, len(rows), job.settings.features.rows_per_forward)
    read_together(sae, job.lm, rows, job.settings.site, [reader])


def _warm(job: Job, sae: Any, rows: torch.Tensor) -> None:
    _read(job, sae, rows[: WARMUP * job.settings.features.rows_per_forward], lambda block: None)


def made_up(folder: str, n_features: int, tokens: int, l0: int, vocabulary: int, context: int = 256) -> dict[str, Any]:
    """Write a database of random activations to the empty `folder`; returns its sizes.

    Feature f is active with a chance that falls as 1 / (f + 50), and its activations are exponential. Tokens have Zipf
    frequencies and say nothing of features. Weights and co-activation are random.
    """
    path, generator = Path(folder), torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    n_rows = -(-tokens // context)
    words = 1.0 / (np.arange(1, vocabulary) + 2.7)
    rows = (1 + rng.choice(vocabulary - 1, (n_rows, context), p=words / words.sum())).astype(np.int32)
    rows[:, 0] = 0
    names = [b"<bos>", *(f" token{i}".encode() for i in range(1, vocabulary))]
    counts = np.bincount(rows[:, 1:].ravel(), minlength=vocabulary)
    identity = {"n_features": n_features, "rows": n_rows, "context": context, "made": "up"}
    shards = ShardWriter(path / "shards", identity)
    for block in _blocks(rows, n_features, l0, generator):
        shards.add(block)
    finished = shards.finish()
    totals = total(finished)
    sizes = {
        "rows": n_rows,
        "context": context,
        "n_features": n_features,
        "entries": int(totals.counts.sum()),
        "vocabulary": vocabulary,
        "vocabulary_bytes": sum(map(len, names)),
        "pairs": 0,
    }
    writer = ArrayWriter(path, sizes)
    write_text(writer, rows, counts, names)
    write_activations(writer, finished, totals, rows)
    shutil.rmtree(path / "shards")
    columns = WEIGHTS | {name: ACTIVITY[name] for name in coactivation.COLUMNS}
    writer.write_columns(list(columns), _random_columns(columns, n_features, vocabulary, rng))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "inputs": "made up",
        **writer.sizes,
        "n_tokens": totals.tokens,
        "never_active": int((totals.counts == 0).sum()),
        "site": "made.up",
        "model": "made up",
        "d_in": 1,
        "k": l0,
        "lens": "made up",
    }
    write_json(path / MANIFEST, manifest | {"files": writer.files})
    return {name: manifest[name] for name in ("rows", "n_features", "entries", "pairs", "n_tokens", "never_active")}


def _blocks(rows: np.ndarray, n_features: int, l0: int, generator: torch.Generator) -> Iterator[Block]:
    """Random codes of `rows`, 64 rows at a time."""
    context = rows.shape[1]
    chance = 1.0 / (torch.arange(n_features, dtype=torch.float64) + 50)
    edges = (chance.cumsum(0) / chance.sum()).float()
    for first in range(0, len(rows), 64):
        ids = torch.from_numpy(rows[first : first + 64]).long()
        keep = ids != 0
        positions = keep.flatten().nonzero().squeeze(1) + first * context
        n = len(positions)
        draws = torch.searchsorted(edges, torch.rand(n, l0, generator=generator)).clamp_max(n_features - 1)
        draws = draws.sort(1).values
        again = torch.zeros_like(draws, dtype=torch.bool)
        again[:, 1:] = draws[:, 1:] == draws[:, :-1]
        values = torch.empty(n, l0).exponential_(generator=generator) + 0.1
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), (~again).sum(1).cumsum(0)])
        codes = Codes(values[~again], draws[~again], offsets, n_features)
        yield Block(ids, first, positions, torch.empty(n, 0), codes)


def _random_columns(
    columns: dict[str, tuple], n_features: int, vocabulary: int, rng: np.random.Generator
) -> Iterator[dict[str, np.ndarray]]:
    for first in range(0, n_features, 1 << 14):
        n = min(1 << 14, n_features - first)
        block = {}
        for name, (dtype, *width) in columns.items():
            most = vocabulary if "tokens" in name else n_features if "neighbours" in name else 100
            whole = dtype == "<i4"
            made = rng.integers(0, most, (n, *width)) if whole else rng.standard_normal((n, *width))
            block[name] = made.astype(dtype)
        yield block


def queries(folder: str, repeats: int = 50) -> dict[str, Any]:
    """Median and largest seconds of each question, and bytes of own memory that they took."""
    before = own_memory()
    opening = time.perf_counter()
    database = open_database(folder)
    opening = time.perf_counter() - opening
    rng = np.random.default_rng(0)
    active = np.flatnonzero(np.asarray(database.table["n_active"]) > 0)
    # the densest features have the most to read: half of the questions are about the first of them
    features = [*range(repeats // 2), *rng.choice(active, repeats - repeats // 2).tolist()]
    found: dict[str, Any] = {"open_seconds": opening}
    for feature in features[:3]:
        _feature_page(database, feature)
    found["feature_page"] = _timed(lambda feature: _feature_page(database, feature), features)
    ranges = [{"density": (low, 10 * low)} for low in (1e-6, 1e-5, 1e-4, 1e-3)]
    found["table_page"] = _timed(lambda span: _table_page(database, span), ranges * 3)
    words = [" token1", " token20", "token300 token1", " token4000", "/token1[0-9] /", "token:token5"]
    found["search"] = _timed(database.search, words)
    found["own_bytes"] = own_memory() - before
    return found


def cold(folder: str, questions: int = 10) -> dict[str, float]:
    """Median and largest seconds of a feature's page of an open database whose files are not in the page cache."""
    database = open_database(folder)
    features = np.random.default_rng(0).integers(0, database.n_features, questions).tolist()
    features[0] = 0  # the densest
    _feature_page(database, 1)  # loads the code

    def drop() -> None:
        for array in database.arrays.found.values():
            if isinstance(array.base, mmap.mmap):
                array.base.madvise(mmap.MADV_DONTNEED)  # pages that a process maps do not leave the cache
        for path in Path(folder).glob("*.npy"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    return _timed(lambda feature: _feature_page(database, feature), features, first=drop)


def _feature_page(database: Database, index: int) -> None:
    """Everything that a feature's page shows before anything is clicked."""
    feature = database.feature(index)
    for example in database.examples(index, "top"):
        assert example.activation > 0
    for neighbours in feature.neighbours.values():
        tokens = database.table["top_logit_tokens"][[each.feature for each in neighbours]][:, :3]
        for token in tokens.ravel().tolist():
            database.vocabulary.text(token)


def _table_page(database: Database, ranges: dict[str, tuple[float, float]]) -> None:
    """Filter, sort, and the first 200 rows with their tokens and a snippet each."""
    page = database.table.page(ranges, sort="maximum", n=200)
    for feature in page.features.tolist():
        for name in ("top_logit_tokens", "top_tokens"):
            for token in database.table[name][feature].tolist():
                if token >= 0:
                    database.vocabulary.text(token)
        database.examples(feature, "top", n=1, window=16)


def _timed(ask: Callable[[Any], object], about: list[Any], first: Callable[[], None] | None = None) -> dict[str, float]:
    seconds = []
    for each in about:
        if first:
            first()
        began = time.perf_counter()
        ask(each)
        seconds.append(time.perf_counter() - began)
    return {"median": statistics.median(seconds), "max": max(seconds)}


def own_memory() -> int:
    """Bytes of anonymous resident memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0
