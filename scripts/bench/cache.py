"""Speed of writing and reading activation caches beside the disk, a bare model and, with --peers, sae-lens; on a CPU.

    python scripts/bench/cache.py --json cache.json
    python scripts/bench/cache.py --peers .venv-peers/bin/python

Every figure comes from its own process (ours_cache.py, peer_cache.py). The two measurements of a comparison run one
right after the other, in an order that alternates between rounds; the ratio of each pair is taken, and the median of
the rounds is reported. Above 1, ours is faster. If sae-lens fails, its row says so, the rest is measured, and the exit
code is 1.
"""

import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import command
import ours_cache
import peer_cache
from processes import Processes, add_options, failures, heading
from table import table

from saelab.demo import MODEL
from saelab.demo.stdlib import read_stdlib
from saelab.errors import SaelabError

PEER_NOTE = (
    "sae-lens: writing is its runner's _create_shard, save_to_disk and _consolidate_shards from a buffer in memory, in "
    "float32 and without fsync; ours includes collecting passes in memory, checksums and fsync, and its "
    "activations come in float32. End to end is its runner with HookedTransformer and the demo's weights, and `saelab "
    "cache` with cache.dtype=float32, on the same texts, loading left out."
)


@dataclass(frozen=True)
class Size:
    """Amounts written and read."""

    tokens: int = 655_360
    """Tokens of the cache that is written and read, in whole shards; at d_in 768 in bfloat16, 1 GB."""
    few_tokens: int = 262_144
    """Tokens of the smaller cache, which should take as much memory to read, and of the caches beside sae-lens."""
    d_in: int = 768
    passes: int = 44
    """Passes of the demo model that are timed."""
    warmup: int = 4
    """Passes before the timed ones."""
    end_to_end_tokens: int = 65_536

    def room(self, rounds: int) -> int:
        """Bytes of disk that all rounds take."""
        half, full = 2 * self.d_in + 12, 4 * self.d_in + 12
        demo = (self.passes + self.warmup) * ours_cache.PASS_TOKENS * (2 * 256 + 12)
        return (rounds + 1) * (2 * self.tokens * half + self.few_tokens * (3 * full + half) + demo)


PAIRS = {
    "caching": ("caching tokens/s / a bare Hugging Face model, stopped at the same layer", 0.9),
    "writing": ("writing, bytes/s / raw sequential write with fsync", 0.8),
    "reading": ("shuffled reading from disk, bytes/s / raw sequential read", 0.6),
    "sae_lens_float32": ("writing float32, bytes/s / sae-lens'", 3.0),
    "sae_lens_bfloat16": ("writing bfloat16, bytes/s / sae-lens' of float32", 3.0),
}
"""The comparisons of a record: a label, and the target of the ratio."""
END_TO_END = "end to end, tokens/s / sae-lens'"
WARM_TARGET = 2_000_000
"""Tokens per second read from the page cache."""
GROWTH_TARGET = 100_000_000
"""Bytes of memory besides the two buffers."""


def measure(
    *,
    rounds: int = 3,
    peers: Path | None = None,
    folder: Path | None = None,
    size: Size = Size(),
    threads: int | None = None,
) -> dict[str, Any]:
    """The record that --json writes.

    `peers` is the interpreter of the environment with sae-lens; all files are written below `folder` (default: the
    place of temporary files) and removed. Raises SaelabError if there is no room or no sae-lens, or if one of our
    measurements fails. A comparison in which sae-lens fails is not repeated; ``failures`` of the record has the reason.
    """
    run = Processes(threads, peers, ("sae-lens",))
    try:
        work = Path(tempfile.mkdtemp(prefix="saelab-bench-", dir=folder))
    except OSError as error:
        raise SaelabError(f"{folder or tempfile.gettempdir()}: cannot be written to ({error.strerror})") from error
    try:
        free, room = shutil.disk_usage(work).free, size.room(rounds)
        if free < room:
            raise SaelabError(
                f"{work.parent}: {room / 1e9:.1f} GB are needed for what is written, and {free / 1e9:.1f} GB are "
                "free; name another --folder"
            )
        record = run.facts("torch", "numpy", "transformers", "xxhash") | {"size": asdict(size), "rounds": rounds}
        record["machine"]["file_system"] = _file_system(work)
        return record | _measured(run, work, size, rounds) | run.outcome()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _measured(run: Processes, work: Path, size: Size, rounds: int) -> dict[str, Any]:
    pairs: dict[str, list[dict[str, float]]] = {}
    warm: list[float] = []
    # Nothing is removed before the end: with `discard` a disk handles freed blocks at some later time, and reused
    # blocks may be faster or slower. Either would distort the next measurement.
    new = (work / f"{number}" for number in count())
    made = {"tokens": size.tokens, "d_in": size.d_in}
    few = {"tokens": size.few_tokens, "d_in": size.d_in}
    passes = {"passes": size.passes, "warmup": size.warmup}
    buffer = ours_cache.PASSES * ours_cache.PASS_TOKENS  # sae-lens' buffers are shards, as long as ours
    cache = work

    def ours(what: str, function: Callable[..., Any], **arguments: Any) -> float:
        result = run.ours(function, **arguments)
        return result[what] / result["seconds"]

    def peers_writing() -> float:
        result = run.peer(peer_cache.write, folder=next(new), buffer_tokens=min(size.few_tokens, buffer), **few)
        return result["values"] / result["seconds"]

    def compare(name: str, first: bool, mine: Callable[[], float], other: Callable[[], float]) -> None:
        """One round of a comparison: amounts per second of both."""
        if name in run.failures:
            return
        with run.row(name):
            if first:
                row = {"ours": mine(), "other": other()}
            else:
                row = {"other": other(), "ours": mine()}
            pairs.setdefault(name, []).append(row | {"ratio": row["ours"] / row["other"]})

    for turn in range(1, rounds + 1):
        run.label, first = f"round {turn} of {rounds}", turn % 2 == 1
        cache = next(new)
        compare(
            "writing",
            first,
            lambda cache=cache: ours("bytes", ours_cache.write, folder=cache, **made),
            lambda: ours("bytes", ours_cache.raw_write, folder=next(new), **made),
        )
        compare(
            "reading",
            first,
            lambda cache=cache: ours("bytes", ours_cache.read, folder=cache),
            lambda cache=cache: ours("bytes", ours_cache.raw_read, folder=cache),
        )
        warm.append(ours("tokens", ours_cache.warm, folder=cache))
        compare(
            "caching",
            first,
            lambda: ours("tokens", ours_cache.caching, folder=next(new), **passes),
            lambda: ours("tokens", ours_cache.model, **passes),
        )
        for dtype in ("float32", "bfloat16") if run.peers else ():  # the peer has only float32, and writes it each time
            kinds = {"dtype": dtype, "activations": "float32"}
            compare(
                f"sae_lens_{dtype}",
                first,
                lambda kinds=kinds: ours("values", ours_cache.write, folder=next(new), **few, **kinds),
                peers_writing,
            )

    run.label = "once"
    small = next(new)
    run.ours(ours_cache.write, folder=small, **few)
    record: dict[str, Any] = {
        "pairs": {
            name: {column: statistics.median(row[column] for row in rows) for column in ("ours", "other", "ratio")}
            | {"rounds": rows}
            for name, rows in pairs.items()
            if name not in run.failures
        },
        "warm": {"tokens_per_s": statistics.median(warm), "rounds": warm},
        "memory": [run.ours(ours_cache.memory, folder=folder) for folder in (small, cache)],
    }
    if run.peers:
        texts, tokens = work / "texts.jsonl", size.end_to_end_tokens
        texts.write_text("".join(json.dumps(text) + "\n" for text in read_stdlib().train.values()), encoding="utf-8")
        job = {"model": MODEL, "texts": texts, "layer": ours_cache.LAYER, "buffer_tokens": min(tokens, buffer)}
        with run.row("end_to_end"):
            record["end_to_end"] = {
                "ours": run.ours(ours_cache.end_to_end, folder=next(new), tokens=tokens),
                "sae_lens": run.peer(peer_cache.end_to_end, folder=next(new), tokens=tokens, **job),
            }
        record["peer_note"] = PEER_NOTE
    return record


