"""The tables that the commands print."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from saelab.errors import printable


def _print(message: str) -> None:
    typer.echo(printable(message))


def show_sweep(out: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Print the summary of a sweep."""
    from rich.console import Console
    from rich.table import Table

    def number(run: Mapping[str, Any], name: str, digits: int) -> str:
        return "" if run[name] is None else f"{run[name]:.{digits}f}"

    columns = (("L0", "l0", 2), ("FVU", "fvu", 4), ("delta CE (nats/token)", "delta_ce", 4))
    columns += (("loss recovered, zero ablation", "loss_recovered_zero", 4),)
    columns = [column for column in columns if any(run[column[1]] is not None for run in runs)]
    table = Table("run", *(title for title, _, _ in columns), "never active")
    for run in runs:
        never = "failed" if "failed" in run else f"{run['never_active']:,} of {run['n_features']:,}"
        table.add_row(printable(run["run"]), *(number(run, name, digits) for _, name, digits in columns), never)
    Console(width=120).print(table)
    _print(f"{out}: a run folder for each; all figures in sweep.json; a plot in sweep.html, to open in a browser")


def show_evaluation(run: Path) -> None:
    """Print the evaluation of a run. Raises SaelabError if its file is damaged."""
    from saelab.files import translate_read_errors
    from saelab.runs.folder import EVALUATION, evaluation

    remedy = f"`saelab eval {run}` makes it again."
    with translate_read_errors(run / EVALUATION, "an evaluation", remedy, (KeyError, TypeError, ValueError)):
        print_evaluation(run, evaluation(run) or {})


def print_evaluation(run: Path, result: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    def number(name: str, digits: int, of: Mapping[str, Any] = result) -> str:
        if name not in of:
            return "not measured yet: saelab eval"
        return "undefined" if of[name] is None else f"{of[name]:.{digits}f}"

    has_losses = result["ce_tokens"] > 0  # an array has none
    sites = result.get("sites") or ()  # of a crosscoder: the figures are of all sites, and CE of the first
    at = f" at {sites[0]['site']}" if sites else ""
    losses = f", CE on {result['ce_tokens']:,}{at}" if has_losses else ""
    _print(f"{run}: {result['site']}, {result['tokens']:,} held-out tokens{losses}")
    never = f"{result['never_active']:,} of {result['n_features']:,} ({100 * result['never_active_share']:.2f}%)"
    sinks, without = result.get("sinks", 0), []
    if sinks:
        of_all = f"{sinks:,} tokens, {100 * result['sink_variance']:.1f}% of the variance"
        without = [
            ("attention sinks, norms above 10 times the median", of_all),
            ("FVU without sinks", number("fvu_without_sinks", 4)),
            ("cosine without sinks", number("cosine_without_sinks", 4)),
        ]
        if has_losses:
            title = "delta CE without sinks, which stay clean (nats/token)"
            without.append((title, number("delta_ce_without_sinks", 4)))
    of_losses = [
        ("CE clean (nats/token)", number("ce_clean", 4)),
        ("CE spliced (nats/token)", number("ce_spliced", 4)),
        ("delta CE (nats/token)", number("delta_ce", 4)),
        ("CE zero-ablated (nats/token)", number("ce_zero_ablated", 4)),
        ("CE mean-ablated (nats/token)", number("ce_mean_ablated", 4)),
        ("loss recovered, zero ablation", number("loss_recovered_zero", 4)),
        ("loss recovered, mean ablation", number("loss_recovered_mean", 4)),
        ("KL(clean || spliced) (nats/token)", number("kl", 4)),
    ]
    table = Table(show_header=False)
    for label, value in (
        ("FVU", number("fvu", 4)),
        ("L0 (active features per token)", number("l0", 2)),
        (f"cosine({'target' if ' -> ' in result['site'] else 'x'}, reconstruction)", number("cosine", 4)),
        *without,
        ("variance in the largest 1% of dimensions (share)", number("top_variance", 4)),
        *(of_losses if has_losses else []),
        (f"never active on {result['tokens']:,} tokens", never),
        ("density below 1e-4 (share of features)", number("share_below_1e4", 4)),
        ("c_dec (mean absolute cosine of two features' decoder rows)", number("c_dec", 4)),
    ):
        table.add_row(label, value)
    for each in sites:
        table.add_row(f"FVU at {each['site']}", number("fvu", 4, each))
        table.add_row(f"delta CE at {each['site']} (nats/token)", number("delta_ce", 4, each))
    Console(width=100).print(table)
