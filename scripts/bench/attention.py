"""Claims T3, T6, T7 and T8 on runs of one language model's attention heads.

    python scripts/bench/attention.py RUN [RUN ...]

RUN is a run of blocks.N.attn.hook_z with the result of `saelab analyse RUN attention`. Prints, as one JSON object per
line: the induction heads with their scores by matching tokens; for the induction features that attribution found, and
for as many features of the family `short`, the share of activation that is left without the earlier occurrences of the
token, and without as many other tokens; and what ablating a circuit does where an argument of a method is re-used.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from saelab.analysis.attention.causal import Question, circuit_test
from saelab.analysis.attention.induction import prefix_scores, without_match
from saelab.analysis.attention.report import FAMILIES, Attention
from saelab.errors import SaelabError
from saelab.lm.attention import layer_of
from saelab.runs import folder
from saelab.runs.analyses import read_analysis
from saelab.runs.job import Job, settings_of
from saelab.runs.live import Live, open_live
from saelab.sae.checkpoint import load

NAMES = ("start", "value", "offset", "name", "size", "path", "key", "data", "count", "index", "line", "text", "mode")
TOKENS, FEATURES, PAIRS, QUESTIONS = 8_000, 6, 24, 40


def say(what: str, **figures: object) -> None:
    print(json.dumps({"what": what} | figures), flush=True)


def kept(live: Live, found: Attention, rows: np.ndarray, family: str) -> None:
    """The share of activation that is left without matches, and without other tokens, of the commonest features."""
    which = np.flatnonzero((found.family == FAMILIES.index(family)) & (found.counts >= 30))
    texts = [live.encode(row.tolist()) for row in rows]
    for feature in which[np.argsort(-found.counts[which], kind="stable")][:FEATURES].tolist():
        values = [text.of(feature) for text in texts]
        pairs = [(row, int(t)) for row, value in enumerate(values) for t in np.flatnonzero(value > value.max() / 4)]
        pairs = [pair for pair in pairs if pair[1] > 12][:PAIRS]
        left = without_match(live.sae, live.lm, torch.from_numpy(rows), feature, pairs, site=live.site)
        left = left[np.isfinite(left[:, 0])]
        if len(left):
            without, control = (left.mean(0, np.float64) / left[:, 0].mean(dtype=np.float64))[1:].round(3).tolist()
            say("kept", site=live.site, family=family, feature=feature, n=len(left), match=without, control=control)


def questions(live: Live) -> list[Question]:
    """Methods that store an argument: its name, against that of the other argument."""
    numbers = np.random.default_rng(0)
    ids = {name: live.token_ids(f" {name}", bos=False) for name in NAMES}
    single = [name for name, tokens in ids.items() if len(tokens) == 1]
    if len(single) < 2:
        raise SaelabError("fewer than two names are single tokens of this model")
    found = []
    for _ in range(QUESTIONS):
        answer, other = numbers.choice(single, 2, replace=False)
        first, second = numbers.permutation([answer, other])
        text = f"class Item:\n    def __init__(self, {first}, {second}):\n        self.{answer} ="
        found.append(Question(live.token_ids(text), ids[answer][0], ids[other][0]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = parser.parse_args().runs
    live = open_live(runs[0])
    saes = {layer_of(sae.metadata.get("hook_name")): sae for sae in (load(run, live.lm.device) for run in runs)}
    prefix = prefix_scores(live.lm)
    for name, kind in prefix.kinds().items():
        layer, head = map(int, name.split("."))
        say(
            "induction head",
            head=name,
            kind=kind,
            by_matching=prefix.mean[:, layer, head].astype(np.float64).round(3).tolist(),
        )
    for run in runs:
        found = read_analysis(run, "attention")
        if not isinstance(found, Attention):
            raise SaelabError(f"{run} has no result; `saelab analyse {run} attention` makes it")
        say("families", site=found.site, tokens=found.tokens, **found.families)
        opened = open_live(run)
        rows = Job(settings_of(run / folder.SETTINGS)).held_out(TOKENS).numpy().astype(np.int64)
        for family in ("induction", "short"):
            kept(opened, found, rows, family)
    result = circuit_test(saes, live.lm, questions(live), features=5)
    say("circuit", **{name: str(value) for name, value in result.figures().items()})


if __name__ == "__main__":
    main()
