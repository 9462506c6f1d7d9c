"""The runs of a sweep beside each other: L0 against FVU and against loss recovered.

A run is on the front if no other has at most its L0 and reconstructs better. Loss recovered is that of zero ablation.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

_PANELS = (("fvu", "FVU", 1), ("loss_recovered_zero", "loss recovered (zero ablation)", -1))
"""Figure, title, and 1 if less of it is better, -1 if more is."""


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the points (cost, loss) that no other beats, by rising cost.

    A point is beaten by one with at most its cost and less loss, or with less cost and at most its loss.
    """
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not found or points[i][1] < points[found[-1]][1]:
            found.append(i)
    return found


def plot_pareto(runs: Sequence[Mapping[str, Any]]) -> "go.Figure":
    """A point for each run, and a line through the front of each site, in two panels.

    Each of `runs` has `run` (a name), `site`, `l0`, `fvu` and `loss_recovered_zero`; one without figures (None) is left
    out.
    """
    import plotly.graph_objects as go
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    figure = make_subplots(1, 2, subplot_titles=[title for _, title, _ in _PANELS])
    sites = list(dict.fromkeys(run["site"] for run in runs))
    for column, (name, title, better) in enumerate(_PANELS, start=1):
        for number, site in enumerate(sites):
            here = [run for run in runs if run["site"] == site and None not in (run.get("l0"), run.get(name))]
            colour = qualitative.Plotly[number % len(qualitative.Plotly)]
            best = [here[i] for i in front([(run["l0"], better * run[name]) for run in here])]
            for chosen, mode in ((best, "lines"), (here, "markers")):
                figure.add_trace(
                    go.Scatter(
                        x=[run["l0"] for run in chosen],
                        y=[run[name] for run in chosen],
                        text=[run["run"] for run in chosen],
                        mode=mode,
                        name=site,
                        marker_color=colour,
                        line_color=colour,
                        legendgroup=site,
                        showlegend=column == 1 and mode == "markers" and len(sites) > 1,
                        hoverinfo="skip" if mode == "lines" else None,
                        hovertemplate=None if mode == "lines" else "%{text}<br>L0 %{x:.2f}, %{y:.4f}<extra></extra>",
                    ),
                    row=1,
                    col=column,
                )
        figure.update_xaxes(title_text="L0 (active features per token)", row=1, col=column)
        figure.update_yaxes(title_text=title, row=1, col=column)
    return figure
