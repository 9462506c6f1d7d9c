"""The command line: one thin command per stage."""

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from saelab import cli_autointerp, cli_checkpoints, torchrun
from saelab.cli_explorer import Port, explorer, serve
from saelab.cli_tables import print_evaluation, show_evaluation, show_sweep
from saelab.errors import SaelabError, printable
from saelab.signals import stopping

app = typer.Typer(
    help="Train sparse autoencoders on a language model's activations, look at the features, measure them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings, such as sae.k=64")]
_Force = Annotated[bool, typer.Option("--force", help="replace an existing run folder")]


def _say(message: str) -> None:
    typer.echo(printable(message), err=True)


def _print(message: str) -> None:
    typer.echo(printable(message))


@app.callback()
def _check_processes(context: typer.Context) -> None:
    started = torchrun.processes().world
    if started > 1 and context.invoked_subcommand not in ("train", "cache"):
        raise SaelabError(
            f"saelab {context.invoked_subcommand}: runs in one process, and torchrun started {started}; start it "
            "without torchrun. `saelab train` and `saelab cache` run in several"
        )


@app.command()
def demo(
    overrides: _Overrides = None,
    app: Annotated[bool, typer.Option("--app/--no-app", help="serve the explorer at the end")] = True,
    port: Port = 8501,
    force: _Force = False,
) -> None:
    """The whole job on the embedded model and corpus: `saelab run quickstart`, then serve the explorer.

    Example: saelab demo --no-app
    """
    folder = _bring_up_to_date("quickstart", overrides, force)
    if app:
        serve([folder], port)


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="a YAML file, or the name of a shipped config")],
    overrides: _Overrides = None,
    force: _Force = False,
) -> None:
    """Bring all stages of a config up to date: train, evaluate, make features; each text is read once.

    Stages whose results still stand are not run again.

    Example: saelab run quickstart sae.k=64 out=runs/k64
    """
    _bring_up_to_date(config, overrides, force)


def _bring_up_to_date(config: str, overrides: list[str] | None, force: bool) -> Path:
    from saelab import progress
    from saelab.runs import stages

    folder = stages.run(config, overrides or [], force=force, track=progress.bar, say=_say)
    show_evaluation(folder)
    return folder


@app.command()
def train(
    config: Annotated[str | None, typer.Argument(help="a YAML file, or the name of a shipped config")] = None,
    overrides: _Overrides = None,
    force: _Force = False,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="go on with the training in this folder")] = None,
) -> None:
    """Train an autoencoder as a config says, or go on with a training that was stopped.

    Under torchrun the processes train it together (parallel).

    Example: saelab train quickstart sae.k=64 out=runs/k64

    Example: saelab train --resume runs/k64
    """
    from saelab import progress
    from saelab.runs import train as stage

    if resume is not None:
        if force:
            raise SaelabError("--force replaces a run and --resume goes on with it; give one of them")
        if config is not None and "=" in config:  # without a config the first setting stands in its place
            config, overrides = None, [config, *(overrides or [])]
        folder = stage.resume(resume, overrides or [], config=config, track=progress.bar, say=_say)
    elif config is None:
        raise SaelabError("CONFIG: what to train? For example: saelab train quickstart")
    else:
        folder = stage.train(config, overrides or [], force=force, track=progress.bar, say=_say)
    if torchrun.processes().rank:
        return
    # The bytes of its name, whatever they are; but a stream in place of standard output may take text only.
    typer.echo(os.fsencode(folder) if hasattr(sys.stdout, "buffer") else printable(str(folder)))


@app.command()
def sweep(
    config: Annotated[str, typer.Argument(help="a YAML file, or the name of a shipped config")],
    overrides: _Overrides = None,
    force: _Force = False,
) -> None:
    """Train and evaluate every combination of the values of some settings, on one pass over the activations.

    Run again, it goes on where it was stopped or killed. The results are also in OUT/sweep.json and OUT/sweep.html.

    Example: saelab sweep quickstart sweep.sae.k=[16,32] sweep.training.lr=[1e-3,2e-3] out=runs/k

    Example: saelab sweep sweep
    """
    from saelab import progress
    from saelab.runs.sweep import sweep as stage

    stage(config, overrides or [], force=force, track=progress.bar, say=_say, show=show_sweep)


