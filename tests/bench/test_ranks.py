"""The record and the report of the benchmark of several processes. No test here looks at how fast they were."""

from typing import Any

import pytest
import ranks
from processes import Function, Processes


def test_each_layout_is_compared_with_the_one_process_of_its_round(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []

    def canned(self: Processes, function: Function, arguments: dict[str, Any], isolated: bool) -> tuple[Any, float]:
        layout = (arguments["data"], arguments["features"], arguments["threads"])
        asked.append(layout)
        turn = asked.count(layout)
        return {(1, 1, 2): 1000.0 * turn, (2, 1, 1): 900.0 * turn, (1, 2, 1): 700.0}[layout], 0.0

    monkeypatch.setattr(Processes, "_measured", canned)
    record = ranks.measure(rounds=2, tokens=16_384)
    one, data, features = (1, 1, 2), (2, 1, 1), (1, 2, 1)
    assert asked == [one, data, features, data, features, one]
    assert record["ratios"] == {"data": [0.9, 0.9], "features": [0.7, 0.35]}
    shown = ranks.report(record)
    assert all(figure in shown for figure in ("1,500", "1,350", "0.90", ">= 0.9", ">= 0.8", "0.70 0.35"))
