"""Speed of the feature database and the explorer's questions and, with --peers, of sae-dashboard; on a CPU.

    python scripts/bench/features.py runs/quickstart --json features.json
    python scripts/bench/features.py runs/quickstart --peers DASHBOARD_VENV/bin/python

RUN is a run folder, such as `saelab run quickstart` makes. Every figure comes from its own process (ours_features.py,
paint.py, peer_dashboard.py). `index` and the bare forward pass run one right after the other, in an order that
alternates between rounds; the median of the ratios is reported. sae-dashboard 0.8 needs an environment of its own:

    python -m venv DASHBOARD_VENV
    DASHBOARD_VENV/bin/pip install sae-dashboard==0.8.0 torch==2.13.0 'numpy>=2'
    DASHBOARD_VENV/bin/pip uninstall torchvision torchaudio
"""

import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import command
import ours_features
import paint
import peer_dashboard
from processes import Processes, add_options, failures, heading
from table import table

from saelab.demo import MODEL
from saelab.errors import SaelabError
from saelab.runs import folder as runs

BIG = {"n_features": 1 << 20, "tokens": 2_000_000, "l0": 64, "vocabulary": 50_000}
"""The made-up database: 25 bytes of disk for each of 128 M entries while it is written."""
ROOM = 16_000_000_000
"""Bytes of disk that everything takes."""


def measure(
    run: Path,
    *,
    rounds: int = 3,
    tokens: int = 1_000_000,
    peer_features: int = 256,
    peers: Path | None = None,
    folder: Path | None = None,
    big: dict[str, int] = BIG,
    threads: int | None = None,
) -> dict[str, Any]:
    """The record that --json writes. Raises SaelabError if there is no run or no room, or if a measurement fails."""
    runs.check_run(run)
    work = Path(tempfile.mkdtemp(prefix="saelab-bench-", dir=folder))
    try:
        if shutil.disk_usage(work).free < ROOM:
            raise SaelabError(f"{work.parent}: {ROOM / 1e9:.0f} GB are needed; name another --folder")
        processes = Processes(threads, peers, ("sae-dashboard", "sae-lens", "transformer-lens"))
        record = processes.facts("torch", "numpy", "streamlit") | {"rounds": rounds, "big": big}
        record["index"] = [_round(processes, run, work, tokens, turn, rounds) for turn in range(rounds)]
        processes.label = "once"
        record["made_up"] = processes.ours(ours_features.made_up, folder=work / "big", **big)
        record["queries"] = processes.ours(ours_features.queries, folder=work / "big")
        record["queries"]["feature_page_cold"] = processes.ours(ours_features.cold, folder=work / "big")
        record["paint"] = processes.ours(paint.paint, run=run)
        if peers:
            with processes.row("sae_dashboard"):
                record["sae_dashboard"] = _beside_peer(processes, run, work / "index-0", peer_features)
        return record | processes.outcome()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _round(processes: Processes, run: Path, work: Path, tokens: int, turn: int, rounds: int) -> dict[str, float]:
    processes.label = f"round {turn + 1} of {rounds}"
    found: dict[str, dict[str, float]] = {}
    for name in ("forward", "index") if turn % 2 else ("index", "forward"):
        if name == "index":
            found[name] = processes.ours(ours_features.index, run=run, folder=work / f"index-{turn}", tokens=tokens)
        else:
            found[name] = processes.ours(ours_features.forward, run=run, tokens=tokens)
    index, forward = found["index"], found["forward"]
    with_text = index["seconds"] - index["weight_seconds"]
    return {
        "ratio": (index["tokens"] / with_text) / (forward["tokens"] / forward["seconds"]),
        "tokens_per_s": index["tokens"] / with_text,
        "forward_tokens_per_s": forward["tokens"] / forward["seconds"],
        "weight_ms_per_feature": 1000 * index["weight_seconds"] / index["features"],
        "features_per_s": index["features"] / index["seconds"],
    }


