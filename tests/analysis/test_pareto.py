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


def test_any_figure_by_any_group_and_one_value_is_not_magnified() -> None:
    names = ("l0", "delta_ce", "loss_recovered_mean")
    values = [(32.0, 0.5, 0.8), (32.0001, 0.4, 0.9), (31.9999, 0.3, None)]
    runs = [{"run": str(i), "group": i // 2} | dict(zip(names, each, strict=True)) for i, each in enumerate(values)]
    figure = plot_pareto(runs, names[1:], by="group")
    left, right = ([list(trace.y) for trace in figure.data if trace.xaxis == axis] for axis in ("x", "x2"))
    assert left == [[0.5, 0.4], [0.5, 0.4], [0.3], [0.3]]
    assert right == [[0.8, 0.9], [0.8, 0.9], [], []]
    low, high = figure.layout.xaxis.range
    assert low < 30 and high > 34 and figure.layout.yaxis.range is None
