"""The front of a sweep equals its definition on every pair of runs, and the plot has each run once in each panel."""

import random

from saelab.analysis.pareto import front, plot_pareto


def test_the_front_is_what_no_other_point_beats() -> None:
    numbers = random.Random(0)
    points = [(float(numbers.randrange(8)), float(numbers.randrange(8))) for _ in range(40)]
    beaten = [any(a <= cost and b <= loss and (a, b) != (cost, loss) for a, b in points) for cost, loss in points]
    best = sorted({point for point, worse in zip(points, beaten, strict=True) if not worse})
    assert [points[i] for i in front(points)] == best and len(best) > 1
    assert front([]) == []


def test_a_run_without_figures_is_left_out_and_each_site_has_its_front() -> None:
    def run(name: str, site: str, *figures: float | None) -> dict[str, object]:
        return {"run": name, "site": site} | dict(zip(("l0", "fvu", "loss_recovered_zero"), figures, strict=True))

    runs = [run("a", "x", 8, 0.3, 0.9), run("b", "x", 16, 0.4, 0.95), run("c", "y", 8, 0.5, 0.8)]
    figure = plot_pareto([*runs, run("d", "y", None, None, None)])
    shown = [(trace.name, trace.mode, list(trace.text)) for trace in figure.data]
    assert shown == [
        ("x", "lines", ["a"]),
        ("x", "markers", ["a", "b"]),
        ("y", "lines", ["c"]),
        ("y", "markers", ["c"]),
        ("x", "lines", ["a", "b"]),
        ("x", "markers", ["a", "b"]),
        ("y", "lines", ["c"]),
        ("y", "markers", ["c"]),
    ]