def _beside_peer(processes: Processes, run: Path, database: Path, n: int) -> dict[str, Any]:
    """Features per second of both on the same autoencoder, model and text, and how far their top examples agree."""
    ours = _tops(database, n)
    job = {"model": MODEL, "checkpoint": run / runs.CHECKPOINT, "database": database, "bos": 0}
    hook = json.loads((database / "manifest.json").read_text(encoding="utf-8"))["site"]
    theirs = processes.peer(peer_dashboard.dashboards, features=[int(f) for f in ours], hook=hook, **job)
    same = [len(set(map(tuple, ours[f])) & set(map(tuple, theirs["tops"][f]))) / max(1, len(ours[f])) for f in ours]
    return {
        "features": n,
        "features_per_s": theirs["features"] / theirs["seconds"],
        "same_top_examples": statistics.mean(same),
    }


def _tops(database: Path, n: int) -> dict[str, list[list[int]]]:
    """(row, position) of the strongest activations of the first `n` features that are active, as sae-dashboard takes
    them: the 20 largest, of which several may lie in one row, and none among the first 6 or last 5 tokens of one."""
    from saelab.features.database import open_database

    opened = open_database(database)
    context, found = opened.facts.rows.shape[1], {}
    for feature in range(opened.n_features):
        places, values = opened.facts.activations(feature)
        inside = (places % context >= 6) & (places % context < context - 5)
        places, values = places[inside], values[inside]
        if len(places) >= 20 and len(found) < n:
            best = (-values).argsort(kind="stable")[:20]
            found[str(feature)] = [list(divmod(int(place), context)) for place in places[best]]
    return found


def report(record: dict[str, Any]) -> str:
    """The record as a table."""
    median = {key: statistics.median(each[key] for each in record["index"]) for key in record["index"][0]}
    queries, paints = record["queries"], record["paint"]
    ratios = " ".join(f"{each['ratio']:.2f}" for each in record["index"])
    rows = [
        ["index, tokens/s / the same forward pass + encode", f"{median['ratio']:.2f}", ">= 0.70", ratios],
        ["index, tokens/s", f"{median['tokens_per_s']:,.0f}", "", ""],
        ["columns from the weights, ms per feature", f"{median['weight_ms_per_feature']:.2f}", "", ""],
    ]
    for name, what, target in (
        ("feature_page", "a feature's page, ms", 10),
        ("feature_page_cold", "the same out of the page cache, ms", 50),
        ("table_page", "filter, sort, first 200 rows, ms", 300),
        ("search", "search, ms", None),
    ):
        most = f"{1000 * queries[name]['max']:.1f} at most"
        rows.append([what, f"{1000 * queries[name]['median']:.1f}", f"<= {target}" if target else "", most])
    rows.append(["memory of these questions, MB", f"{queries['own_bytes'] / 1e6:.0f}", "<= 1,000", ""])
    for name, what, target in (("first_paint", "first paint, s", 2), ("content", "content, s", 3)):
        rows.append([f"a feature's page of the run, cold, {what}", f"{paints[name]:.2f}", f"<= {target}", ""])
    if found := record.get("sae_dashboard"):
        ratio = median["features_per_s"] / found["features_per_s"]
        theirs = f"{median['features_per_s']:.0f} against {found['features_per_s']:.2f}"
        rows.append(["features/s / sae-dashboard's", f"{ratio:.0f}", ">= 20", theirs])
        rows.append(["share of equal top examples", f"{found['same_top_examples']:.3f}", "", ""])
    made = record["made_up"]
    sizes = f"made up: {made['n_features']:,} features, {made['n_tokens']:,} tokens, {made['entries']:,} entries"
    head = ["the feature database", "figure", "target", ""]
    return "\n\n".join(filter(None, [heading(record, sizes), table(head, rows), failures(record)]))


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder of the demo model")
    parser.add_argument("--rounds", type=command.whole(1), default=3, help="number of rounds (3)")
    parser.add_argument(
        "--tokens", type=command.whole(1), default=1_000_000, help="tokens that are indexed (1,000,000)"
    )
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
