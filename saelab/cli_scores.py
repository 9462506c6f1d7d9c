"""The tables that `saelab score` prints."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from saelab.errors import printable

if TYPE_CHECKING:
    from saelab.autointerp.summary import Difference, Line, ScoreTable


def show_scores(run: Path, found: "ScoreTable") -> None:
    """Print the table of scores."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def shown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        table = Table(*columns)
        for row in rows:
            table.add_row(*(Text(printable(each)) for each in row))
        Console(width=None if sys.stdout.isatty() else 150).print(table)

    named = [(line, [line.score, line.judge, _explanations(line)]) for line in found.lines]
    name, control = ("score", "judge", "explanations"), ("control", "above it [95% interval]", "pairs")
    value = ("unit", "features", "median", "mean [95% interval]", "unread", "tokens per feature")
    shown((*name, *value), ([*of, *_value(line)] for line, of in named))
    shown((*name, *control, "density ratio", ""), ([*of, *row] for line, of in named for row in _differences(line)))
    for line in found.lines:
        if line.warning:
            typer.echo(
                printable(f"{line.score} by {line.judge}: {line.warning}. This score says nothing of the features.")
            )
    if any(line.lexical for line in found.lines):
        typer.echo(
            "lexical is no language model: it counts tokens and words. Lines with it show that the pipeline works, and "
            "not what a language model would make of the features."
        )
    typer.echo(printable(f"{run / 'autointerp'}: every record as JSON lines and Parquet, with each judged example"))


def _explanations(line: "Line") -> str:
    if not line.kind:
        return "none needed"
    return line.kind if line.kind == line.explainer else f"{line.kind}, {line.explainer}"


def _features(line: "Line") -> str:
    return f"{line.n:,}" + f" ({line.without:,} without value)" * bool(line.without)


def _value(line: "Line") -> list[str]:
    """What a score is over the features."""
    found = [line.unit, _features(line), f"{line.median:.3f}", _interval(line.mean)]
    return [*found, f"{line.unread:,}", f"{line.tokens_per_feature:,.0f}"]


def _differences(line: "Line") -> list[list[str]]:
    """The comparisons of a score with its controls, a row each."""
    found = [
        [each.control, _interval(each.value), f"{each.pairs:,}", _ratio(each), each.verdict]
        for each in line.differences
    ]
    if line.seeds:
        found.append(
            [f"means of {len(line.seeds)} seeds", f"{min(line.seeds):.3f} to {max(line.seeds):.3f}", "", "", ""]
        )
    return found + [[each, "", "", "", "not scored"] for each in line.missing]


def _ratio(each: "Difference") -> str:
    """How far the densities of paired features differ: by what factor in the middle, and at most."""
    return f"{each.ratio:.2f}, at most {each.largest_ratio:.2f}" if each.largest_ratio > 1 else "same"


def _interval(value: Any) -> str:
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
