"""The runs of a sweep: a table with what varies, and their L0 against a figure of the reconstruction."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import streamlit as st

from explorer import state
from explorer.pareto import draw_pareto
from saelab.features.marks import number
from saelab.runs.folder import TRAINING, RunInfo
from saelab.runs.summary import RunSummary, SweepRun

FIGURES = {
    "l0": "L0",
    "fvu": "FVU",
    "delta_ce": "delta CE",
    "loss_recovered_zero": "loss recovered, zero ablation",
    "loss_recovered_mean": "loss recovered, mean ablation",
    "never_active": "never active",
}
"""The figures in the table, and their titles."""
MOST_SERIES = 5
"""Colours of a chart."""

Key = Callable[[str, RunSummary], Any]


@dataclass(frozen=True, eq=False)
class Sweep:
    """A sweep, without runs whose folders were removed."""

    name: str
    path: Path
    runs: tuple[SweepRun, ...]
    names: Mapping[str, str]
    """The names under which the explorer knows the runs that are here, by their names in the sweep."""

    @property
    def varies(self) -> list[str]:
        """The settings that vary."""
        return list(dict.fromkeys(setting for run in self.runs for setting in run.varies))


Drawn = Mapping[SweepRun, tuple[str, RunSummary]]
"""The runs of a sweep that are here, each with the explorer's name for it and its summary."""


def sweeps_of(runs: Mapping[str, RunInfo]) -> list[Sweep]:
    """The sweeps whose runs are all among `runs`. A damaged summary is shown as an error."""
    found = []
    for path in dict.fromkeys(run.path.parent for run in runs.values()):
        names = {run.path.name: name for name, run in runs.items() if run.path.parent == path}
        with state.errors_shown():
            listed = state.sweep(path)
            if not listed or any(run.name not in names and (path / run.name / TRAINING).is_file() for run in listed):
                continue  # the explorer was opened on a run of the sweep
            name = next(iter(names.values())).rpartition("/")[0] or path.resolve().name
            here = tuple(run for run in listed if run.name in names or run.failed)
            found.append(Sweep(name, path, here, {run.name: names[run.name] for run in here if run.name in names}))
    return found


def draw_sweep(sweep: Sweep, found: Mapping[str, RunSummary], key: Key, figure: str, ticked: str) -> None:
    """Draw a sweep, its runs in the order of `key`, of a run's name and summary; those without a folder last.

    `ticked` names the run with which the next chosen one is compared; "" if there is none.
    """
    drawn = {run: (name, found[name]) for run in sweep.runs if (name := sweep.names.get(run.name))}
    failed = [run for run in sweep.runs if message(run, drawn)]
    with st.container(border=True, gap="small"):
        facts = [f"A sweep of {len(sweep.runs):,} runs{f', of which {len(failed):,} failed' if failed else ''}"]
        facts += dict.fromkeys(text for _, run in drawn.values() for text in (run.model, run.site) if text)
        about = f'<div class="sl-note">{escape(" · ".join(facts))}</div>'
        st.html(f"<b>{escape(sweep.name)}</b>{about}")
        series = {name: label(run) for run, (name, _) in drawn.items()}
        if len(set(series.values())) > MOST_SERIES:
            series = dict.fromkeys(series, "")
        draw_pareto(dict(drawn.values()), figure, f"pareto-{sweep.path}", series)
        order = sorted(drawn, key=lambda run: (key(*drawn[run]), run.name))
        order += [run for run in sweep.runs if run not in drawn]
        heads = [f'<th title="{escape(name)}">{escape(name.rpartition(".")[2])}</th>' for name in sweep.varies]
        heads += [f'<th class="sl-value">{title}</th>' for title in FIGURES.values()]
        lines = "".join(row(run, sweep.varies, drawn, ticked) for run in order)
        head = f"<thead><tr><th>run</th>{''.join(heads)}<th></th></tr></thead>"
        st.html(f'<div class="sl-wide"><table class="sl-facts sl-sweep">{head}<tbody>{lines}</tbody></table></div>')


def row(run: SweepRun, varies: list[str], drawn: Drawn, ticked: str) -> str:
    """A row of the table, as HTML. A run that is not among `drawn` failed."""
    cells = [link("run", run.name, {"run": drawn[run][0]}) if run in drawn else escape(run.name)]
    cells += [escape(value(run.varies[setting])) if setting in run.varies else "" for setting in varies]
    left = "".join(f"<td>{cell}</td>" for cell in cells)
    if reason := message(run, drawn):
        return f'<tr>{left}<td colspan="{len(FIGURES) + 1}">failed: {escape(reason)}</td></tr>'
    name, summary = drawn[run]
    figures = [getattr(summary, figure) for figure in FIGURES]
    texts = ["–" if each is None else f"{each:,}" if isinstance(each, int) else number(each) for each in figures]
    numbers = "".join(f'<td class="sl-value">{text}</td>' for text in texts)
    if name == ticked:
        compare = "ticked"
    elif ticked:
        compare = link("compare", "compare", {"run": ticked, "other": name})
    else:
        compare = link("runs", "compare", st.query_params.to_dict() | {"tick": name})
    return f"<tr>{left}{numbers}<td>{compare}</td></tr>"


def message(run: SweepRun, drawn: Drawn) -> str | None:
    """Why a run failed; None if it did not, or has been evaluated since."""
    evaluated = run in drawn and drawn[run][1].fvu is not None
    return None if evaluated else run.failed


def link(page: str, text: str, parameters: Mapping[str, str]) -> str:
    return f'<a href="{escape(f"{page}?{urlencode(parameters)}")}" target="_self">{escape(text)}</a>'


def label(run: SweepRun) -> str:
    """The settings of a run that are not numbers, in a few words: the same for the runs of a line in the chart."""
    return ", ".join(value(each) for each in run.varies.values() if isinstance(each, bool | str | Mapping | None))


def value(setting: object) -> str:
    """The value of a setting in a few words."""
    if isinstance(setting, Mapping):
        return ", ".join(map(value, setting.values()))
    return f"{setting:g}" if isinstance(setting, float) else "null" if setting is None else str(setting)
