"""Requests to a language model's server that answers after a fixed time: how near to the bound of its concurrency.

    python scripts/bench/llm.py                                  # 50 ms, 8 at once
    python scripts/bench/llm.py --latency-ms 20 --json llm.json

The bound is concurrency / latency. The server is the tests' (tests/autointerp/server.py) in a process of its own; its
work for a request and ours count against us, and so does whatever else the machine does: the best of the rounds is
reported beside their median, and the share of the processors that other programs used. Memory is the growth of this
process from the first round to the last.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command
from processes import busy_seconds
from table import table

from saelab.autointerp.llm.answers import answers
from saelab.autointerp.llm.openai_client import OpenAIClient
from saelab.autointerp.llm.protocol import Request

ROOT = Path(__file__).parents[2]
TARGET = 0.9
"""Smallest share of the bound."""
TEXT = "The quick brown fox jumps over the lazy dog. " * 40


def measure(*, requests: int, rounds: int, concurrency: int, latency: float) -> dict[str, Any]:
    """The record that --json writes."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.autointerp.server", "--latency", str(latency)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    shares, memory = list[float](), list[int]()
    try:
        assert server.stdout is not None
        client = OpenAIClient(server.stdout.readline().strip(), "any", concurrency=concurrency)
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder) / "cache"
            timed(client, -concurrency, 0, cache)  # connections, and what is made once
            used, busy, began = time.process_time(), busy_seconds() - _own_seconds(server.pid), time.monotonic()
            for first in range(0, rounds * requests, requests):
                shares.append(requests * latency / concurrency / timed(client, first, first + requests, cache))
                memory.append(resident())
            used = time.process_time() - used
            others = busy_seconds() - _own_seconds(server.pid) - busy
            others /= (os.cpu_count() or 1) * (time.monotonic() - began)
            cached = timed(client, 0, rounds * requests, cache)
            size = cache.stat().st_size
    finally:
        server.kill()
        server.wait()
    return {
        "requests": requests,
        "rounds": rounds,
        "concurrency": concurrency,
        "latency": latency,
        "shares": shares,
        "cpu": used / rounds / requests,
        "used_by_others": max(0.0, others),
        "memory_growth": memory[-1] - memory[0],
        "cached_rate": rounds * requests / cached,
        "cache_bytes": size / rounds / requests,
    }


def timed(client: OpenAIClient, first: int, stop: int, cache: Path) -> float:
    """Seconds until the requests from `first` to before `stop` are answered."""
    before = time.monotonic()
    for _ in answers(client, asked(first, stop), cache=cache):
        pass
    return time.monotonic() - before


def _own_seconds(server: int) -> float:
    """Processor seconds of this process and of the server."""
    fields = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def asked(first: int, stop: int) -> Iterator[tuple[int, Request]]:
    for i in range(first, stop):
        yield i, Request((("user", f"{i}: {TEXT}"),), top_logprobs=5, schema={"enum": [0, 1]})


def report(record: dict[str, Any]) -> str:
    """The record as a table."""
    rows = [
        ["bound, requests/s", f"{record['concurrency'] / record['latency']:,.1f}"],
        [f"share of the bound, best round (target {TARGET})", f"{max(record['shares']):.3f}"],
        ["share of the bound, median", f"{statistics.median(record['shares']):.3f}"],
        ["processor time of a request, ms", f"{1e3 * record['cpu']:.2f}"],
        ["processors used by other programs", f"{record['used_by_others']:.0%}"],
        ["growth of memory, MB", f"{record['memory_growth'] / 1e6:.1f}"],
        ["from the cache, requests/s", f"{record['cached_rate']:,.0f}"],
        ["cache, bytes of a request", f"{record['cache_bytes']:,.0f}"],
    ]
    how = f"{record['concurrency']} at once, {1e3 * record['latency']:g} ms each"
    head = f"{record['rounds']} x {record['requests']:,} requests, {how}"
    return table([head, ""], rows)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--requests", type=command.whole(10), default=800, help="requests of a round (800)")
    parser.add_argument("--rounds", type=command.whole(1), default=5, help="number of rounds (5)")
    parser.add_argument("--concurrency", type=command.whole(1), default=8, help="requests at once (8)")
    parser.add_argument("--latency-ms", type=command.whole(1), default=50, help="time of an answer (50)")
    args = parser.parse_args()
    sizes = {"requests": args.requests, "rounds": args.rounds, "concurrency": args.concurrency}
    record = measure(**sizes, latency=args.latency_ms / 1e3)
    command.write_json(args.json, record)
    print(report(record))


if __name__ == "__main__":
    command.run(main)
