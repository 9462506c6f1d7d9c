"""Claims T1 and T3 to T8 on runs of one language model's attention heads.

    python scripts/bench/attention.py RUN [RUN ...]                     # arguments of a method that are re-used
    python scripts/bench/attention.py RUN [RUN ...] --task names        # names that are re-used (the paper's IOI)

RUN is a run of blocks.N.attn.hook_z with the result of `saelab analyse RUN attention`. Prints the table of heads, and,
as one JSON object per line with 95% intervals: L0, FVU and loss recovered; families of features; polysemantic heads;
the induction heads with their scores by matching tokens; for the induction features that attribution found, and for as
many features of the family `short`, the share of activation that is left without the earlier occurrences of the token,
and without as many other tokens; and what ablating a circuit does.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import command
import numpy as np
import torch
from scipy.stats import binomtest
from table import table

from saelab.analysis.attention.causal import Question, circuit_test
from saelab.analysis.attention.induction import prefix_scores, without_match
from saelab.analysis.attention.report import FAMILIES, SCORES, Attention
from saelab.analysis.intervals import Interval, add_by_row, interval
from saelab.analysis.spliced_loss import log_probabilities, stand_in
from saelab.encoded import encoded
from saelab.errors import SaelabError
from saelab.lm.attention import layer_of
from saelab.lm.splice import SplicedRuns
from saelab.runs import folder
from saelab.runs.analyses import read_analysis
from saelab.runs.job import Job, settings_of
from saelab.runs.live import Live, open_live

ARGUMENTS = ("start", "value", "offset", "name", "size", "path", "key", "data", "count", "index", "line", "mode")
NAMES = ("John", "Mary", "Tom", "James", "Dan", "Kevin", "Anna", "Emma", "Paul", "Mark", "Sarah", "Kate", "Lisa")
TOKENS, FEATURES, PAIRS, QUESTIONS = 8_000, 6, 24, 40


def say(what: str, **figures: object) -> None:
    shown = {name: str(value) if isinstance(value, Interval) else value for name, value in figures.items()}
    print(json.dumps({"what": what} | shown), flush=True)


def fidelity(live: Live, rows: torch.Tensor) -> dict[str, object]:
    """L0, FVU and loss recovered, over ordinary tokens, with intervals over rows."""
    blocks = list(encoded(live.sae, live.lm, rows, live.site, 8))
    mean = torch.cat([block.x for block in blocks]).double().mean(0)
    variance, active, losses = (np.zeros((len(rows), n)) for n in (2, 2, 4))
    runs = SplicedRuns(live.lm, live.site)
    for block in blocks:
        decoded = live.sae.decode(block.codes)
        error = (block.x - decoded).double().square().sum(1)
        deviation = (block.x.double() - mean).square().sum(1)
        add_by_row(variance, block.row_of_token(), torch.stack([error, deviation], 1))
        add_by_row(active, block.row_of_token(), torch.stack([block.codes.offsets.diff(), torch.ones_like(error)], 1))
        keep = live.lm.scored(block.rows)
        targets, row = block.rows.roll(-1, 1)[keep], keep.nonzero()[:, 0] + block.first_row
        others = [partial(stand_in, decoded), torch.zeros_like, partial(stand_in, mean.float())]
        found = map(partial(log_probabilities, keep), runs(block.rows, others))
        each = [-log_p.gather(1, targets[:, None])[:, 0] for log_p in found]
        add_by_row(losses, row, torch.stack(each, 1))  # clean, spliced, zeros, mean

    def recovered(without: int) -> Interval:
        return interval(losses, lambda s: (s[..., without] - s[..., 1]) / (s[..., without] - s[..., 0]))

    figures: dict[str, object] = {
        "tokens": int(active[:, 1].sum()),
        "l0": interval(active),
        "fvu": interval(variance),
    }
    return figures | {"recovered_zero": recovered(2), "recovered_mean": recovered(3)}


def heads_table(found: Attention) -> str:
    """Each head of the model; ± is half of the interval over rows."""
    lines = []
    half = (found.high - found.low) / 2
    for i, layer in enumerate(found.layers.tolist()):
        for head in range(found.scores.shape[1]):
            values = zip(found.scores[i, head], half[i, head], strict=True)
            lines.append([f"{layer}.{head}", *(f"{value:.3f} ± {h:.3f}" for value, h in values)])
    return table(["head", *SCORES], lines)


def kept(live: Live, found: Attention, rows: np.ndarray, family: str) -> None:
    """The share of activation that is left without matches, and without other tokens, of the commonest features."""
    which = np.flatnonzero((found.family == FAMILIES.index(family)) & (found.counts >= 30))
    which = which[np.argsort(-found.counts[which], kind="stable")][:FEATURES].tolist()
    texts = [live.encode(row.tolist()) for row in rows]
    sums, pairs = np.zeros((len(rows), 3)), 0
    for feature in which:
        values = [text.of(feature) for text in texts]
        at = [(row, int(t)) for row, value in enumerate(values) for t in np.flatnonzero(value > value.max() / 4)]
        at = [pair for pair in at if pair[1] > 12][:PAIRS]
        left = without_match(live.sae, live.lm, torch.from_numpy(rows), feature, at, site=live.site)
        known = np.isfinite(left[:, 0]) & (left[:, 0] > 0)
        shares = left[known] / left[known, :1]
        np.add.at(sums, np.array([row for row, _ in at], dtype=int)[known], shares)
        pairs += len(shares)
    if pairs:
        match, control = (interval(sums[:, [column, 0]]) for column in (1, 2))
        say("kept", site=live.site, family=family, features=len(which), pairs=pairs, match=match, control=control)


def questions(live: Live, task: str) -> list[Question]:
    """Methods that store an argument: its name, against that of the other one. Or who gets a drink, of two people."""
    numbers = np.random.default_rng(0)
    ids = {name: live.token_ids(f" {name}", bos=False) for name in (ARGUMENTS if task == "arguments" else NAMES)}
    single = [name for name, tokens in ids.items() if len(tokens) == 1]
    if len(single) < 2:
        raise SaelabError("fewer than two names are single tokens of this model")
    found = []
    for _ in range(QUESTIONS):
        answer, other = numbers.choice(single, 2, replace=False)
        first, second = numbers.permutation([answer, other])
        if task == "arguments":
            text = f"class Item:\n    def __init__(self, {first}, {second}):\n        self.{answer} ="
        else:
            text = f"When {first} and {second} went to the store, {other} gave a drink to"
        found.append(Question(live.token_ids(text), ids[answer][0], ids[other][0]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--task", choices=("arguments", "names"), default="arguments")
    parser.add_argument("--tokens", type=command.whole(1), default=30_000, help="held-out tokens for L0, FVU and loss")
    args = parser.parse_args()
    lives = [open_live(run) for run in args.runs]
    analyses: list[Attention] = []
    for run, live in zip(args.runs, lives, strict=True):
        if not isinstance(found := read_analysis(run, "attention"), Attention):
            raise SaelabError(f"{run} has no result; `saelab analyse {run} attention` makes it")
        analyses.append(found)
        rows = Job(settings_of(run / folder.SETTINGS)).held_out(args.tokens)
        say("fidelity", site=found.site, **fidelity(live, rows))
    print(heads_table(analyses[0]), flush=True)
    several = [bool(head) for found in analyses for head in found.polysemantic]
    ends = binomtest(sum(several), len(several)).proportion_ci()
    control = np.mean([found.control for found in analyses])
    say("polysemantic heads", n=sum(several), of=len(several), low=ends.low, high=ends.high, control=float(control))
    for found in analyses:
        say("families", site=found.site, tokens=found.tokens, living=found.alive, **found.families)
    saes = {layer_of(live.site): live.sae for live in lives}
    for features in (1, 5):
        result = circuit_test(saes, lives[0].lm, questions(lives[0], args.task), features=features)
        say("circuit", **result.figures())
    for run, live, found in zip(args.runs, lives, analyses, strict=True):
        rows = Job(settings_of(run / folder.SETTINGS)).held_out(TOKENS).numpy().astype(np.int64)
        for family in ("induction", "short"):
            kept(live, found, rows, family)
    prefix = prefix_scores(lives[0].lm)
    for name, kind in prefix.kinds().items():
        layer, head = map(int, name.split("."))
        scores = {f"with_{n}": prefix.score(layer, head, n) for n in range(len(prefix.scores))}
        say("induction head", head=name, kind=kind, **scores)


if __name__ == "__main__":
    command.run(main)
