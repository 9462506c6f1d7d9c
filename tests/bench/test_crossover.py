"""The crossover is found between two densities, and both ways are timed. No test looks at how fast anything was."""

import json

import crossover
import pytest
from processes import Function, Processes


def test_both_ways_are_timed_as_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELAB_KERNELS", "cpu")  # restored afterwards
    ms = crossover.products((8, 4, 16), 0.5, repeats=3)
    assert set(ms) == {"sparse", "dense"} and all(len(times) == 3 and min(times) > 0 for times in ms.values())


def test_the_crossover_lies_between_the_densities_around_it() -> None:
    assert crossover.crossover([(0.1, 0.5), (0.4, 2.0), (0.5, 3.0)]) == pytest.approx(0.2)
    assert crossover.crossover([(0.1, 0.25), (0.2, 1.0)]) == pytest.approx(0.2)
    assert crossover.crossover([(0.1, 0.5), (0.2, 0.9)]) is None


def test_the_record_and_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def canned(self: Processes, function: Function, arguments: dict, isolated: bool) -> tuple[dict, float]:
        return {"sparse": [4.0 * arguments["density"]] * 2, "dense": [1.0, 1.0]}, 0.25

    monkeypatch.setattr(Processes, "_measured", canned)
    record = crossover.measure([(8, 4, 16)], 2, 1)
    assert json.loads(json.dumps(record)) == record
    assert record["crossovers"] == pytest.approx([0.25])
    assert "As fast at density: 0.250." in crossover.report(record)
