"""The commands that take a checkpoint over or hand one on: `saelab adopt`, `saelab export` and `saelab push`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from saelab.errors import SaelabError, printable


def adopt(
    checkpoint: Annotated[str, typer.Argument(help="a folder or file of another trainer, or an id on the Hub")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings, such as context=128")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="M", help="the language model: a Hub id or a folder")] = None,
    site: Annotated[str | None, typer.Option(metavar="S", help="TransformerLens' name of a hook point")] = None,
    target: Annotated[str | None, typer.Option(metavar="T", help="a transcoder: the site that it predicts")] = None,
    corpus: Annotated[str | None, typer.Option(metavar="C", help="the text: a file, folder or Hub dataset")] = None,
    out: Annotated[Path | None, typer.Option(metavar="RUN", help="the run folder (default: runs/NAME)")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing run folder")] = False,
) -> None:
    """Make a run folder of another trainer's checkpoint, for `saelab eval`, `index`, `analyse`, `explain` and `app`.

    What is not given is taken from the checkpoint, if it says it.

    Example: saelab adopt pythia-saes/layers.3 --model EleutherAI/pythia-70m --corpus pile.jsonl --out runs/layer3
    """
    from saelab.runs.adopt import adopt as make

    def say(message: str) -> None:
        typer.echo(printable(message), err=True)

    given = {"model": model, "site": site, "target": target, "corpus": corpus}
    run = make(checkpoint, **given, out=out, overrides=overrides or [], force=force, say=say)
    typer.echo(printable(f"{run}"))


_FORMS = "html, neuronpedia, circuit-tracer, csv, parquet, saelens, sparsify, dictionary_learning or sae_bench"


def export(
    run: Annotated[Path, typer.Argument(help="a run folder; for an autoencoder also a checkpoint or an id on the Hub")],
    to: Annotated[str, typer.Option(metavar="FORM", help=_FORMS)],
    features: Annotated[str | None, typer.Option(metavar="LIST", help="such as 1,5-9 (default: all)")] = None,
    out: Annotated[Path | None, typer.Option(metavar="PATH", help="file or folder (default: in RUN/exports)")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier export")] = False,
) -> None:
    """Export features as a page that needs nothing else (with --features), JSON or a table, or export the autoencoder.

    saelens, sparsify and dictionary_learning are checkpoints of these trainers; sae_bench is the evaluation, as
    sae-bench writes it.

    Example: saelab export runs/quickstart --to html --features 1,5-9

    Example: saelab export runs/quickstart --to parquet --out features.parquet

    Example: saelab export runs/quickstart --to sparsify --out layers.1

    Example: saelab export runs/quickstart --to sae_bench
    """
    from saelab.runs.export import export as write

    typer.echo(printable(f"{write(run, to, features, out, force=force)}"))


def push(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    repo: Annotated[str, typer.Argument(metavar="USER/REPO", help="a repository on the Hub, made if it is missing")],
    path: Annotated[str | None, typer.Option(metavar="PATH", help="folder in it (default: the site's name)")] = None,
    private: Annotated[bool, typer.Option("--private", help="make the repository private")] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="write the files there instead")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> None:
    """Upload a run's autoencoder with its settings, evaluation and a model card to the Hugging Face Hub.

    saelab.load("user/repo/PATH") loads it. The token comes from HF_TOKEN or `hf auth login`. With --out nothing is
    uploaded: the files are written into a folder, to look at.

    Example: saelab push runs/quickstart user/repo --out pushed

    Example: saelab push runs/quickstart user/repo --private
    """
    from saelab.runs import push as pushing

    upload = pushing.prepare(run, repo, path)
    sizes = upload.sizes()
    for name, size in sizes.items():
        typer.echo(printable(f"{size:>15,} bytes  {name}"))
    if out is not None:
        typer.echo(printable(f"{pushing.write(upload, out)}: {sum(sizes.values()):,} bytes; nothing was uploaded"))
        return
    visible = "private if it is made now" if private else "public if it is made now"
    typer.echo(printable(f"{sum(sizes.values()):,} bytes for {repo} ({visible}); its README.md, if any, stays"))
    if not yes:
        if not sys.stdin.isatty():
            raise SaelabError("--yes: is missing; without a terminal nobody can be asked whether to upload this")
        typer.confirm("Upload?", abort=True)
    typer.echo(printable(pushing.send(upload, private=private)))
    typer.echo("the card names no license; add yours to README.md on the Hub")
