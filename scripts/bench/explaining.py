"""Claims of arXiv 2410.13928 about explanations and scores, measured on a run: the tables P4, P6, P7 and P9.

    python scripts/bench/explaining.py runs/quickstart                       # minutes, offline
    python scripts/bench/explaining.py runs/quickstart --llm URL --model NAME    # a language model judges P6 and P7
    python scripts/bench/explaining.py runs/quickstart --layers runs/layers --write docs/results.md

P4  tokens of detection, fuzzing and simulation for a feature, as a server counts them: the tests' server
    (tests/autointerp/server.py), which answers at random in the right form; other tokenizers give other counts
P6  windows that an explanation is made from: top, random, quantiles, mix; all scored on the same windows, of all
    strengths, none of which an explanation was made from
P7  the same scores with harder windows without an activation, and on the strongest windows only
P9  explanations of the runs of a sweep over sites and seeds, --layers, compared (saelab/autointerp/similarity.py)

Explanations are lexical. P6 and P7 have two judges: exact (the explanation is a program) and --llm, or else lexical.
Each feature is written to FOLDER/features.jsonl, and the same command goes on after a kill. --write also puts the
tables between the marks of a file, such as `<!-- explanations: P4 -->` and `<!-- /explanations: P4 -->`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import command
import explaining_report
import numpy as np
from methods_report import rewritten

from saelab.autointerp import lexical
from saelab.autointerp.choice import chosen
from saelab.autointerp.contexts import Context, contexts
from saelab.autointerp.llm.answers import answers
from saelab.autointerp.llm.named import client as named
from saelab.autointerp.llm.openai_client import OpenAIClient
from saelab.autointerp.llm.protocol import Client, Reply, Request
from saelab.autointerp.scorers import detection, fuzzing, simulation
from saelab.autointerp.scorers.predicate import predicate
from saelab.autointerp.settings import ContextSettings, Negatives, Sampling, ScoreSettings
from saelab.features.database import Database, open_database
from saelab.files import make_folder
from saelab.progress import bar
from saelab.runs import folder

ROOT = Path(__file__).parents[2]
SAMPLINGS: tuple[Sampling, ...] = ("top", "random", "quantiles", "mix")
NEGATIVES: tuple[Negatives, ...] = ("random", "coactive", "decoder", "same_token")
POSITIVES = 100
"""Windows with an activation, a tenth of them from each tenth of the feature's windows."""
LEAST = 3
"""Windows of a kind for a figure of them."""


def tokens_of(database: Database, feature: int, ask: "Ask") -> dict[str, Any]:
    """P4: tokens of prompts and answers, by score."""
    c, settings = contexts(database, feature), ScoreSettings()
    e = lexical.explain(c)
    asked = {
        "detection": detection.requests(c, e, settings),
        "fuzzing": fuzzing.requests(c, e, settings),
        "simulation": simulation.requests(c, e),
    }
    replies = {name: ask(requests) for name, requests in asked.items()}
    return {name: sum(each.prompt_tokens + each.answer_tokens for each in found) for name, found in replies.items()}


