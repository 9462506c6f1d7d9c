"""Runs beside each other: L0 against FVU, delta CE or loss recovered.

A run is on the front if no other has at most its L0 and reconstructs better.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

FIGURES = {
    "fvu": ("FVU", 1),
    "delta_ce": ("delta CE, nats per token", 1),
    "loss_recovered_zero": ("loss recovered, zero ablation", -1),
    "loss_recovered_mean": ("loss recovered, mean ablation", -1),
}
"""Title of each figure, and 1 if less of it is better, -1 if more is."""
COLOURS = ("rgb(208, 112, 20)", "rgb(70, 130, 210)", "rgb(40, 150, 95)", "rgb(160, 105, 205)", "rgb(215, 85, 95)")
"""At least 3:1 against white and against black."""


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the points (cost, loss) that no other beats, by rising cost.

    A point is beaten by one with at most its cost and less loss, or with less cost and at most its loss.
    """
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not found or points[i][1] < points[found[-1]][1]:
            found.append(i)
    return found


def plot_pareto(
    runs: Sequence[Mapping[str, Any]], names: Sequence[str] = ("fvu", "loss_recovered_zero"), by: str = "site"
) -> "go.Figure":
    """A panel for each of `names`, a point for each run, and a line through the front of the runs that share `by`.

    Each of `runs` has `run` (a name), `l0`, the figures `names` of `FIGURES`, and `by`; one without figures (None) is
    left out. Plotly takes all text for HTML.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(1, len(names))
    groups = list(dict.fromkeys(run[by] for run in runs))
    for column, name in enumerate(names, start=1):
        title, better = FIGURES[name]
        known = [run for run in runs if None not in (run.get("l0"), run.get(name))]
        for number, group in enumerate(groups):
            here, colour = [run for run in known if run[by] == group], COLOURS[number % len(COLOURS)]
            best = [here[i] for i in front([(run["l0"], better * run[name]) for run in here])]
            for chosen, mode in ((best, "lines"), (here, "markers")):
                figure.add_trace(
                    go.Scatter(
                        x=[run["l0"] for run in chosen],
                        y=[run[name] for run in chosen],
                        text=[run["run"] for run in chosen],
                        mode=mode,
                        name=group,
                        marker={"color": colour, "size": 9},
                        line={"color": colour, "width": 1.5},
                        legendgroup=group,
                        showlegend=column == 1 and mode == "markers" and len(groups) > 1,
                        hoverinfo="skip" if mode == "lines" else None,
                        hovertemplate=None if mode == "lines" else "%{text}<br>L0 %{x:.4g}, %{y:.4g}<extra></extra>",
                    ),
                    row=1,
                    col=column,
                )
        xs, ys = [run["l0"] for run in known], [run[name] for run in known]
        figure.update_xaxes(title_text="L0, features per token", range=_around(xs), row=1, col=column)
        figure.update_yaxes(title_text=title, range=_around(ys), row=1, col=column)
    return figure


def _around(values: Sequence[float]) -> list[float] | None:
    """A range of an axis around values that are all but equal; None if plotly finds a good one itself.

    It would magnify what is equal up to rounding until it differs.
    """
    if not values or max(values) - min(values) > 0.01 * max(map(abs, values)):
        return None
    middle, width = (max(values) + min(values)) / 2, 0.1 * max(map(abs, values)) or 1.0
    return [middle - width, middle + width]
