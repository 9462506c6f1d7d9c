"""A sweep of eight autoencoders of the quickstart's size beside the eight trained one by one; on a CPU.

    python scripts/bench/sweep.py --threads 1                         # the quickstart's million tokens
    python scripts/bench/sweep.py --threads 1 --tokens 204800 --held-out 65536 --rounds 3 --json sweep.json

One process sweeps, as `saelab sweep` does, beside sixteen, one `saelab train` and one `saelab eval` for each run, from
the start of each process to its end (ours_sweep.py): loading, the language model, training and evaluation. In each
round the sweep comes first and then the eight, or the other way round; the ratio of both is taken, and the median of
the rounds is reported. Processor time is what the processes used, in all threads; other programs change it little. The
memory of the sweep is what a process grows by at most, beside the plan.
"""

import statistics
import tempfile
import time
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

    def timed(function: Any, **arguments: Any) -> dict[str, float]:
        begin = time.monotonic()
        return run.ours(function, **size, **arguments) | {"seconds": time.monotonic() - begin}

    def together() -> dict[str, float]:
        return timed(ours_sweep.together)

    def one_by_one() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as out:
            trained = [timed(ours_sweep.train_one, number=number, out=out) for number in range(RUNS)]
            evaluated = [timed(ours_sweep.evaluate_one, number=number, out=out) for number in range(RUNS)]
        sums = {name: sum(one[name] for one in trained + evaluated) for name in ("processor", "seconds")}
        return sums | {"trained": sum(one["processor"] for one in trained)}

    for turn in range(1, rounds + 1):
        run.label = f"round {turn} of {rounds}"
        sides = [together, one_by_one] if turn % 2 else [one_by_one, together]
        found.append({side.__name__: side() for side in sides})
    run.label = "once"
    record["memory"] = run.ours(ours_sweep.memory, **size)
    record["times"] = {
        name: {
            "together": statistics.median(one["together"][name] for one in found),
            "one_by_one": statistics.median(one["one_by_one"][name] for one in found),
            "ratio": statistics.median(one["together"][name] / one["one_by_one"][name] for one in found),
            "rounds": [one["together"][name] / one["one_by_one"][name] for one in found],
        }
        for name in ("processor", "seconds", "trained")
    }
    return record | run.outcome()


def report(record: dict[str, Any]) -> str:
    """The record as a table."""
    rows = []
    for name, what in (
        ("processor", "processor time, s"),
        ("seconds", "time, s"),
        ("trained", "processor time without evaluation, s"),
    ):
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