def scores_of(database: Database, feature: int, ask: "Ask") -> dict[str, Any] | None:
    """P6 and P7: by sampling and judge, the balanced accuracy on each test set; None for too few windows."""
    of = ContextSettings(positives=POSITIVES)
    shown = {each: contexts(database, feature, replace(of, sampling=each)).explain for each in SAMPLINGS}
    taken = {key for windows in shown.values() for each in windows for key in (place(each), text(each))}
    silent = {each: contexts(database, feature, replace(of, negative=each)).negatives for each in NEGATIVES}
    c = contexts(database, feature, of)
    positives = tuple(each for each in c.positives if taken.isdisjoint((place(each), text(each))))
    strongest = [each for each in positives if each.quantile == 0]
    if len(positives) < POSITIVES // 2 or len(silent["random"]) < LEAST:
        return None
    every = {place(each): each for windows in silent.values() for each in windows}
    c = replace(c, positives=positives, negatives=tuple(every.values()))
    sets = {name: (positives, windows) for name, windows in silent.items()} | {
        "strongest": (strongest, silent["random"])
    }
    found: dict[str, Any] = {}
    for sampling, windows in shown.items():
        e = lexical.explain(replace(c, explain=windows))
        settings = ScoreSettings()
        judged = detection.score(c, e, ask(detection.requests(c, e, settings)), settings, "")
        for judge, score in (("exact", predicate(c, e)), ("judge", judged)):
            said = {(each.row, each.start): each.said for each in score.judged}
            found.setdefault(sampling, {})[judge] = {
                name: balanced_accuracy(said, *test) if min(map(len, test)) >= LEAST else None
                for name, test in sets.items()
            } | {"recall, weaker half": share(said, [each for each in positives if each.quantile >= of.quantiles // 2])}
    return found


def place(window: Context) -> tuple[int, int]:
    return window.example.row, window.example.start


def text(window: Context) -> bytes:
    return window.example.token_ids.tobytes()


def share(said: Mapping[tuple[int, int], float | None], windows: Sequence[Context]) -> float:
    """Share of the windows, of those with an answer, that the judge takes for active."""
    known = [value for each in windows if (value := said[place(each)]) is not None]
    return float(np.mean(np.array(known) > 0.5)) if known else np.nan


def balanced_accuracy(
    said: Mapping[tuple[int, int], float | None], positives: Sequence[Context], negatives: Sequence[Context]
) -> float:
    return (share(said, positives) + 1 - share(said, negatives)) / 2


Ask = Callable[[Sequence[Request]], list[Reply]]


def asking(client: Client, cache: Path) -> Ask:
    """The replies of `client`; those of a language model are cached."""
    if client.name == lexical.NAME:
        return lambda requests: [client.ask(each) for each in requests]
    return lambda requests: [reply for _, reply in answers(client, enumerate(requests), cache=cache)]


@contextmanager
def counting_server() -> Iterator[Client]:
    """A server that answers at random and counts tokens."""
    command = [sys.executable, "-m", "tests.autointerp.server"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield OpenAIClient(server.stdout.readline().strip(), "random", concurrency=4)
    finally:
        server.kill()
        server.wait()


def measure(run: Path, out: Path, features: str, of_tokens: str, judge: Client) -> list[dict[str, Any]]:
    """The records of all features, of which those that are missing in `out` are made first."""
    database, path = open_database(folder.features(run)), out / "features.jsonl"
    make_folder(out)
    inputs = str(database.arrays.manifest["inputs"])
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]  # not one that a kill cut off
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    done = {(each["part"], each["feature"], each["judge"], each["inputs"]) for each in records}

    def add(part: str, which: str, name: str, make: Callable[[Database, int, Ask], Any], ask: Ask) -> None:
        missing = [each for each in chosen(database, which) if (part, each, name, inputs) not in done]
        for feature in bar(iter(missing), part, len(missing), lambda _: 1):
            record = {"part": part, "feature": feature, "judge": name, "inputs": inputs}
            records.append(record | {"found": make(database, feature, ask)})
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(records[-1]) + "\n")

    with counting_server() as server:
        add("tokens", of_tokens, "", tokens_of, asking(server, out / "tokens.sqlite"))
    add("scores", features, judge.name, scores_of, asking(judge, out / "answers.sqlite"))
    return [each for each in records if each["inputs"] == inputs and each["judge"] in ("", judge.name)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run with a feature database")
    parser.add_argument("--out", type=Path, default=Path("runs/explaining"), help="folder of the records (%(default)s)")
    parser.add_argument("--features", default="random:200", help="those of P6 and P7 (%(default)s)")
    parser.add_argument("--tokens-of", default="random:40", help="those of P4 (%(default)s)")
    parser.add_argument("--llm", help="judge of P6 and P7: the address of a server, or local")
    parser.add_argument("--model", help="its model")
    parser.add_argument("--layers", type=Path, help="a sweep whose runs `saelab explain` has explained, for P9")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the tables into FILE")
    a = parser.parse_args()
    judge = named(a.llm, a.model, 8)
    records = measure(a.run, a.out, a.features, a.tokens_of, judge)
    made = explaining_report.tables(records, judge.name)
    if a.layers is not None:
        made["explanations: P9"] = explaining_report.layers(a.layers)
    print("\n\n".join(made.values()))
    if a.write is not None:
        a.write.write_text(rewritten(a.write.read_text(encoding="utf-8"), made, str(a.write)), encoding="utf-8")


if __name__ == "__main__":
    command.run(main)
