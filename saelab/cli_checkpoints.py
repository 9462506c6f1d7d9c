"""The commands that hand a checkpoint on: `saelab export`."""

from pathlib import Path
from typing import Annotated

import typer

from saelab.errors import printable

_FORMS = "html, neuronpedia, circuit-tracer, csv, parquet, saelens, sparsify, dictionary_learning or sae_bench"


def export(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    to: Annotated[str, typer.Option(metavar="FORM", help=_FORMS)],
    features: Annotated[str | None, typer.Option(metavar="LIST", help="such as 1,5-9 (default: all)")] = None,
    out: Annotated[Path | None, typer.Option(metavar="PATH", help="file or folder (default: in RUN/exports)")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier export")] = False,
) -> None:
    """Export features, as a page that needs nothing else (with --features), JSON or a table; or the autoencoder.

    sae_bench exports the evaluation, as sae-bench writes it.

    Example: saelab export runs/quickstart --to html --features 1,5-9

    Example: saelab export runs/quickstart --to parquet --out features.parquet

    Example: saelab export runs/quickstart --to sparsify --out layers.1

    Example: saelab export runs/quickstart --to sae_bench
    """
    from saelab.runs.export import export as write

    typer.echo(printable(f"{write(run, to, features, out, force=force)}"))
