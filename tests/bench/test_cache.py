"""The benchmark runs, and its record has the promised form. No test here looks at how fast anything was."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cache
import child
import ours_cache
import peer_cache
import pytest
from cache import PAIRS, Size
from processes import Function, MeasurementError, Processes

from saelab.activations.cache.reader import open_cache
from saelab.errors import SaelabError

TOKENS = 17 * ours_cache.PASS_TOKENS
"""A shard and a pass of the next."""
TINY = Size(tokens=TOKENS, few_tokens=ours_cache.PASS_TOKENS, d_in=4, passes=2, warmup=1, end_to_end_tokens=8192)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    ours_cache.write(str(tmp_path / "cache"), TOKENS, d_in=4, dtype="bfloat16", activations="float32")
    return tmp_path / "cache"


def test_what_is_read_is_a_real_cache(written: Path) -> None:
    found = open_cache(written)
    assert found.tokens == TOKENS and [shard["tokens"] for shard in found.manifest.shards] == [131_072, 8192]
    values = next(found.in_order(ours_cache.SITE)).values
    assert values.shape[1] == 4 and values.float().std() > 0.5


def test_both_sides_of_a_comparison_write_and_read_the_same_bytes(written: Path, tmp_path: Path) -> None:
    raw = ours_cache.raw_write(str(tmp_path / "raw"), TOKENS, d_in=4, dtype="bfloat16")
    lengths = [
        sorted(path.stat().st_size for path in files if path.is_file())
        for files in (written.glob("*/*"), (tmp_path / "raw").glob("*"))
    ]
    assert lengths[0] == lengths[1] and raw["bytes"] == sum(lengths[0])
    assert ours_cache.read(str(written))["bytes"] == ours_cache.raw_read(str(written))["bytes"] == raw["bytes"]
    assert ours_cache.warm(str(written))["tokens"] == TOKENS


def test_memory_counts_the_two_buffers(written: Path) -> None:
    found = ours_cache.memory(str(written))
    assert found["buffers"] == 2 * 131_072 * (2 * 4 + 12)
    assert found["tokens"] == TOKENS and found["growth"] > 0


def canned(self: Processes, function: Function, arguments: dict[str, Any], isolated: bool) -> tuple[Any, float]:
    """Made-up results for each kind of measurement."""
    if function is child.versions:
        return {"torch": "2.0", "sae-lens": "6.0"}, 0.0
    if function is ours_cache.memory:
        return {"growth": 5e8, "buffers": 4e8, "tokens": 1000}, 0.25
    seconds = {"raw_write": 0.5, "raw_read": 1.0, "model": 3.0}.get(function.__name__, 8.0 if isolated else 2.0)
    result = {"seconds": seconds, "bytes": 100, "values": 100, "tokens": 100, "tokens_per_s": 100 / seconds}
    return result, 0.25


def test_the_record_and_its_ratios(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Processes, "_measured", canned)
    record = cache.measure(rounds=2, peers=Path(sys.executable), folder=tmp_path, size=TINY, threads=1)
    assert json.loads(json.dumps(record)) == record
    assert {name: row["ratio"] for name, row in record["pairs"].items()} == {
        "writing": 0.25,
        "reading": 0.5,
        "caching": 1.5,
        "sae_lens_float32": 4.0,
        "sae_lens_bfloat16": 4.0,
    }
    assert set(record["pairs"]) == set(PAIRS)
    assert all(len(row["rounds"]) == 2 for row in record["pairs"].values())
    assert record["warm"]["tokens_per_s"] == 50 and len(record["memory"]) == 2
    assert record["end_to_end"]["sae_lens"]["tokens_per_s"] == 12.5
    assert record["versions"]["sae-lens"] == "6.0" and record["used_by_others"] == {"median": 0.25, "max": 0.25}
    assert not list(tmp_path.iterdir()), "what was written is removed"
    assert {"machine", "versions", "peers_torch", "size", "threads", "rounds", "peer_note"} <= set(record)
    assert "file_system" in record["machine"] and set(record["end_to_end"]) == {"ours", "sae_lens"}
    shown = cache.report(record)
    assert "1.50" in shown and "end to end" in shown


def test_compared_measurements_alternate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order: list[str] = []

    def noted(self: Processes, function: Function, arguments: dict[str, Any], isolated: bool) -> tuple[Any, float]:
        if function is not child.versions:
            order.append("peer" if isolated else f"{function.__name__} {arguments.get('dtype', '')}".strip())
        return canned(self, function, arguments, isolated)

    monkeypatch.setattr(Processes, "_measured", noted)
    cache.measure(rounds=3, peers=Path(sys.executable), folder=tmp_path, size=TINY, threads=1)
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
    """A ratio is of consecutive measurements: no figure of the peer is in two ratios."""
    seconds = iter(range(1, 100))

    def slower_and_slower(
        self: Processes, function: Function, arguments: dict[str, Any], isolated: bool
    ) -> tuple[Any, float]:
        result, others = canned(self, function, arguments, isolated)
        return result | ({"seconds": next(seconds)} if function is peer_cache.write else {}), others

    monkeypatch.setattr(Processes, "_measured", slower_and_slower)
    record = cache.measure(rounds=2, peers=Path(sys.executable), folder=tmp_path, size=TINY, threads=1)
    rounds = [row for name in ("float32", "bfloat16") for row in record["pairs"][f"sae_lens_{name}"]["rounds"]]
    assert len({row["other"] for row in rounds}) == len(rounds) == 4
    assert all(row["ratio"] == row["ours"] / row["other"] for row in rounds)


def test_a_comparison_in_which_the_peer_fails_is_a_failed_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def the_peer_fails(
        self: Processes, function: Function, arguments: dict[str, Any], isolated: bool
    ) -> tuple[Any, float]:
        if function in (peer_cache.write, peer_cache.end_to_end):
            raise MeasurementError("RuntimeError: no room", ["python"], peers=True)
        return canned(self, function, arguments, isolated)

    monkeypatch.setattr(Processes, "_measured", the_peer_fails)
    record = cache.measure(rounds=2, peers=Path(sys.executable), folder=tmp_path, size=TINY, threads=1)
    assert record["failures"] == dict.fromkeys(
        ("sae_lens_float32", "sae_lens_bfloat16", "end_to_end"), "RuntimeError: no room"
    )
    assert set(record["pairs"]) == {"writing", "reading", "caching"} and "end_to_end" not in record
    assert all(len(row["rounds"]) == 2 for row in record["pairs"].values()) and len(record["memory"]) == 2
    lines = cache.report(record).splitlines()
    assert sum(" failed |" in line for line in lines) == 3 and "- end_to_end failed: RuntimeError: no room" in lines


def test_a_missing_interpreter_or_one_without_peers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match="no such interpreter; `make bench-peers`"):
        cache.measure(peers=tmp_path / "python", folder=tmp_path, size=TINY)
    with pytest.raises(SaelabError, match="it has none of sae-lens"):
        cache.measure(peers=Path(sys.executable), folder=tmp_path, size=TINY)


def test_a_folder_without_room_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SaelabError, match=r"GB are needed .* name another --folder"):
        cache.measure(folder=tmp_path, size=Size(tokens=10**15))
    with pytest.raises(SaelabError, match="cannot be written to"):
        cache.measure(folder=tmp_path / "missing", size=TINY)


@pytest.mark.slow
def test_every_measure_runs_in_its_own_process(tmp_path: Path) -> None:
    record = cache.measure(rounds=1, folder=tmp_path, size=TINY, threads=1)
    assert set(record["pairs"]) == {"writing", "reading", "caching"}
    assert all(min(row["ours"], row["other"], row["ratio"]) > 0 for row in record["pairs"].values())
    assert record["warm"]["tokens_per_s"] > 0
    assert [row["tokens"] for row in record["memory"]] == [TINY.few_tokens, TINY.tokens]
    assert not list(tmp_path.iterdir())


def test_the_peers_file_needs_nothing_of_saelab(tmp_path: Path) -> None:
    """The call is that of --peers: isolated, up to the import of sae-lens."""
    arguments = {"folder": str(tmp_path), "tokens": 8192, "d_in": 4, "buffer_tokens": 8192}
    command = [sys.executable, "-I", child.__file__, peer_cache.__file__, "write", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "No module named 'sae_lens'" in done.stderr
