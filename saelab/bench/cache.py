"""`saelab bench cache`: writing and reading activation caches against the disk, a bare model and sae-lens, on the CPU.

Every figure comes from a process of its own (ours_cache.py, peer_cache.py). What is compared runs one right after the
other, first the one and then the other in turn from round to round; a ratio is taken between such neighbours, and the
median of the rounds is reported. Above 1, ours is the faster one.
"""

import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from saelab.bench import ours_cache, peer_cache
from saelab.bench.processes import Say, machine, run_measurement
from saelab.demo import MODEL
from saelab.demo.stdlib import read_stdlib
from saelab.errors import SaelabError

PEER_NOTE = (
    "sae-lens: writing is its runner's _create_shard, save_to_disk and _consolidate_shards from a buffer in memory, in "
    "float32 and without fsync; ours includes collecting passes in memory, checksums and fsync, of activations that "
    "come in float32. End to end is its runner with HookedTransformer and the demo's weights, and `saelab cache` with "
    "cache.dtype=float32, on the same texts, loading left out."
)


@dataclass(frozen=True)
class Size:
    """How much is written and read."""

    tokens: int = 655_360
    """Of the cache that is written and read, in whole shards; at d_in 768 in bfloat16, 1 GB."""
    few_tokens: int = 262_144
    """Of the smaller one, whose reading should take no less memory, and of what is written against sae-lens."""
    d_in: int = 768
    passes: int = 44
    """Passes of the demo model that are timed."""
    warmup: int = 4
    """Passes before them."""
    end_to_end_tokens: int = 65_536

    def room(self, rounds: int) -> int:
        """Bytes of disk that all of it takes."""
        half, full = 2 * self.d_in + 12, 4 * self.d_in + 12
        demo = (self.passes + self.warmup) * ours_cache.PASS_TOKENS * (2 * 256 + 12)
        return (rounds + 1) * (2 * self.tokens * half + self.few_tokens * (3 * full + half) + demo)


@dataclass(frozen=True)
class Measure:
    """A comparison of the record, and what it should come to."""

    name: str
    what: str
    target: float


PAIRS = (
    Measure("caching", "caching tokens/s / a bare Hugging Face model, stopped at the same layer", 0.9),
    Measure("writing", "writing, bytes/s / raw sequential write with fsync", 0.8),
    Measure("reading", "shuffled reading from disk, bytes/s / raw sequential read", 0.6),
    Measure("sae_lens_float32", "writing float32, bytes/s / sae-lens'", 3.0),
    Measure("sae_lens_bfloat16", "writing bfloat16, bytes/s / sae-lens' of float32", 3.0),
)
WARM_TARGET = 2_000_000
"""Tokens per second read from the page cache."""
GROWTH_TARGET = 100_000_000
"""Bytes of memory beside the two buffers."""


