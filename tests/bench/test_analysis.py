"""The benchmark of the analyses runs each of them on made-up blocks that hold what they say."""

import argparse
import json
import sys

import analysis
import pytest

SMALL = argparse.Namespace(tokens=8192, d_in=16, n_features=64, k=4, few=128, features=2)


@pytest.mark.parametrize(
    "name", [*analysis.PURE, *(pytest.param(name, marks=pytest.mark.slow) for name in analysis.ITERATIVE)]
)
def test_every_analysis_is_measured(name):
    found = analysis.measure(name, SMALL)
    assert found["seconds"] > 0 and found["processor_seconds"] > 0 and found["peak_bytes"] > 1e7


def test_the_command_measures_in_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    path = tmp_path / "found.json"
    sizes = ["--tokens", "8192", "--d-in", "16", "--n-features", "64", "--k", "4"]
    monkeypatch.setattr(sys, "argv", ["analysis.py", *sizes, "--json", str(path), "--only", "dead"])
    analysis.main()
    found = json.loads(path.read_text())
    assert found["dead"]["seconds"] > 0 and "| dead " in capsys.readouterr().out


def test_made_up_blocks_cover_the_rows_and_features_fall_in_density():
    case = analysis.Case(argparse.Namespace(tokens=16_384, d_in=8, n_features=64, k=4))
    blocks = list(case.blocks(case.rows))
    assert [block.first_row for block in blocks] == [0, 16, 32, 48] and (case.outside > 0).all()
    assert sum(len(block.x) for block in blocks) == 16_384
    counts = sum(block.codes.firing_counts() for block in blocks)
    assert counts[:8].sum() > 2 * counts[-8:].sum()
    assert blocks[1].row_of_token().min() == 16 and blocks[0].codes.l0().float().mean() == pytest.approx(4)
