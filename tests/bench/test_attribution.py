"""The benchmark of attribution measures every method on a run."""

import json
import sys
from pathlib import Path

import attribution


def test_every_method_is_measured(trained_run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "found.json"
    monkeypatch.setattr(attribution, "STEPS", (2, 32))
    monkeypatch.setattr(
        sys, "argv", ["attribution.py", str(trained_run), "--tokens", "200", "--features", "5", "--json", str(path)]
    )
    attribution.main()
    printed = capsys.readouterr().out
    found = json.loads(path.read_text())
    names = ("gradient", "integrated, 2 steps", "integrated, 32 steps", "exact")
    assert all(found[name]["seconds"] > 0 and name in printed for name in names)
    assert found["exact"]["rank_correlation"] > 0.9999
    assert found["integrated, 32 steps"]["gap"] < found["integrated, 2 steps"]["gap"]