def bench(
    *,
    rounds: int = 3,
    peers: Path | None = None,
    folder: Path | None = None,
    size: Size = Size(),
    threads: int | None = None,
    say: Say = lambda message: None,
) -> dict[str, Any]:
    """Everything `saelab bench cache` measures, as the record that its ``--json`` writes.

    `peers` is the interpreter of the environment with sae-lens; all is written below `folder` (default: where temporary
    files go) and removed. Raises SaelabError where there is no room or no sae-lens, or a measurement fails.
    """
    processes = Processes(size, threads or os.cpu_count() or 1, say)
    versions = {name: version(name) for name in ("saelab", "torch", "numpy", "transformers", "xxhash")}
    found = processes.peer_versions(peers) if peers else {}
    if peers and "sae-lens" not in found:
        raise SaelabError(f"{peers}: it has no sae-lens; `make bench-peers` makes an environment that has")
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
        record: dict[str, Any] = {
            "machine": machine() | {"file_system": _file_system(work)},
            "versions": versions
            | {name: v for name, v in found.items() if name != "torch"}
            | {"python": platform.python_version()},
            "peers_torch": found.get("torch"),
            "size": asdict(size),
            "threads": processes.threads,
            "rounds": rounds,
        }
        return record | _measured(processes, work, rounds, peers)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _measured(processes: "Processes", work: Path, rounds: int, peers: Path | None) -> dict[str, Any]:
    pairs: dict[str, list[dict[str, float]]] = {}
    warm: list[float] = []
    few = str(processes.size.few_tokens)
    # Nothing is removed before the end: a disk that is told of freed blocks (`discard`) is busy with them at some later
    # time, and faster, or slower, with blocks that it had before. Either would fall to whoever comes next.
    folders = (work / f"{number}" for number in count())
    cache = work

    def compare(name: str, turn: int, ours: Callable[[], float], other: Callable[[], float]) -> None:
        """One round of a pair: what each of the two gives, per second."""
        if turn % 2:
            mine, theirs = ours(), other()
        else:
            theirs, mine = other(), ours()
        pairs.setdefault(name, []).append({"ours": mine, "other": theirs, "ratio": mine / theirs})

    for turn in range(1, rounds + 1):
        processes.label = f"round {turn} of {rounds}"
        cache = next(folders)
        compare(
            "writing",
            turn,
            lambda cache=cache: _per_second(processes.ours("write", cache), "bytes"),
            lambda: _per_second(processes.ours("raw_write", next(folders)), "bytes"),
        )
        compare(
            "reading",
            turn,
            lambda cache=cache: _per_second(processes.ours("read", cache), "bytes"),
            lambda cache=cache: _per_second(processes.ours("raw_read", cache), "bytes"),
        )
        warm.append(_per_second(processes.ours("warm", cache), "tokens"))
        compare(
            "caching",
            turn,
            lambda: _per_second(processes.ours("caching", next(folders)), "tokens"),
            lambda: _per_second(processes.ours("model", work), "tokens"),
        )
        if peers:
            for dtype in ("float32", "bfloat16"):  # the peer has one dtype, and writes anew beside each of ours
                given = ("--tokens", few, "--given", "float32", "--dtype", dtype)
                compare(
                    f"sae_lens_{dtype}",
                    turn,
                    lambda given=given: _per_second(processes.ours("write", next(folders), *given), "values"),
                    lambda: _per_second(processes.peer(peers, "write", next(folders), int(few)), "values"),
                )

    processes.label = "once"
    small = next(folders)
    processes.ours("write", small, "--tokens", few)
    memory = [processes.ours("memory", folder) for folder in (small, cache)]
    record: dict[str, Any] = {
        "pairs": {
            name: {column: statistics.median(row[column] for row in rows) for column in ("ours", "other", "ratio")}
            | {"rounds": rows}
            for name, rows in pairs.items()
        },
        "warm": {"tokens_per_s": statistics.median(warm), "rounds": warm},
        "memory": memory,
    }
    if peers:
        texts = work / "texts.jsonl"
        texts.write_text("".join(json.dumps(text) + "\n" for text in read_stdlib().train.values()), encoding="utf-8")
        tokens = processes.size.end_to_end_tokens
        record["end_to_end"] = {
            "ours": processes.ours("end_to_end", next(folders), "--tokens", str(tokens)),
            "sae_lens": processes.peer(peers, "end_to_end", next(folders), tokens, "--texts", str(texts)),
        }
        record["peer_note"] = PEER_NOTE
    record["used_by_others"] = {
        "median": statistics.median(processes.used_by_others),
        "max": max(processes.used_by_others),
    }
    return record


