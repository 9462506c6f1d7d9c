"""The commands `saelab explain` and `saelab score`."""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from saelab.errors import SaelabError, printable

if TYPE_CHECKING:
    from saelab.autointerp.llm.budget import Estimate
    from saelab.autointerp.records import About
    from saelab.autointerp.summary import Difference, Line, ScoreTable

_Run = Annotated[Path, typer.Argument(help="a run folder with a feature database")]
Llm = Annotated[str | None, typer.Option(metavar="URL", help="a server with the OpenAI chat protocol, or local")]
Model = Annotated[str | None, typer.Option(metavar="NAME", help="the model there; with local its folder")]
_Concurrency = Annotated[int, typer.Option(min=1, help="requests under way at once")]
Price = Annotated[str | None, typer.Option(metavar="P,A", help="price of a million tokens of prompts and of answers")]
Tokens = Annotated[float | None, typer.Option(min=1, help="most tokens of prompts and answers")]
Money = Annotated[float | None, typer.Option(help="most money; needs --price")]
_About = Annotated[str, typer.Option(metavar="WHAT", help="when it is active (context) or what it causes (effect)")]
_Yes = Annotated[bool, typer.Option("--yes", help="ask a language model without a question about the cost")]


def explain(
    run: _Run,
    features: Annotated[
        str | None, typer.Option(metavar="LIST", help="such as 0:100, 7,9 or random:200 (default)")
    ] = None,
    about: _About = "context",
    llm: Llm = None,
    model: Model = None,
    contrastive: Annotated[bool, typer.Option("--contrastive", help="show similar silent text too")] = False,
    reasoning: Annotated[bool, typer.Option("--reasoning", help="let the model reason first")] = False,
    again: Annotated[bool, typer.Option("--again", help="make new explanations; the earlier ones stay")] = False,
    concurrency: _Concurrency = 8,
    price: Price = None,
    max_tokens: Tokens = None,
    max_money: Money = None,
    yes: _Yes = False,
) -> None:
    """Explain features in words, by a language model or, without --llm, offline from statistics of tokens.

    Run again, it continues after what is there. A key comes from SAELAB_LLM_KEY or OPENAI_API_KEY. Explanations of
    effects steer the run's own language model; only `saelab score --scores intervention` reads them.

    Example: saelab explain runs/quickstart --features 0:100

    Example: saelab explain runs/quickstart --llm http://localhost:8000/v1 --model Qwen/Qwen2.5-7B-Instruct
    """
    from saelab import progress
    from saelab.autointerp.llm.budget import parsed_budget
    from saelab.runs import autointerp

    made = autointerp.explain(
        run,
        features or autointerp.FEATURES,
        about=cast("About", about),
        llm=llm,
        model=model,
        contrastive=contrastive,
        reasoning=reasoning,
        again=again,
        concurrency=concurrency,
        budget=parsed_budget(price, max_tokens, max_money),
        confirm=partial(_confirm, yes),
        track=partial(progress.bar, unit="features"),
        say=_say,
    )
    typer.echo(printable(f"{made}; they are in {run / 'autointerp'}"))


def score(
    run: _Run,
    scores: Annotated[str | None, typer.Option(metavar="LIST", help="such as detection,fuzzing (default: 5)")] = None,
    features: Annotated[str | None, typer.Option(metavar="LIST", help="(default: those with an explanation)")] = None,
    llm: Llm = None,
    model: Model = None,
    embed: Annotated[str | None, typer.Option(metavar="MODEL", help="sentence-transformers (default: TF-IDF)")] = None,
    controls: Annotated[str | None, typer.Option(metavar="RUN,...", help="runs to compare with")] = None,
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

    Example: saelab score runs/quickstart --scores detection,fuzzing --controls runs/untrained
    """
    from saelab import progress
    from saelab.autointerp.llm.budget import parsed_budget
    from saelab.runs import autointerp
    from saelab.runs.autointerp import DEFAULT

    found = autointerp.score(
        run,
        DEFAULT if scores is None else _parts(scores),
        features,
        llm=llm,
        model=model,
        embed=embed,
        controls=_parts(controls or ""),
        concurrency=concurrency,
        budget=parsed_budget(price, max_tokens, max_money),
        confirm=partial(_confirm, yes),
        track=partial(progress.bar, unit="scores"),
        say=_say,
    )
    _show(run, found)


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
        raise SaelabError("nobody is there to agree to the cost; give --yes")
    if not typer.confirm("go on?", err=True):
        raise SaelabError("nothing was asked")


def _show(run: Path, found: "ScoreTable") -> None:
    """Print the table of scores."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    columns = ("score", "judge", "explanations", "unit", "features", "median", "mean [95% interval]", "unread")
    table = Table(*columns, "tokens per feature", "above its control [95% interval]", show_lines=True)
    for line in found.lines:
        texts = [line.score, line.judge, _explanations(line), line.unit, _features(line), f"{line.median:.3f}"]
        texts += [_interval(line.mean), f"{line.unread:,}", f"{line.tokens_per_feature:,.0f}"]
        texts += ["\n".join(map(_difference, line.differences))]
        table.add_row(*(Text("\n".join(map(printable, each.split("\n")))) for each in texts))
    Console(width=150).print(table)
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


def _difference(each: "Difference") -> str:
    pairs = f"{each.pairs:,} pair{'s' * (each.pairs != 1)}"
    return f"{each.control}: {_interval(each.value)}, {pairs}: {each.verdict}"


def _interval(value: Any) -> str:
    return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
