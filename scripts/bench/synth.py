"""SynthSAEBench: which autoencoders find features of a planted world with a hierarchy, correlations and Zipfian firing.

    python scripts/bench/synth.py                                # the small world, every method, L0 20 and 25
    python scripts/bench/synth.py --scale full --device cuda     # the recipe of SynthSAEBench-16k v2
    python scripts/bench/synth.py --scale full --device cuda --samples 1e7    # with fewer training samples
    python scripts/bench/synth.py --only mutual,jumprelu --seeds 1
    python scripts/bench/synth.py --write docs/results.md        # only the table of what is finished, into that file

synth_world.py makes the world, synth_scores.py defines the scores. The world is the same for all; a seed decides the
samples, their order and the initial weights, the same ones for every method. Inference is set to the L0 of the column
on other samples (planted_truth.set_l0); relu and gated have no such setting, so their coefficient is searched with
seed 0, and jumprelu has a target. Each cell is a file in FOLDER, and only missing ones are computed.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import command
import torch
from methods_report import rewritten
from planted import spread
from planted_truth import set_l0
from synth_scores import score
from synth_world import Drawn, Recipe, World, build, drawn
from table import table as markdown
from torch import Tensor

from saelab.errors import SaelabError
from saelab.files import write_json, write_whole
from saelab.sae.model import Batch, SparseAutoencoder
from saelab.sae.new import new_autoencoder
from saelab.sae.settings import (
    AffinitySettings,
    AllocationSettings,
    AuxSettings,
    EncoderSettings,
    SaeSettings,
    SparsitySettings,
)
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import train

L0S = (20, 25)
FIRST, CALIBRATION = 16_384, 32_768
"""Samples that the initial weights and the scale come from, and those that set the L0 of inference."""
_NEAR, _TRIES, _MOST = 0.02, 4, 16
"""Relative error of L0 that a search for a coefficient accepts; trainings it takes for one L0; factor between two."""


@dataclass(frozen=True)
class Scale:
    recipe: Recipe
    latents: int
    training: TrainingSettings
    held_out: int
    kept: bool
    """Whether the samples of a seed are drawn once, for all methods, and kept in memory."""


SCALES = {
    "small": Scale(
        replace(Recipe(), n_true=2048, d_in=192, roots=16, exponent=0.4, p_max=0.95),
        512,
        TrainingSettings(1_048_576, 512, 3e-3, log_every=1000),
        131_072,
        kept=True,
    ),
    "full": Scale(Recipe(), 4096, TrainingSettings(200_000_000, 1024, 3e-4, log_every=1000), 500_000, kept=False),
}
PUBLISHED = {
    "mutual": ("BatchTopK", {20: 0.818, 25: 0.732}),
    "jumprelu": ("JumpReLU", {20: 0.824, 25: 0.732}),
    "matryoshka mutual": ("Matryoshka", {20: 0.860, 25: 0.879}),
    "relu": ("L1", {20: 0.578, 25: 0.556}),
}
"""F1 that SynthSAEBench-16k v2 publishes, by the method here that is the same, with its name there."""


def methods(latents: int, k: int) -> dict[str, SaeSettings]:
    """The settings of every method. group_max has the number of latents nearest to `latents` that k divides."""
    token, mutual = AllocationSettings("token_choice"), AllocationSettings("mutual_choice")
    feature, uniform = AllocationSettings("feature_choice"), AllocationSettings("feature_choice", capacity="uniform")
    threshold, nested = AllocationSettings("threshold"), (1 / 32, 3 / 32, 7 / 32, 15 / 32)
    zipf, none = AuxSettings("aux_zipf"), AuxSettings("none")

    def made(allocation: AllocationSettings, **others: Any) -> SaeSettings:
        return SaeSettings(latents, k, allocation=allocation, **others)

    return {
        "token": made(token),
        "token aux_zipf": made(token, aux=zipf),
        "token cosine": made(token, affinity=AffinitySettings("cosine")),
        "multi_topk": made(token, multi_topk=True),
        "matryoshka token": made(token, prefixes=nested),
        "tied": made(token, encoder=EncoderSettings("tied")),
        "aligned": made(token, encoder=EncoderSettings("aligned")),
        "group_max": SaeSettings(round(latents / k) * k, k, allocation=AllocationSettings("group_max")),
        "mutual": made(mutual),
        "mutual aux_zipf": made(mutual, aux=zipf),
        "matryoshka mutual": made(mutual, prefixes=nested),
        "feature zipf": made(feature),
        "feature zipf aux_zipf": made(feature, aux=zipf),
        "feature uniform": made(uniform),
        "jumprelu": made(
            threshold, encoder=EncoderSettings("jumprelu"), sparsity=SparsitySettings("l0", 10.0, target_l0=k)
        ),
        "gated": made(threshold, encoder=EncoderSettings("gated"), aux=none, sparsity=SparsitySettings("l1")),
        "relu": made(threshold, aux=none, sparsity=SparsitySettings("l1")),
        "frozen mutual": made(mutual, freeze="decoder"),
    }


NAMES = list(methods(1024, L0S[0]))


class Bench:
    """One scale's world on a device, and the cells in a folder."""

    def __init__(self, scale: Scale, out: Path, device: str, say: Callable[[str], None]) -> None:
        self.scale, self.out, self.device, self.say = scale, out, device, say
        self.world: World = build(scale.recipe, device)
        self._block = 1024 if device != "cpu" else max(1, 2**19 // scale.recipe.n_true)
        """Samples drawn at a time; on a CPU small blocks, which stay in the cache, take half the time."""
        first = self._x(FIRST, part=1)
        self.factor = (first.shape[1] / first.square().sum(1).double().mean().item()) ** 0.5
        """Training is on activations with E||x||^2 = d_in."""
        self.first = first * self.factor
        self.calibration = self._x(CALIBRATION, part=2) * self.factor
        self._kept: tuple[int, Tensor, list[Drawn]] | None = None

    def cell(self, name: str, l0: int, seed: int) -> None:
        """Train, score and write one cell."""
        begin, settings = time.monotonic(), methods(self.scale.latents, l0)[name]
        if settings.sparsity.name == "l1":
            settings = self._searched(name, settings, l0, seed)
        sae, budget = self._trained(settings, seed)
        trained = time.monotonic() - begin
        scores = score(sae, self.world.directions, self._held_out(seed), self.factor)
        record = {
            "method": name,
            "l0": l0,
            "seed": seed,
            "scores": asdict(scores),
            "inference_budget": budget,
            "coefficient": settings.sparsity.coefficient if settings.sparsity.name == "l1" else None,
            "seconds": trained,
            "scale": asdict(self.scale),
            "latents": settings.n_features,
            "machine": f"{platform.machine()}, torch {torch.__version__}, {self.device}",
        }
        write_json(cell_file(self.out, name, l0, seed), record)
        self.say(
            f"{name}, L0 {l0}, seed {seed}: L0 {scores.l0:.2f} F1 {scores.f1:.3f} MCC {scores.mcc:.3f} uniqueness "
            f"{scores.uniqueness:.3f} EV {scores.explained_variance:.3f} dead {scores.dead:.3f} in {trained:.0f} s"
        )

    def _x(self, samples: int, part: int, seed: int = 0) -> Tensor:
        x = torch.empty(samples, self.scale.recipe.d_in, device=self.device)  # filled, not joined: half the memory
        blocks = drawn(self.world, samples, _seed(seed, part), self._block)
        for rows, each in zip(x.split(self._block), blocks, strict=True):
            rows.copy_(each.x)
        return x

    def _batches(self, seed: int) -> Iterator[Batch]:
        training = self.scale.training
        if not self.scale.kept:
            some = drawn(self.world, training.tokens, _seed(seed, 3), training.batch)
            yield from (Batch(each.x * self.factor) for each in some)
            return
        yield from (Batch(x) for x in self._samples(seed)[0].split(training.batch))

    def _held_out(self, seed: int) -> Iterable[Drawn]:
        if self.scale.kept:
            return self._samples(seed)[1]
        return drawn(self.world, self.scale.held_out, _seed(seed, 4), self._block)

    def _samples(self, seed: int) -> tuple[Tensor, list[Drawn]]:
        """The training samples of a seed, scaled, and the held-out ones, kept until those of another are asked for."""
        if self._kept is None or self._kept[0] != seed:
            self._kept = None  # frees the memory before the next are drawn
            self.say(f"drawing {self.scale.training.tokens:,} samples of seed {seed}")
            x = self._x(self.scale.training.tokens, 3, seed).mul_(self.factor)
            held_out = drawn(self.world, self.scale.held_out, _seed(seed, 4), self._block)
            self._kept = seed, x, list(held_out)
        return self._kept[1:]

    def _trained(self, settings: SaeSettings, seed: int) -> tuple[SparseAutoencoder, float | None]:
        """An autoencoder whose inference is set to k active latents, and the budget that it takes."""
        sae = new_autoencoder(settings, self.first, seed=_seed(seed, 5))
        trained = train(sae, self._batches(seed), self.scale.training, settings)
        sae.requires_grad_(False)
        if settings.allocation.name in ("threshold", "group_max"):
            return sae, None
        return sae, set_l0(sae, trained.densities, settings.k, self.calibration)

    def _searched(self, name: str, settings: SaeSettings, l0: int, seed: int) -> SaeSettings:
        """`settings` with the coefficient whose L0, with seed 0, is nearest to `l0`; other seeds take those tried."""
        file = self.out / f"coefficients {name}.json"
        tried: list[list[float]] = json.loads(file.read_text()) if file.is_file() else []
        for _ in range(_TRIES if seed == 0 or not tried else 0):
            if tried and min(abs(reached / l0 - 1) for _, reached in tried) < _NEAR:
                break
            coefficient = next_coefficient(tried, l0)
            sae, _ = self._trained(replace(settings, sparsity=SparsitySettings("l1", coefficient)), 0)
            active = sum(int(sae.encode(x).l0().sum()) for x in self.calibration.split(1024)) / CALIBRATION
            tried.append([coefficient, active])
            write_whole(file, json.dumps(tried))
            self.say(f"{name}: coefficient {coefficient:.4g} gives L0 {active:.2f}")
        nearest = min(tried, key=lambda each: abs(each[1] / l0 - 1))
        return replace(settings, sparsity=SparsitySettings("l1", nearest[0]))


def next_coefficient(tried: list[list[float]], l0: float) -> float:
    """The coefficient to try after `tried`, pairs of a coefficient and its L0: on the line through the two nearest.

    The line is of logarithms; its slope lies between -4 and -0.25, and is -1 with one pair.
    """
    if not tried:
        return 0.2
    logs = [(math.log(c), math.log(max(reached, 0.1))) for c, reached in tried]
    logs.sort(key=lambda each: abs(each[1] - math.log(l0)))
    (c, reached), slope = logs[0], -1.0
    if len(logs) > 1 and logs[1][0] != c:
        slope = min(-0.25, max(-4.0, (logs[1][1] - reached) / (logs[1][0] - c)))
    step = (math.log(l0) - reached) / slope
    return math.exp(c + min(max(step, -math.log(_MOST)), math.log(_MOST)))


def _seed(seed: int, part: int) -> int:
    """A seed of random numbers that no other part or seed has; the world has another."""
    return 1_000 + 10 * seed + part


def cell_file(out: Path, name: str, l0: int, seed: int) -> Path:
    return out / f"{name}, L0 {l0}, seed {seed}.json"


def finished(out: Path) -> list[dict[str, Any]]:
    """The records of the finished cells in `out`. Raises SaelabError if there is none, or if their scales differ."""
    cells = [json.loads(file.read_text()) for file in sorted(out.glob("*, L0 *, seed *.json"))]
    if not cells:
        raise SaelabError(f"{out}: no cell is finished")
    if len({_described(cell["scale"]) for cell in cells}) > 1:
        raise SaelabError(f"{out}: has cells of different worlds or trainings; use another --out")
    return cells


def report(cells: list[dict[str, Any]]) -> str:
    """The head and the tables of `cells`, of one scale, as Markdown; the largest F1 first."""
    true_l0 = statistics.mean(cell["scores"]["true_l0"] for cell in cells)
    head = f"{_described(cells[0]['scale'])} {true_l0:.1f} planted features are active on a sample."
    parts = [f"{head} Mean ± standard deviation over seeds."]
    for l0 in L0S:
        rows: list[tuple[str, list[dict[str, Any]]]] = []
        for name in NAMES:
            if found := [cell["scores"] for cell in cells if cell["method"] == name and cell["l0"] == l0]:
                rows.append((name, found))
        rows.sort(key=lambda row: -statistics.mean(each["f1"] for each in row[1]))
        parts += [f"L0 {l0}:", markdown(_HEAD, [_row(name, found, l0) for name, found in rows])]
    return "\n\n".join(parts)


def _described(scale: dict[str, Any]) -> str:
    recipe, training = scale["recipe"], scale["training"]
    return (
        f"{recipe['n_true']:,} planted features in {recipe['d_in']} dimensions (Zipf exponent {recipe['exponent']:g}, "
        f"probabilities {recipe['p_max']:g} to {recipe['p_min']:g}, {recipe['roots']} trees); {scale['latents']:,} "
        f"latents learnt from {training['tokens']:,} samples (batch {training['batch']}, lr {training['lr']:g}); "
        f"scored on {scale['held_out']:,} others."
    )


_SCORES = ("f1", "precision", "recall", "mcc", "uniqueness", "explained_variance")
_HEAD = ["method", "seeds", "L0", "F1", "published F1 (16k)", "precision", "recall", "MCC", "uniqueness"]
_HEAD += ["explained variance", "dead %", "F1 of the densest quarter", "of the rarest"]


def _row(name: str, found: list[dict[str, Any]], l0: int) -> list[str]:
    f1, *others = (_spread([each[column] for each in found]) for column in _SCORES)
    published, figures = PUBLISHED.get(name, ("", {}))
    there = f"{figures[l0]:.3f} ({published})" if l0 in figures else ""
    dead = _spread([100 * each["dead"] for each in found], 1)
    quarters = [_spread([each["f1_by_quarter"][quarter] for each in found]) for quarter in (0, 3)]
    return [name, str(len(found)), _spread([each["l0"] for each in found], 2), f1, there, *others, dead, *quarters]


def _spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation; one value has none."""
    return spread(values, digits) if len(values) > 1 else f"{values[0]:.{digits}f}"


def _names(text: str) -> list[str]:
    """The type of --only."""
    names = text.split(",")
    if unknown := [name for name in names if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(NAMES)}")
    return names


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder of the cells (runs/synth-SCALE)")
    parser.add_argument("--seeds", type=command.whole(1), default=3)
    parser.add_argument("--samples", type=float, help="training samples; the scale has its own number")
    parser.add_argument("--only", type=_names, default=NAMES, metavar="NAME,...", help="only these methods")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="only write the tables of what is finished into FILE"
    )
    options = parser.parse_args()
    out = options.out or Path(f"runs/synth-{options.scale}")
    if options.write is not None:
        text = options.write.read_text(encoding="utf-8")
        text = rewritten(text, {"synth": report(finished(out))}, str(options.write))
        options.write.write_text(text, encoding="utf-8")
        return
    out.mkdir(parents=True, exist_ok=True)
    cells = [(name, l0, seed) for seed in range(options.seeds) for name in options.only for l0 in L0S]
    missing = [cell for cell in cells if not cell_file(out, *cell).is_file()]
    if missing:
        scale = SCALES[options.scale]
        if options.samples is not None:
            scale = replace(scale, training=replace(scale.training, tokens=int(options.samples)))
        bench = Bench(scale, out, command.device(options.device), lambda line: print(line, flush=True))
        for cell in missing:
            bench.cell(*cell)
    print(report(finished(out)))
    command.write_json(options.json, {"cells": finished(out)})


if __name__ == "__main__":
    command.run(main)