def report(record: dict[str, Any]) -> str:
    """The record as a table."""
    size, warm = record["size"], record["warm"]
    rows = [
        [what, _short(row["ours"]), _short(row["other"]), f"{row['ratio']:.2f}", f">= {target:.1f}", _ratios(row)]
        for name, (what, target) in PAIRS.items()
        if (row := record["pairs"].get(name))
    ]
    speed = _short(warm["tokens_per_s"])
    each = " ".join(map(_short, warm["rounds"]))
    rows.append(["reading from the page cache, tokens/s", speed, "", speed, f">= {_short(WARM_TARGET)}", each])
    labels = {name: what for name, (what, _) in PAIRS.items()} | {"end_to_end": END_TO_END}
    rows += [[labels[name], "", "failed", "", "", ""] for name in record["failures"]]
    for row in record["memory"]:
        over = f"{(row['growth'] - row['buffers']) / 1e6:.0f}"
        what = f"memory besides the buffers ({row['buffers'] / 1e6:.0f} MB), {row['tokens']:,.0f} tokens, MB"
        rows.append([what, over, "", over, f"<= {GROWTH_TARGET / 1e6:.0f}", ""])
    if "end_to_end" in record:
        ours, theirs = (record["end_to_end"][name]["tokens_per_s"] for name in ("ours", "sae_lens"))
        rows.append([END_TO_END, _short(ours), _short(theirs), f"{ours / theirs:.2f}", "", ""])
    file_system = record["machine"]["file_system"] or "unknown file system"
    sizes = f"{size['tokens']:,} tokens, d_in {size['d_in']}, medians of {record['rounds']} rounds"
    parts = [
        heading(record, file_system, sizes),
        table(["the activation cache", "ours", "other", "ratio or figure", "target", "of the rounds"], rows),
        failures(record),
        record.get("peer_note", ""),
    ]
    return "\n\n".join(filter(None, parts))


def _ratios(row: dict[str, Any]) -> str:
    return " ".join(f"{one['ratio']:.2f}" for one in row["rounds"])


def _short(number: float) -> str:
    """Three digits: 12.3 k, 1.23 M, 1.23 G."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}" if number < 100 * unit else f"{number / unit:.0f}{name}"
    return f"{number:.3g}"


def _file_system(folder: Path) -> str | None:
    """The type of the file system of `folder`; None if /proc/mounts does not list it."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return None
    lines = (line.split() for line in mounts.read_text(encoding="utf-8").splitlines())
    holding = [(point, kind) for _, point, kind, *_ in lines if folder.resolve().is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]))[1] if holding else None


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--rounds", type=command.whole(1), default=3, help="number of rounds (3)")
    parser.add_argument("--folder", type=Path, help="folder to write some GB to (default: a temporary folder)")
    add_options(parser)
    options = vars(parser.parse_args())
    json_file = options.pop("json")
    record = measure(**options)
    command.write_json(json_file, record)
    print(report(record))
    command.check(record)


if __name__ == "__main__":
    command.run(main)
