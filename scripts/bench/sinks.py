"""Three ways to train with attention sinks: nothing done, sinks left out, and norms clipped; docs/results.md.

    saelab cache CONFIG --out CACHE --tokens 100e3
    python scripts/bench/sinks.py CONFIG --cache CACHE [section.key=value ...]

CONFIG names the model, the text, the site, the autoencoder and the training. All autoencoders, one for each way and
each of --seeds, which set the initial weights, train on the same batches of one cache:

nothing     on every token
left out    with `activations.max_norm=10`
clipped     on every token, but one whose norm is above 10 times the median of the first activations is scaled down to
            that norm

Evaluation is the same for all, on the same held-out text as the model gives it: nothing is left out or clipped there.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import command
import torch
from table import table
from torch import Tensor

from saelab import Trainer, new_autoencoder
from saelab.activations.settings import CacheSource
from saelab.activations.sinks import SINK, largest_norm, measure
from saelab.analysis.fidelity import Evaluation, Fidelity, results
from saelab.encoded import Reader, read_all
from saelab.errors import SaelabError
from saelab.progress import bar
from saelab.runs.feed import open_source
from saelab.runs.inputs import Inputs, first_inputs
from saelab.runs.job import Job, settings_of

NOTHING, LEFT_OUT, CLIPPED = WAYS = ("nothing", "left out", "clipped")
COLUMNS = {
    "fvu": ("FVU", 4),
    "fvu_without_sinks": ("FVU without sinks", 4),
    "delta_ce": ("delta CE", 3),
    "delta_ce_without_sinks": ("delta CE without sinks", 3),
    "never_active": ("never active", 0),
}


class Arm(NamedTuple):
    way: str
    seed: int
    trainer: Trainer
    inputs: Inputs


def clipped(x: Tensor, largest: float) -> Tensor:
    """x ``[tokens, d_in]`` with every token whose norm is above `largest` scaled down to that norm."""
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(norms > largest, x * (largest / norms), x)


def train(job: Job, seeds: Sequence[int]) -> list[Arm]:
    """An arm for each way and seed, trained on the same batches of the cache of `job`."""
    leaves_out = dataclasses.replace(job.settings.activations, max_norm=SINK)
    source = open_source(job, bar)
    sample, device = source.sample(), job.model.device
    bound = largest_norm(measure(sample).median_norm, SINK)
    arms = []
    for way in WAYS:
        first = clipped(sample, bound) if way == CLIPPED else sample
        of = job
        if way == LEFT_OUT:
            of = job.beside(dataclasses.replace(job.settings, activations=leaves_out), job.say)
        inputs, scaled = first_inputs(first, of)
        for seed in seeds:
            sae = new_autoencoder(job.settings.sae, scaled.x, seed=seed).to(device)
            arms.append(
                Arm(way, seed, Trainer(sae, job.settings.training, job.settings.sae), dataclasses.replace(inputs))
            )
    tokens = 0
    while tokens < job.settings.training.tokens:
        batch = next(source)
        tokens += len(batch)
        cut = dataclasses.replace(batch, values=clipped(batch.values.to(device).float(), bound))
        for arm in arms:
            found = arm.inputs.batch(cut if arm.way == CLIPPED else batch, device)
            if found is not None:
                arm.trainer.step(found)
    source.close()
    for arm in arms:
        arm.trainer.release()
    return arms


def evaluate(job: Job, arms: Sequence[Arm]) -> list[Fidelity]:
    """The figures of each arm on held-out text as the model gives it."""
    settings, lm = job.settings.eval, job.lm
    rows = job.held_out(settings.tokens)
    saes = [arm.inputs.folded(arm.trainer.sae) for arm in arms]
    evaluations = [Evaluation(sae, lm, job.settings.site, ce_tokens=settings.ce_tokens) for sae in saes]
    readings = [
        (sae, job.settings.site, [Reader(each.add, len(rows), settings.rows_per_forward)])
        for sae, each in zip(saes, evaluations, strict=True)
    ]
    read_all(lm, rows, readings, track=bar)
    return results(evaluations, bar)


def report(found: Sequence[Mapping[str, Any]]) -> str:
    """A line for each way: the mean over its seeds, ± half of the range."""
    lines = []
    for way in WAYS:
        cells = [way]
        for name, (_, digits) in COLUMNS.items():
            values = [each[name] for each in found if each["way"] == way]
            spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(cells)
    return table(["", *(title for title, _ in COLUMNS.values())], lines)


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("config")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--seeds", type=command.whole(1), default=3)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()  # settings may come after the options
    settings = settings_of(args.config, args.overrides)
    if settings.sae.allocation.name != "token_choice":  # others may need thresholds from a calibration
        raise SaelabError("sae.allocation: this comparison is of token_choice only")
    stored = dataclasses.replace(settings.activations, cache=CacheSource(str(args.cache)), max_norm=None)
    job = Job(dataclasses.replace(settings, activations=stored), print)
    arms = train(job, range(args.seeds))
    found = [
        {"way": arm.way, "seed": arm.seed, "left_out": arm.inputs.left_out, **figures.to_dict()}
        for arm, figures in zip(arms, evaluate(job, arms), strict=True)
    ]
    command.write_json(args.json, {"settings": dataclasses.asdict(job.settings), "arms": found})
    one = found[0]
    print(
        f"{settings.site}: {one['tokens']:,} held-out tokens, {one['sinks']} of them sinks with "
        f"{one['sink_variance']:.1%} of the variance; the largest 1% of the dimensions hold {one['top_variance']:.1%} "
        f"of the variance of the others; CE on {one['ce_tokens']:,} tokens, clean {one['ce_clean']:.3f}\n"
    )
    print(report(found))


if __name__ == "__main__":
    command.run(main)
