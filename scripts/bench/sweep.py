"""A sweep of eight autoencoders of the quickstart's size beside the eight trained one by one; on a CPU.

    python scripts/bench/sweep.py                                     # the quickstart's million tokens
    python scripts/bench/sweep.py --tokens 131072 --held-out 32768 --json sweep.json

Language model, loading and evaluation are included in both. Every figure comes from its own process (ours_sweep.py): in
each round the sweep is measured and then the eight runs, or the other way round; the ratio of both is taken, and the
median of the rounds is reported. The second row leaves out evaluation. The memory of the sweep is what the
process grows by at most, beside its plan.
"""

import statistics
from pathlib import Path
from typing import Any

import command
import ours_sweep
from processes import Processes, failures, heading
from table import table

RUNS = 8
TARGET = 0.5
"""Largest ratio of the times."""


def measure(*, rounds: int = 1, tokens: int = 1_000_000, held_out: int = 300_000, threads: int | None = None) -> Any:
    """The record that --json writes. Raises SaelabError if a measurement fails."""
    run, found = Processes(threads, None, ()), []
    record = run.facts("torch", "transformers") | {"tokens": tokens, "held_out": held_out, "rounds": rounds}
    size = {"tokens": tokens, "held_out": held_out}

    def alone() -> dict[str, float]:
        each = [run.ours(ours_sweep.one_by_one, number=number, **size) for number in range(RUNS)]
        return {name: sum(one[name] for one in each) for name in each[0]}

    for turn in range(1, rounds + 1):
        run.label = f"round {turn} of {rounds}"
        if turn % 2:
            together, apart = run.ours(ours_sweep.together, **size), alone()
        else:
            apart, together = alone(), run.ours(ours_sweep.together, **size)
        found.append({"together": together, "one_by_one": apart})
    run.label = "once"
    record["memory"] = run.ours(ours_sweep.memory, **size)
    record["times"] = {
        name: {
            "together": statistics.median(one["together"][name] for one in found),
            "one_by_one": statistics.median(one["one_by_one"][name] for one in found),
            "ratio": statistics.median(one["together"][name] / one["one_by_one"][name] for one in found),
            "rounds": [one["together"][name] / one["one_by_one"][name] for one in found],
        }
        for name in ("seconds", "trained")
    }
    return record | run.outcome()


def report(record: dict[str, Any]) -> str:
    """The record as a table."""
    rows = []
    for name, what in (("seconds", "loading, training, evaluation, s"), ("trained", "loading and training, s")):
        row = record["times"][name]
        each = " ".join(f"{ratio:.2f}" for ratio in row["rounds"])
        times = [f"{row[side]:.1f}" for side in ("together", "one_by_one")]
        rows.append([what, *times, f"{row['ratio']:.2f}", f"<= {TARGET}", each])
    memory = record["memory"]
    sizes = [f"{memory[name] / 1e6:.0f}" for name in ("growth", "planned")]
    rows.append(["memory and its plan, MB", *sizes, f"{memory['growth'] / memory['planned']:.2f}", "0.9 to 1.1", ""])
    size = f"{record['tokens']:,} tokens, {record['held_out']:,} held out, medians of {record['rounds']} rounds"
    head = [f"a sweep of {RUNS}", "together", "one by one", "ratio", "target", "of the rounds"]
    return "\n\n".join(filter(None, [heading(record, size), table(head, rows), failures(record)]))


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--rounds", type=command.whole(1), default=1, help="number of rounds (1)")
    parser.add_argument("--tokens", type=command.whole(1024), default=1_000_000, help="trained on (1,000,000)")
    parser.add_argument("--held-out", type=command.whole(1024), default=300_000, help="evaluated on (300,000)")
    parser.add_argument("--threads", type=command.whole(1), help="of every process (default: all processors)")
    options = vars(parser.parse_args())
    json_file: Path | None = options.pop("json")
    record = measure(**options)
    command.write_json(json_file, record)
    print(report(record))


if __name__ == "__main__":
    command.run(main)
