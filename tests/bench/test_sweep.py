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
        asked.append((function.__name__, arguments.get("number")))
        if function is ours_sweep.memory:
            return {"growth": 95e6, "planned": 100e6}, 0.0
        together = function is ours_sweep.together
        return {"seconds": 40.0 if together else 10.0, "trained": 36.0 if together else 6.0}, 0.0

    monkeypatch.setattr(Processes, "_measured", canned)
    record = sweep.measure(rounds=2, tokens=1024, held_out=1024)
    runs = [("one_by_one", number) for number in range(8)]
    assert asked == [("together", None), *runs, *runs, ("together", None), ("memory", None)]
    times = record["times"]
    assert times["seconds"]["ratio"] == 0.5 and times["trained"]["ratio"] == 0.75
    shown = sweep.report(record)
    assert all(figure in shown for figure in ("40.0", "80.0", "0.50", "36.0", "48.0", "0.75", "95", "100", "0.95"))


def test_the_runs_have_the_quickstarts_size() -> None:
    runs = grid("quickstart", ours_sweep.VARIED)
    assert len(runs) == sweep.RUNS and {run.settings.sae.n_features for run in runs} == {4096}
