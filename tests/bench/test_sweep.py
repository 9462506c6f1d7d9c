"""The record and the report of the sweep's benchmark have the promised form. No test here looks at how fast it was."""

from typing import Any

import ours_sweep
import pytest
import sweep
from processes import Function, Processes

from saelab.runs.grid import grid


def test_the_ratio_is_of_the_sweep_and_the_sum_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def canned(self: Processes, function: Function, arguments: dict[str, Any], isolated: bool) -> tuple[Any, float]:
        asked.append((function, arguments.get("number")))
        if function is ours_sweep.memory:
            return {"growth": 95e6, "planned": 100e6}, 0.0
        if function is ours_sweep.together:
            return {"processor": 40.0, "trained": 36.0}, 0.0
        return {"processor": 6.0 if function is ours_sweep.train_one else 4.0}, 0.0

    monkeypatch.setattr(Processes, "_measured", canned)
    record = sweep.measure(rounds=2, tokens=1024, held_out=1024)
    runs = [(each, number) for each in (ours_sweep.train_one, ours_sweep.evaluate_one) for number in range(8)]
    sweeps = [(ours_sweep.together, None)]
    assert asked == [*sweeps, *runs, *runs, *sweeps, (ours_sweep.memory, None)]
    times = record["times"]
    assert times["processor"]["ratio"] == 0.5 and times["trained"]["ratio"] == 0.75
    assert times["seconds"]["together"] >= 0
    shown = sweep.report(record)
    assert all(figure in shown for figure in ("40.0", "80.0", "0.50", "36.0", "48.0", "0.75", "95", "100", "0.95"))


def test_the_runs_have_the_quickstarts_size() -> None:
    runs = grid("quickstart", ours_sweep.VARIED)
    assert len(runs) == sweep.RUNS and {run.settings.sae.n_features for run in runs} == {4096}
