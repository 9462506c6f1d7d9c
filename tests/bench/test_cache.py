"""The benchmark runs, and its record has the promised form. No test here looks at how fast anything was."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from saelab.activations.cache.reader import open_cache
from saelab.bench import cache, ours_cache, peer_cache, processes
from saelab.bench.cache import PAIRS, Size
from saelab.errors import SaelabError

TOKENS = 17 * ours_cache.PASS_TOKENS
"""A shard and a pass of the next."""
TINY = Size(tokens=TOKENS, few_tokens=ours_cache.PASS_TOKENS, d_in=4, passes=2, warmup=1, end_to_end_tokens=8192)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    ours_cache.write(tmp_path / "cache", TOKENS, d_in=4, dtype="bfloat16", given="float32")
    return tmp_path / "cache"


def test_what_is_read_is_a_real_cache(written: Path) -> None:
    found = open_cache(written)
    assert found.tokens == TOKENS and [shard["tokens"] for shard in found.manifest.shards] == [131_072, 8192]
    values = next(found.in_order(ours_cache.SITE)).values
    assert values.shape[1] == 4 and values.float().std() > 0.5


def test_both_of_a_pair_write_and_read_the_same_bytes(written: Path, tmp_path: Path) -> None:
    raw = ours_cache.raw_write(tmp_path / "raw", TOKENS, d_in=4, dtype="bfloat16")
    lengths = [
        sorted(path.stat().st_size for path in files if path.is_file())
        for files in (written.glob("*/*"), (tmp_path / "raw").glob("*"))
    ]
    assert lengths[0] == lengths[1] and raw["bytes"] == sum(lengths[0])
    assert ours_cache.read(written, cold=True)["bytes"] == ours_cache.raw_read(written)["bytes"] == raw["bytes"]
    assert ours_cache.read(written, cold=False)["tokens"] == TOKENS


def test_memory_counts_the_two_buffers(written: Path) -> None:
    found = ours_cache.memory(written)
    assert found["buffers"] == 2 * 131_072 * (2 * 4 + 12)
    assert found["tokens"] == TOKENS and found["growth"] > 0


def canned(command: list[str], threads: int, say: processes.Say) -> tuple[dict[str, Any], float]:
    """What a measurement of each kind returns, made up."""
    if "--versions" in command:
        return {"torch": "2.0", "sae-lens": "6.0"}, 0.0
    measure, peer = command[command.index("--measure") + 1], peer_cache.__file__ in command
    if measure == "memory":
        return {"growth": 5e8, "buffers": 4e8, "tokens": 1000}, 0.25
    seconds = {"raw_write": 0.5, "raw_read": 1.0, "model": 3.0}.get(measure, 8.0 if peer else 2.0)
    result = {"seconds": seconds, "bytes": 100, "values": 100, "tokens": 100, "tokens_per_s": 100 / seconds}
    return result, 0.25


def test_the_record_and_its_ratios(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(cache, "run_measurement", canned)
    record = cache.bench(rounds=2, peers=Path(sys.executable), folder=tmp_path, size=TINY, threads=1)
    assert json.loads(json.dumps(record)) == record
    assert {name: row["ratio"] for name, row in record["pairs"].items()} == {
        "writing": 0.25,
        "reading": 0.5,
        "caching": 1.5,
        "sae_lens_float32": 4.0,
        "sae_lens_bfloat16": 4.0,
    }
    assert set(record["pairs"]) == {measure.name for measure in PAIRS}
    assert all(len(row["rounds"]) == 2 for row in record["pairs"].values())
    assert record["warm"]["tokens_per_s"] == 50 and len(record["memory"]) == 2
    assert record["end_to_end"]["sae_lens"]["tokens_per_s"] == 12.5
    assert record["versions"]["sae-lens"] == "6.0" and record["used_by_others"] == {"median": 0.25, "max": 0.25}
    assert not list(tmp_path.iterdir()), "what was written is removed"
    cache.show(record)
    shown = capsys.readouterr().out
    assert "1.50" in shown and "end to end" in shown


def test_what_is_compared_takes_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order: list[str] = []

    def noted(command: list[str], threads: int, say: processes.Say) -> tuple[dict[str, Any], float]:
        if "--measure" in command:
            measure = command[command.index("--measure") + 1]
            dtype = command[command.index("--dtype") + 1] if "--dtype" in command else ""
            order.append("peer" if peer_cache.__file__ in command else f"{measure} {dtype}".strip())
        return canned(command, threads, say)

    monkeypatch.setattr(cache, "run_measurement", noted)
    cache.bench(rounds=3, peers=Path(sys.executable), folder=tmp_path, size=TINY, threads=1)
    pairs = [
        ["write", "raw_write"],
        ["read", "raw_read"],
        ["warm"],
        ["caching", "model"],
        ["write float32", "peer"],
        ["write bfloat16", "peer"],
    ]
    ours_first = [measure for pair in pairs for measure in pair]
    ours_last = [measure for pair in pairs for measure in reversed(pair)]
    assert order[: 3 * len(ours_first)] == ours_first + ours_last + ours_first


def test_every_round_has_its_own_figure_of_the_peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A ratio is of neighbours: no figure of the peer stands in two of them."""
    seconds = iter(range(1, 100))

    def slower_and_slower(command: list[str], threads: int, say: processes.Say) -> tuple[dict[str, Any], float]:
        result, others = canned(command, threads, say)
        return result | ({"seconds": next(seconds)} if peer_cache.__file__ in command else {}), others

    monkeypatch.setattr(cache, "run_measurement", slower_and_slower)
    record = cache.bench(rounds=2, peers=Path(sys.executable), folder=tmp_path, size=TINY, threads=1)
    rounds = [row for name in ("float32", "bfloat16") for row in record["pairs"][f"sae_lens_{name}"]["rounds"]]
    assert len({row["other"] for row in rounds}) == len(rounds) == 4
    assert all(row["ratio"] == row["ours"] / row["other"] for row in rounds)


def test_an_interpreter_that_is_none_or_has_no_peer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match="no such interpreter; `make bench-peers`"):
        cache.bench(peers=tmp_path / "python", folder=tmp_path, size=TINY)
    with pytest.raises(SaelabError, match="it has no sae-lens"):
        cache.bench(peers=Path(sys.executable), folder=tmp_path, size=TINY)


def test_a_folder_without_room_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match=r"GB are needed .* name another --folder"):
        cache.bench(folder=tmp_path, size=Size(tokens=10**15))
    with pytest.raises(SaelabError, match="cannot be written to"):
        cache.bench(folder=tmp_path / "missing", size=TINY)


@pytest.mark.slow
def test_every_measure_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    record = cache.bench(rounds=1, folder=tmp_path, size=TINY, threads=1)
    assert set(record["pairs"]) == {"writing", "reading", "caching"}
    assert all(min(row["ours"], row["other"], row["ratio"]) > 0 for row in record["pairs"].values())
    assert record["warm"]["tokens_per_s"] > 0
    assert [row["tokens"] for row in record["memory"]] == [TINY.few_tokens, TINY.tokens]
    assert not list(tmp_path.iterdir())


def test_the_peer_script_needs_nothing_of_saelab() -> None:
    done = subprocess.run(
        [sys.executable, "-I", peer_cache.__file__, "--versions"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "torch" in json.loads(done.stdout)
