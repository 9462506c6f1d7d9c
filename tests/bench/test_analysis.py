"""The benchmark of the analyses runs each of them on made-up blocks that hold what they say."""

import argparse
import json
import sys

import analysis
import pytest


def test_every_analysis_is_measured(tmp_path, monkeypatch, capsys):
    path = tmp_path / "found.json"
    sizes = ["--tokens", "8192", "--d-in", "16", "--n-features", "64", "--k", "4"]
    monkeypatch.setattr(sys, "argv", ["analysis.py", *sizes, "--json", str(path)])
    analysis.main()
    printed = capsys.readouterr().out
    found = json.loads(path.read_text())
    assert all(found[name]["seconds"] > 0 for name in analysis.ANALYSES)
    assert all(name in printed for name in analysis.ANALYSES)


def test_made_up_blocks_cover_the_rows_and_features_fall_in_density():
    args = argparse.Namespace(tokens=16_384, d_in=8, n_features=64, k=4)
    blocks = list(made := analysis.MadeUp(args))
    assert [block.first_row for block in blocks] == [0, 16, 32, 48] and made.seconds > 0
    assert sum(len(block.x) for block in blocks) == 16_384
    counts = sum(block.codes.firing_counts() for block in blocks)
    assert counts[:8].sum() > 2 * counts[-8:].sum()
    assert blocks[1].row_of_token().min() == 16 and blocks[0].codes.l0().float().mean() == pytest.approx(4)