@app.command()
def cache(
    config: Annotated[str | None, typer.Argument(help="a YAML file, or the name of a shipped config")] = None,
    overrides: _Overrides = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="the cache's folder")] = None,
    tokens: Annotated[float | None, typer.Option(min=1, max=1e15, help="how many (default: training.tokens)")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="only compare every file with its sha256")] = False,
) -> None:
    """Write the model's activations into a folder, to train from with activations.cache=DIR.

    Run again, it continues where it was interrupted, or verifies a finished cache and writes damaged shards again.
    Under torchrun each process writes a part (cache.lanes).

    Example: saelab cache quickstart --out caches/quickstart --tokens 1e6
    """
    from saelab import progress
    from saelab.runs import cache as caching

    if out is None:
        raise SaelabError("--out: name a folder, for example: saelab cache quickstart --out caches/quickstart")
    if verify:
        if config is not None or tokens is not None:
            given = repr(config) if config is not None else "--tokens"
            raise SaelabError(f"--verify needs only the folder; remove {given}")
        manifest = caching.verify(out, track=progress.bar)
        _print(f"{out}: {manifest.tokens:,} tokens in {len(manifest.shards):,} shards, all as they were written")
        return
    if config is None:
        raise SaelabError(f"CONFIG: name a config, for example: saelab cache quickstart --out {out}")
    try:
        caching.cache(
            config, out, overrides or [], tokens=None if tokens is None else int(tokens), track=progress.bar, say=_say
        )
    except (KeyboardInterrupt, SystemExit):  # a signal
        if torchrun.processes().rank == 0:
            _say("finished shards are kept, and the same command continues after them")
        raise


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="a YAML file, or the name of a shipped config")],
    overrides: _Overrides = None,
    tokens: Annotated[float | None, typer.Option(min=1, max=1e15, help="the cache's (default: training's)")] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="where a cache would go")] = Path(),
) -> None:
    """Report the memory and disk that training, evaluation, a cache and the features need.

    The exit code is 2 if this machine has less.

    Of a sweep: what all its runs need at once, and how many fit. With `parallel`: what each of the processes needs, and
    what it exchanges in a step.

    Example: saelab plan gpt2_openwebtext model.dtype=bf16

    Example: saelab plan gpt2_openwebtext parallel.data=2 parallel.features=4
    """
    from rich.console import Console

    from saelab.files import expanded
    from saelab.runs.grid import grid
    from saelab.runs.plan import fitting, layout_of, plan_cache, plan_evaluation, plan_index, plan_training

    runs, folder = [run.settings for run in grid(config, overrides or [])], Path(expanded(out, "--out"))
    settings, many = max(runs, key=lambda run: run.sae.n_features), len(runs) > 1
    ranks = layout_of(settings)
    shared = f", for each of {ranks.data.size} x {ranks.features.size} processes" * (ranks.every.size > 1)
    plans = {
        f"training{shared}": plan_training(settings),
        "evaluation": plan_evaluation(settings),
        "features": plan_index(settings),
    }
    if settings.activations.array is None:
        plans["cache"] = plan_cache(settings, folder, int(tokens or settings.training.tokens))
    if many:
        Console(width=120).print(plan_training(*runs).table(f"training of {len(runs)} runs at once"))
        Console(width=120).print(plan_evaluation(*runs).table(f"evaluation of {len(runs)} runs at once"))
        fit = fitting(runs, plan_training), fitting(runs, plan_evaluation)
        _print(f"{fit[0]} of {len(runs)} runs fit into memory at once, and {fit[1]} evaluations. The largest of them:")
    for title, needs in plans.items():
        Console(width=120).print(needs.table(title))
        if needs.traffic:
            Console(width=120).print(needs.traffic_table())
    for needs in plans.values():
        needs.check()


