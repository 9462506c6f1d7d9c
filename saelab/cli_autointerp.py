"""The commands `saelab explain` and `saelab score`."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from saelab.cli_scores import show_scores
from saelab.errors import SaelabError, printable

if TYPE_CHECKING:
    from saelab.autointerp.llm.budget import Estimate
    from saelab.autointerp.records import About

_Run = Annotated[Path, typer.Argument(help="a run folder with a feature database")]
Llm = Annotated[str | None, typer.Option(metavar="URL", help="a server with the OpenAI chat protocol, or local")]
Model = Annotated[str | None, typer.Option(metavar="NAME", help="the model there; with local its folder")]
_Concurrency = Annotated[int, typer.Option(min=1, help="requests under way at once")]
Price = Annotated[str | None, typer.Option(metavar="P,A", help="price of a million tokens of prompts and of answers")]
Tokens = Annotated[float | None, typer.Option(min=1, help="most tokens of prompts and answers")]
Money = Annotated[float | None, typer.Option(help="most money; needs --price")]
_About = Annotated[str, typer.Option(metavar="WHAT", help="when it is active (context) or what it causes (effect)")]
_WithControls = Annotated[bool, typer.Option("--with-controls", help="and the controls of the run, one by one")]
_Yes = Annotated[bool, typer.Option("--yes", help="ask a language model without a question about the cost")]


def explain(
    run: _Run,
    features: Annotated[
        str | None, typer.Option(metavar="LIST", help="such as 0:100, 7,9, matched:RUN or random:200 (default)")
    ] = None,
    about: _About = "context",
    llm: Llm = None,
    model: Model = None,
    contrastive: Annotated[bool, typer.Option("--contrastive", help="show similar silent text too")] = False,
    reasoning: Annotated[bool, typer.Option("--reasoning", help="let the model reason first")] = False,
    again: Annotated[bool, typer.Option("--again", help="make new explanations; the earlier ones stay")] = False,
    with_controls: _WithControls = False,
    concurrency: _Concurrency = 8,
    price: Price = None,
    max_tokens: Tokens = None,
    max_money: Money = None,
    yes: _Yes = False,
) -> None:
    """Explain features in words, by a language model or, without --llm, offline from statistics of tokens.

    Run again, it continues after what is there. A key comes from SAELAB_LLM_KEY or OPENAI_API_KEY. Explanations of
    effects steer the run's own language model; only `saelab score --scores intervention` reads them.
    Without --features, a control has those explained that are nearest in density to the ones explained in its run;
    matched:RUN names another run.

    Example: saelab explain runs/quickstart --features 0:100

    Example: saelab explain runs/quickstart --llm http://localhost:8000/v1 --model Qwen/Qwen2.5-7B-Instruct
    """
    from saelab import progress
    from saelab.autointerp.llm.budget import parsed_budget
    from saelab.runs import autointerp

    with _options():
        budget = parsed_budget(price, max_tokens, max_money)

    def one(each: Path) -> None:
        made = autointerp.explain(
            each,
            features if each == run else None,
            about=cast("About", about),
            llm=llm,
            model=model,
            contrastive=contrastive,
            reasoning=reasoning,
            again=again,
            concurrency=concurrency,
            budget=budget,
            confirm=partial(_confirm, yes),
            track=partial(progress.bar, unit="features"),
            say=_say,
        )
        typer.echo(printable(f"{made}; they are in {each / 'autointerp'}"))

    with _options():
        _one_by_one(one, run, [run, *_controls(run, with_controls)])


def score(
    run: _Run,
    scores: Annotated[str | None, typer.Option(metavar="LIST", help="such as detection,fuzzing (default: 5)")] = None,
    features: Annotated[str | None, typer.Option(metavar="LIST", help="(default: those with an explanation)")] = None,
    llm: Llm = None,
    model: Model = None,
    embed: Annotated[str | None, typer.Option(metavar="MODEL", help="sentence-transformers (default: TF-IDF)")] = None,
    controls: Annotated[
        str | None, typer.Option(metavar="RUN,...", help="runs to compare with (default: those of `saelab controls`)")
    ] = None,
    with_controls: _WithControls = False,
    concurrency: _Concurrency = 8,
    price: Price = None,
    max_tokens: Tokens = None,
    max_money: Money = None,
    yes: _Yes = False,
) -> None:
    """Score the explanations of features beside controls, by a language model or, without --llm, offline.

    Scores: detection, fuzzing, embedding, intruder, predicate (these by default), simulation, surprisal,
    intruder_embedding, example_embedding; and intervention, of explanations of effects (saelab explain RUN --about
    effect). Surprisal and intervention load the run's own language model. Run again, it continues after what is there.

    Example: saelab score runs/quickstart

    Example: saelab score runs/quickstart --scores detection,fuzzing --with-controls
    """
    from saelab import progress
    from saelab.autointerp.llm.budget import parsed_budget
    from saelab.runs import autointerp
    from saelab.runs.autointerp import DEFAULT

    with _options():
        budget = parsed_budget(price, max_tokens, max_money)

    def one(each: Path) -> None:
        found = autointerp.score(
            each,
            DEFAULT if scores is None else _parts(scores),
            features if each == run else None,
            llm=llm,
            model=model,
            embed=embed,
            controls=None if controls is None else _parts(controls),
            concurrency=concurrency,
            budget=budget,
            confirm=partial(_confirm, yes),
            track=partial(progress.bar, unit="scores"),
            say=_say,
        )
        if each == run:
            show_scores(run, found)

    with _options():
        _one_by_one(one, run, [*_controls(run, with_controls), run])


def controls(
    run: _Run,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="settings, such as training.tokens=3e5")
    ] = None,
    kinds: Annotated[str | None, typer.Option(metavar="LIST", help="(default: all that the run can have)")] = None,
    reseeds: Annotated[int, typer.Option(min=1, help="runs of the kind reseed")] = 2,
    force: Annotated[bool, typer.Option("--force", help="replace controls made from something else")] = False,
) -> None:
    """Make controls of a run in RUN/controls, to explain and score beside it, from the same text.

    Kinds: untrained, directions (random ones), neurons (of the site's block), frozen_decoder, frozen_encoder, reseed.
    The last three are trained on the batches of the run, in one pass of the model. Run again, it goes on where it was
    stopped.

    Example: saelab controls runs/quickstart

    Example: saelab controls runs/quickstart --kinds untrained,frozen_decoder training.tokens=3e5
    """
    from saelab import progress
    from saelab.runs.controls import controls as stage

    chosen = None if kinds is None else _parts(kinds)
    with _options():
        made = stage(run, overrides or [], chosen, reseeds=reseeds, force=force, track=progress.bar, say=_say)
    for path in made:
        typer.echo(printable(str(path)))


def neurons(
    config: Annotated[str, typer.Argument(help="a YAML file, or the name of a shipped config")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as sae.k=64")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an existing run folder")] = False,
) -> None:
    """Make a run of MLP neurons, to look at, explain and score as the features of an autoencoder.

    They are the neurons of the block of the config's site, the k largest of each token.

    Example: saelab neurons quickstart out=runs/neurons
    """
    from saelab import progress
    from saelab.runs.controls import neuron_run

    run = neuron_run(config, overrides or [], force=force, track=progress.bar, say=_say)
    typer.echo(printable(str(run)))


def _controls(run: Path, wanted: bool) -> list[Path]:
    """The controls of a run if they are wanted. Raises SaelabError if there are none."""
    from saelab.runs import folder

    found = folder.controls(run) if wanted else []
    if wanted and not found:
        raise SaelabError(f"{run}: has no controls; `saelab controls {run}` makes them")
    return found


def _one_by_one(do: Callable[[Path], None], run: Path, runs: Sequence[Path]) -> None:
    """Do it for a run and its controls; a control that fails is named, and the others go on.

    Raises SaelabError at the end if a control failed, and at once if the run failed or no more may be asked.
    """
    from saelab.autointerp.llm.budget import BudgetSpent

    failed = []
    for each in runs:
        try:
            do(each)
        except (BudgetSpent, _Refused):
            raise
        except SaelabError as error:
            if each == run:
                raise
            failed.append(each.name)
            _say(f"{each.name}: {error}")
    if failed:
        raise SaelabError(f"{len(failed)} of {len(runs) - 1} controls failed: {', '.join(failed)} (above)")


_OPTIONS = {
    "url": "--llm",
    "money": "--max-money",
    "tokens": "--max-tokens",
    "contrastive, reasoning": "--contrastive, --reasoning",
} | {
    name: f"--{name}"
    for name in ("llm", "model", "price", "about", "features", "scores", "controls", "embed", "concurrency", "kinds")
}
"""The options of the settings that errors name."""


@contextmanager
def _options() -> Iterator[None]:
    """Errors about a setting in the block name the option instead."""
    try:
        yield
    except SaelabError as error:
        name, colon, rest = str(error).partition(": ")
        if not colon or name not in _OPTIONS:
            raise
        raise type(error)(f"{_OPTIONS[name]}: {rest}") from error


class _Refused(SaelabError):
    """Nobody agreed to the cost."""


def explorer_options(
    llm: str | None, model: str | None, price: str | None, max_tokens: float | None, max_money: float | None
) -> list[str]:
    """The arguments that pass these options on to the explorer.

    Raises SettingError if the model is missing or named without a server, or if the budget cannot be read.
    """
    from saelab.autointerp.llm.budget import parsed_budget
    from saelab.errors import SettingError

    if (llm is None) != (model is None):
        raise SettingError(f"--{'llm' if llm is None else 'model'}: is missing; --llm and --model go together")
    with _options():
        parsed_budget(price, max_tokens, max_money)
    given = {"llm": llm, "model": model, "price": price, "max-tokens": max_tokens, "max-money": max_money}
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def _say(message: str) -> None:
    typer.echo(printable(message), err=True)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _confirm(yes: bool, cost: "Estimate") -> None:
    """Show the cost and ask whether to go on. Raises SaelabError if not, or if nobody can be asked."""
    _say(f"this asks {cost}")
    if yes:
        return
    if not sys.stdin.isatty():
        raise _Refused("nobody is there to agree to the cost; give --yes")
    if not typer.confirm("go on?", err=True):
        raise _Refused("nothing was asked")
