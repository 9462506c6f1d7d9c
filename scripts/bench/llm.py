"""Requests to a language model's server that answers after a fixed time: how near to the bound of its concurrency.

    python scripts/bench/llm.py                                  # 50 ms, 8 at once
    python scripts/bench/llm.py --latency-ms 20 --json llm.json

The bound is concurrency / latency. The server is the tests' (tests/autointerp/server.py) in a process of its own; its
time for a request and ours count against us. Memory is the growth of this process from a tenth of the requests on.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command
from table import table

from saelab.autointerp.llm.answers import answers
from saelab.autointerp.llm.openai_client import OpenAIClient
from saelab.autointerp.llm.protocol import Request

ROOT = Path(__file__).parents[2]
TARGET = 0.9
"""Smallest share of the bound."""
TEXT = "The quick brown fox jumps over the lazy dog. " * 40


def measure(*, requests: int, concurrency: int, latency: float) -> dict[str, Any]:
    """The record that --json writes."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.autointerp.server", "--latency", str(latency)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        client = OpenAIClient(server.stdout.readline().strip(), "any", concurrency=concurrency)
        with tempfile.TemporaryDirectory() as folder:
            cache = Path(folder) / "cache"
            list(answers(client, asked(-concurrency, 0), cache=cache))  # connections, and what is made once
            before, memory = time.monotonic(), 0
            for i, _ in answers(client, asked(0, requests), cache=cache):
                if i == requests // 10:
                    memory = resident()
            seconds, grown = time.monotonic() - before, resident() - memory
            before = time.monotonic()
            for _ in answers(client, asked(0, requests), cache=cache):
                pass
            again = time.monotonic() - before
            size = cache.stat().st_size
    finally:
        server.kill()
        server.wait()
    bound = concurrency / latency
    rate = requests / seconds
    return {
        "requests": requests,
        "concurrency": concurrency,
        "latency": latency,
        "bound": bound,
        "rate": rate,
        "share": rate / bound,
        "memory_growth": grown,
        "cached_rate": requests / again,
        "cache_bytes": size,
    }


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def asked(first: int, stop: int) -> Iterator[tuple[int, Request]]:
    for i in range(first, stop):
        yield i, Request((("user", f"{i}: {TEXT}"),), top_logprobs=5, schema={"enum": [0, 1]})


def report(record: dict[str, Any]) -> str:
    """The record as a table."""
    rows = [
        ["bound, requests/s", f"{record['bound']:,.1f}"],
        ["answered, requests/s", f"{record['rate']:,.1f}"],
        [f"share of the bound (target {TARGET})", f"{record['share']:.3f}"],
        ["growth of memory, MB", f"{record['memory_growth'] / 1e6:.1f}"],
        ["from the cache, requests/s", f"{record['cached_rate']:,.0f}"],
        ["cache, bytes per request", f"{record['cache_bytes'] / record['requests']:,.0f}"],
    ]
    head = f"{record['requests']:,} requests, {record['concurrency']} at once, {1e3 * record['latency']:g} ms each"
    return table([head, ""], rows)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--requests", type=command.whole(10), default=3000, help="number of requests (3000)")
    parser.add_argument("--concurrency", type=command.whole(1), default=8, help="requests at once (8)")
    parser.add_argument("--latency-ms", type=command.whole(1), default=50, help="time of an answer (50)")
    args = parser.parse_args()
    record = measure(requests=args.requests, concurrency=args.concurrency, latency=args.latency_ms / 1e3)
    command.write_json(args.json, record)
    print(report(record))


if __name__ == "__main__":
    command.run(main)
