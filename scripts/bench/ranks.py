"""Training by several processes beside one process with as many threads: tokens per second; on a CPU.

    python scripts/bench/ranks.py                          # 2 processes of one thread beside 1 of two
    python scripts/bench/ranks.py --processes 4 --rounds 5 --json ranks.json

The quickstart is trained, language model included. In each round every layout is measured once, in turn, and its ratio
to the one process of that round is taken; the median of the rounds is reported.
"""

import statistics
from pathlib import Path
from typing import Any

import command
import ours_ranks
from processes import Processes, failures, heading
from table import table

TARGETS = {"data": 0.9, "features": 0.8}
"""Smallest ratios."""


def measure(*, rounds: int = 3, tokens: int = 131_072, processes: int = 2) -> Any:
    """The record that --json writes. Raises SaelabError if a measurement fails."""
    run = Processes(processes, None, ())
    record = run.facts("torch", "transformers") | {"tokens": tokens, "rounds": rounds, "processes": processes}
    layouts = {"one": (1, 1, processes), "data": (processes, 1, 1), "features": (1, processes, 1)}
    rates: dict[str, list[float]] = {name: [] for name in layouts}
    for turn in range(rounds):
        run.label = f"round {turn + 1} of {rounds}"
        names = [*layouts][turn % 3 :] + [*layouts][: turn % 3]
        for name in names:
            data, features, threads = layouts[name]
            size = {"data": data, "features": features, "threads": threads}
            rates[name].append(run.ours(ours_ranks.rate, **size, tokens=tokens))
    record["rates"] = {name: statistics.median(found) for name, found in rates.items()}
    record["ratios"] = {name: [a / b for a, b in zip(rates[name], rates["one"], strict=True)] for name in TARGETS}
    return record | run.outcome()


def report(record: dict[str, Any]) -> str:
    """The record as a table."""
    many = record["processes"]
    names = {"data": f"{many} processes, tokens shared", "features": f"{many} processes, features shared"}
    rows = [[f"1 process, {many} threads", f"{record['rates']['one']:,.0f}", "1", "", ""]]
    for name, ratios in record["ratios"].items():
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        median = f"{statistics.median(ratios):.2f}"
        rows.append([names[name], f"{record['rates'][name]:,.0f}", median, f">= {TARGETS[name]}", each])
    head = ["training of the quickstart", "tokens/s", "ratio", "target", "of the rounds"]
    size = f"{record['tokens']:,} tokens, medians of {record['rounds']} rounds"
    return "\n\n".join(filter(None, [heading(record, size), table(head, rows), failures(record)]))


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--rounds", type=command.whole(1), default=3, help="number of rounds (3)")
    parser.add_argument(
        "--tokens", type=command.whole(2 * ours_ranks.BUFFER), default=131_072, help="trained on (131,072)"
    )
    parser.add_argument("--processes", type=command.whole(2), default=2, help="of one thread each (2)")
    options = vars(parser.parse_args())
    json_file: Path | None = options.pop("json")
    record = measure(**options)
    command.write_json(json_file, record)
    print(report(record))


if __name__ == "__main__":
    command.run(main)