@app.command(name="eval")
def evaluate(run: Annotated[Path, typer.Argument(help="a run folder")], overrides: _Overrides = None) -> None:
    """Evaluate a run's autoencoder on held-out text: reconstruction, loss with it spliced in, never-active features.

    With another text, model, site or context than in training, the result goes into a file of its own, eval-*.json.

    Example: saelab eval runs/quickstart eval.ce_tokens=200e3

    Example: saelab eval runs/quickstart corpus=code.jsonl
    """
    from saelab import progress
    from saelab.runs.folder import jsonable
    from saelab.runs.stages import evaluate as stage

    print_evaluation(run, jsonable(stage(run, overrides or [], track=progress.bar, say=_say).to_dict()))


@app.command()
def index(run: Annotated[Path, typer.Argument(help="a run folder")], overrides: _Overrides = None) -> None:
    """Write a run's feature database from held-out text: all activations, statistics, logits, neighbours.

    Example: saelab index runs/quickstart features.tokens=1e6
    """
    from saelab import progress
    from saelab.runs.folder import features
    from saelab.runs.stages import index as stage

    made = stage(run, overrides or [], track=progress.bar, say=_say)
    _print(
        f"{made['n_features']:,} features on {made['n_tokens']:,} held-out tokens, {made['never_active']:,} never "
        f"active; the database is in {features(run)}"
    )


@app.command()
def analyse(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    name: Annotated[
        str, typer.Argument(help="attention, dark_matter, dead, explanations, model_diff, similarity or steering")
    ],
    overrides: _Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="make it again, even if it is up to date")] = False,
) -> None:
    """Analyse a run; the result is stored in it, for the explorer and notebooks.

    Example: saelab analyse runs/quickstart dead analysis.dead.tokens=1e6
    """
    from rich.console import Console
    from rich.table import Table

    from saelab import progress
    from saelab.analysis.result import shown
    from saelab.runs.analyses import analyse as make

    result = make(run, name, overrides or [], force=force, track=progress.bar, say=_say)
    table = Table("figure", "value")
    for title, value in result.figures().items():
        table.add_row(printable(title), printable(shown(value)))
    Console(width=120).print(table)


app.command()(cli_autointerp.controls)
app.command()(cli_autointerp.neurons)
app.command()(cli_autointerp.explain)
app.command()(cli_autointerp.score)
app.command()(cli_checkpoints.adopt)
app.command()(cli_checkpoints.export)
app.command()(cli_checkpoints.push)
app.command(name="app")(explorer)


@app.command(hidden=True)
def features(run: Path, overrides: _Overrides = None) -> None:
    """The name of `saelab index` in earlier versions; it goes with the next release."""
    _say("note: `saelab features` is now `saelab index`; the old name goes with the next release")
    index(run, overrides)


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2, never a traceback; a signal is 128 + its number."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        with stopping():
            try:
                app()
            except SaelabError as error:
                _fail(error)
            except OSError as error:  # a path that the system refuses: its name is too long, or it may not be read
                name = f"{str(error.filename)[:100]}: " if error.filename is not None else ""
                _fail(SaelabError(f"{name}{error.strerror or error}"))
    except (KeyboardInterrupt, SystemExit) as ended:
        if isinstance(ended, KeyboardInterrupt) or ended.code != 2:  # a signal
            error = torchrun.cut_short(ended)
            if error is not None:
                _fail(error)
        if isinstance(ended, SystemExit):
            raise
        if torchrun.processes().rank == 0:
            _say("interrupted")
        raise SystemExit(130) from None


def _fail(error: SaelabError) -> NoReturn:
    """Print `error`, if no other process of torchrun does, and end with exit code 2."""
    torchrun.outlast()
    message = torchrun.message(error)
    if message is not None:
        _say(f"error: {message}")
    raise SystemExit(2) from None


if __name__ == "__main__":
    main()
