"""The study of all architectures: its settings are those of the shipped configs, and its tables what runs measured."""

from pathlib import Path

import architectures
import pytest

from saelab.files import write_json
from saelab.runs import folder
from saelab.runs.grid import grid


def test_interpolation_is_straight_between_logarithms_and_beyond_the_ends():
    points = {x: 3 * x**-0.5 for x in (4.0, 16.0, 64.0)}
    for x in (2.0, 9.0, 16.0, 100.0):
        assert architectures.interpolated(x, points) == pytest.approx(3 * x**-0.5)
    assert architectures.interpolated(5.0, {7.0: 2.0}) == pytest.approx(2)


def test_each_architecture_is_its_shipped_config_at_three_l0(tmp_path: Path):
    options = architectures.Options(tmp_path, None, (), ())
    for name in architectures.ARCHITECTURES:
        if not architectures.values_of(name):
            assert name in architectures.PILOTS
            continue
        first, seeds = (
            grid(architectures.config_of(options, name), part) for part in architectures.sweeps(options, name)
        )
        assert [len(first), len(seeds)] == [3, 2]
        assert {run.settings.sae.n_features for run in (*first, *seeds)} == {4096}
        assert {run.settings.training.batch for run in first} == {1024}
        if name in ("token_choice", "matryoshka, token_choice"):
            assert first[0].settings.sae.allocation.name == "token_choice"


def test_tables_have_the_finished_runs_best_first(tmp_path: Path):
    options = architectures.Options(tmp_path, None, (), ())
    for name, fvu in (("token_choice", 0.2), ("mutual_choice", 0.1)):
        for run in grid(architectures.config_of(options, name), architectures.sweeps(options, name)[0]):
            k, path = run.settings.sae.k, Path(run.settings.out)
            found = {"l0": float(k), "fvu": fvu / k, "loss_recovered_mean": 0.9, "site": "s"}
            path.mkdir(parents=True)
            write_json(path / folder.TRAINING, {"complete": True})
            write_json(path / folder.EVALUATION, found | {"never_active_share": 0.01, "share_below_1e4": 0.25})
    tables = architectures.report(options).split("\n\n")
    assert len(tables) == 3 and (tmp_path / "pareto.html").is_file()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables[1].splitlines()[2:]]
    assert [row[0] for row in rows] == ["mutual_choice", "token_choice"]
    assert rows[1][1:] == ["1", "32.0", "0.0063", "0.0063", "0.9000", "1.00", "25.0", ""]
