"""The benchmark of requests runs, and its record has every figure. How fast anything was is not tested."""

import json
import sys

import llm
import pytest


def test_requests_are_measured(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "found.json"
    sizes = ["--requests", "20", "--rounds", "2", "--latency-ms", "1", "--concurrency", "2"]
    monkeypatch.setattr(sys, "argv", ["llm.py", *sizes, "--json", str(path)])
    llm.main()
    record = json.loads(path.read_text())
    assert len(record["shares"]) == 2 and all(0 < share <= 1 for share in record["shares"])
    assert (
        record["cpu"] > 0
        and 0 <= record["used_by_others"] <= 1
        and record["cached_rate"] > 0
        and record["cache_bytes"] > 50
    )
    assert f"{max(record['shares']):.3f}" in capsys.readouterr().out