class Processes:
    """Runs measurements, each in a process of its own, one at a time."""

    def __init__(self, size: Size, threads: int, say: Say) -> None:
        self.size, self.threads, self.say = size, threads, say
        self.label = ""
        self.used_by_others: list[float] = []
        """Share of the machine's processors that others took while each measurement ran."""

    def ours(self, measure: str, folder: Path, *arguments: str) -> dict[str, float]:
        size = self.size
        command = [
            sys.executable,
            "-m",
            ours_cache.__name__,
            "--measure",
            measure,
            "--folder",
            str(folder),
            "--tokens",
            str(size.tokens),
            "--d-in",
            str(size.d_in),
            "--passes",
            str(size.passes),
            "--warmup",
            str(size.warmup),
            *arguments,
        ]
        return self._run(command, f"{measure} {' '.join(arguments)}".strip())

    def peer(self, python: Path, measure: str, folder: Path, tokens: int, *arguments: str) -> dict[str, float]:
        buffer = min(tokens, ours_cache.PASSES * ours_cache.PASS_TOKENS)  # its buffers are shards, as long as ours
        # -I: neither this environment's PYTHONPATH nor the folder of the script is on its path
        command = [
            str(python),
            "-I",
            peer_cache.__file__,
            "--measure",
            measure,
            "--folder",
            str(folder),
            "--tokens",
            str(tokens),
            "--buffer",
            str(buffer),
            "--d-in",
            str(self.size.d_in),
            "--model",
            str(MODEL),
            "--layer",
            str(ours_cache.LAYER),
            *arguments,
        ]
        return self._run(command, f"sae-lens, {measure}")

    def peer_versions(self, python: Path) -> dict[str, Any]:
        if not python.is_file():
            raise SaelabError(
                f"{python}: no such interpreter; `make bench-peers` makes an environment and says where its own is"
            )
        return self._run([str(python), "-I", peer_cache.__file__, "--versions"], "")

    def _run(self, command: list[str], what: str) -> dict[str, Any]:
        result, others = run_measurement(command, self.threads, self.say)
        if what:
            self.used_by_others.append(others)
            seconds = f": {result['seconds']:.2f} s" if "seconds" in result else ""
            self.say(f"{self.label}: {what}{seconds}")
        return result


def show(record: dict[str, Any]) -> None:
    """Print what `bench` returned."""
    console = Console(width=120, highlight=False)
    size, known = record["size"], record["machine"]
    console.print(
        f"{known['processor']}, {record['threads']} threads, {known['file_system'] or 'unknown file system'}, torch "
        f"{record['versions']['torch']}\n"
        f"{size['tokens']:,} tokens, d_in {size['d_in']}; medians of {record['rounds']} rounds"
    )
    others = record["used_by_others"]
    console.print(f"others used {others['median']:.0%} of the processors meanwhile, {others['max']:.0%} at most")
    table = Table("", "ours", "other", "ratio or figure", "target", "of the rounds", title="The activation cache")
    for column in table.columns[1:]:
        column.justify = "right"
    for measure in PAIRS:
        if measure.name in record["pairs"]:
            figures = record["pairs"][measure.name]
            rounds = " ".join(f"{row['ratio']:.2f}" for row in figures["rounds"])
            table.add_row(
                measure.what,
                _short(figures["ours"]),
                _short(figures["other"]),
                f"{figures['ratio']:.2f}",
                f">= {measure.target:.1f}",
                rounds,
            )
    warm = record["warm"]
    table.add_row(
        "reading from the page cache, tokens/s",
        _short(warm["tokens_per_s"]),
        "",
        _short(warm["tokens_per_s"]),
        f">= {_short(WARM_TARGET)}",
        " ".join(map(_short, warm["rounds"])),
    )
    for row in record["memory"]:
        over = (row["growth"] - row["buffers"]) / 1e6
        table.add_row(
            f"memory beside the buffers ({row['buffers'] / 1e6:.0f} MB), {row['tokens']:,.0f} tokens, MB",
            f"{over:.0f}",
            "",
            f"{over:.0f}",
            f"<= {GROWTH_TARGET / 1e6:.0f}",
            "",
        )
    if "end_to_end" in record:
        ours, theirs = (record["end_to_end"][name]["tokens_per_s"] for name in ("ours", "sae_lens"))
        table.add_row("end to end, tokens/s / sae-lens'", _short(ours), _short(theirs), f"{ours / theirs:.2f}", "", "")
    console.print(table)
    if "peer_note" in record:
        console.print(record["peer_note"])


def _short(number: float) -> str:
    """Four digits or so: 12.3 k, 1.23 M, 1.23 G."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}" if number < 100 * unit else f"{number / unit:.0f}{name}"
    return f"{number:.3g}"


def _per_second(result: dict[str, float], what: str) -> float:
    return result[what] / result["seconds"]


def _file_system(folder: Path) -> str | None:
    """The type of the file system that `folder` is in, where /proc/mounts says it."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return None
    lines = (line.split() for line in mounts.read_text(encoding="utf-8").splitlines())
    holding = [(point, kind) for _, point, kind, *_ in lines if folder.resolve().is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]))[1] if holding else None
