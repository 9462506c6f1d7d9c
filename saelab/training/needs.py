"""The memory and disk that training an autoencoder needs, apart from the source of its activations."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saelab.memory import BEGINNING, READING, RESUMING, STEP, THRESHOLDS, Need, Place, no_numbers
from saelab.ranks import ALONE, Ranks
from saelab.sae.allocation.methods import allocation_of
from saelab.sae.needs import calibration_bytes, initialisation_bytes, step_needs
from saelab.sae.new import Widths, bare_autoencoder
from saelab.sae.settings import SaeSettings
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import Trainer

STATE_TEXT = 65_536
"""Most bytes of a state besides its tensors: names, counters, the position in the text (`saelab.corpus.rows`)."""
_START = 6
"""Bytes that the checkpoint and what `start_from` makes of it take for each byte of the weights: 1, 2 for each of two
copies in float64, the second of rows that get length 1, and small ones (5.03 measured)."""


def training_needs(
    saes: Sequence[tuple[SaeSettings, Widths]],
    settings: TrainingSettings,
    where: Place,
    *,
    sample_tokens: int,
    calibration_tokens: int,
    resumed: bool = False,
    ranks: Ranks = ALONE,
) -> list[Need]:
    """Needs of a `Trainer` on its device, `where`, from initialisation to calibration, and of its files.

    `saes` are the settings and widths of an autoencoder, or of several that take each step in turn: a step's needs are
    there once, and each has weights, gradients and moments. `resumed`: they start from states instead of a sample of
    `sample_tokens`. For a step of a transcoder the larger of its widths is counted as both.

    If several processes share the training, each needs the memory, the first of them that of the whole autoencoder too,
    and they need the disk together.
    """
    parts = [_Part.of(sae, settings, widths, ranks) for sae, widths in saes]
    wholes = parts if ranks.features.size == 1 else [_Part.of(sae, settings, widths) for sae, widths in saes]
    weights, gradients = sum(part.weights for part in parts), sum(part.gradients for part in parts)
    sizes = " + ".join(dict.fromkeys(part.sizes for part in parts))
    times = f"{len(saes)} autoencoders: " if len(saes) > 1 else ""
    frozen = dict.fromkeys(sae.freeze for sae, _ in saes if sae.freeze != "none")
    of_trained = "the autoencoder" + "s" * (len(saes) > 1) + (f" without {' or '.join(frozen)}" if frozen else "")
    averages = sum(part.averages for part in parts)
    options = {"parts": settings.accumulate, "rounded": settings.precision == "bfloat16", "ranks": ranks}
    step = _in_turn(
        [(sae.selection, step_needs(sae, widths.largest, settings.batch, where, **options)) for sae, widths in saes]
    )
    needs = [
        Need("autoencoder", weights, where, times + sizes),
        Need("its gradients", gradients, where, f"as {of_trained}", (BEGINNING, RESUMING, READING, STEP)),
        Need("optimiser", 2 * gradients, where, f"Adam: 2 x {of_trained}", (RESUMING, READING, STEP)),
        Need("averaged weights", averages, where, f"as {of_trained}", (BEGINNING, RESUMING, READING, STEP)),
        Need(
            "statistics of features",
            sum(part.statistics for part in parts),
            where,
            f"of {sum(sae.n_features for sae, _ in saes):,} features, as in the states",
        ),
        *step,
    ]

    if resumed:
        needs += _reading_needs(max(parts, key=lambda part: part.weights), where)
    else:
        beginning = max(
            initialisation_bytes(sae, widths.largest, sample_tokens, where, ranks.features) for sae, widths in saes
        )
        needs.append(Need("initialisation", beginning, where, "the first reconstruction of the sample", (BEGINNING,)))
        started = [whole.weights for whole, (sae, _) in zip(wholes, saes, strict=True) if sae.init_from is not None]
        how = "its weights in float32, and brought into the inputs of training in float64"
        needs.append(Need("checkpoint to start from", _START * max(started, default=0), "memory", how, (BEGINNING,)))
    if ranks.features.size > 1:
        together = 2 * max(whole.weights for whole in wholes)
        how = "of the first process: the parts of all, and the whole that they make"
        needs.append(Need("whole autoencoder", together, where, how, (THRESHOLDS,)))
    calibration = max(calibration_bytes(sae, calibration_tokens, where) for sae, _ in saes)
    needs.append(Need("thresholds", calibration, where, "the pre-activations that may decide them", (THRESHOLDS,)))
    if where == "gpu":
        needs.append(Need("writing", max(whole.largest for whole in wholes), "memory", "a copy of the largest tensor"))

    thresholds = sum(4 * sae.n_features * allocation_of(sae).calibrated for sae, _ in saes)
    keep, each = settings.checkpoint.keep, " + ".join(dict.fromkeys(f"{whole.state:,}" for whole in wholes))
    saved, sizes = sum(whole.saved for whole in wholes), " + ".join(dict.fromkeys(whole.sizes for whole in wholes))
    needs += [
        Need("checkpoint", saved + thresholds, "disk", f"{times}{sizes}, {thresholds:,} bytes of thresholds"),
        Need(
            "states",
            (keep + 1) * sum(whole.state for whole in wholes),
            "disk",
            f"{times}{keep} that are kept + 1 being written, {each} bytes each",
        ),
    ]
    return [need for need in needs if need.bytes]


@dataclass(frozen=True)
class _Part:
    """Bytes of one autoencoder in training, or of a process's part of it."""

    weights: int
    gradients: int
    """Bytes of the gradients of the trained weights."""
    averages: int
    """Bytes of the averages of the trained weights."""
    statistics: int
    largest: int
    """The largest tensor."""
    saved: int
    """The tensors of the checkpoint, without thresholds set after training. There a tied autoencoder has two tables,
    and a gated one a threshold for its gate."""
    state: int
    """A state on the disk, if it has only this part."""
    sizes: str
    """The shapes of the weights, in words."""

    @classmethod
    def of(cls, sae: SaeSettings, settings: TrainingSettings, widths: Widths, ranks: Ranks = ALONE) -> "_Part":
        with no_numbers():
            trainer = Trainer(bare_autoencoder(sae, *widths, ranks=ranks), settings, sae)
            parameters, trained = list(trainer.sae.parameters()), trainer.optimiser.trained
            weights, gradients = _nbytes(parameters), _nbytes(trained)
            statistics = trainer.usage.state_bytes() + trainer.allocation.state_bytes(sae.n_features)
            saved = _nbytes([trainer.sae.W_enc, trainer.sae.b_enc, trainer.sae.W_dec, trainer.sae.b_dec])
            saved += 0 if trainer.sae.W_skip is None else trainer.sae.W_skip.nbytes
            saved += 4 * trainer.sae.n_features * (sae.encoder.name in ("jumprelu", "gated"))
            largest = max(parameter.nbytes for parameter in parameters)
        shapes = " + ".join(" x ".join(f"{n:,}" for n in parameter.shape) for parameter in parameters)
        counters = 4 * len(trained) + torch.get_rng_state().nbytes
        averages = gradients if settings.ema is not None else 0
        state = weights + 2 * gradients + averages + statistics + counters + STATE_TEXT
        return cls(weights, gradients, averages, statistics, largest, saved, state, f"({shapes}) x 4 bytes")


def _in_turn(steps: Sequence[tuple[str, list[Need]]]) -> list[Need]:
    """Needs of steps, each with its precision, that are taken one after the other: of each kind the largest.

    The buffers of pre-activations are kept from step to step, for each precision.
    """
    found: dict[tuple[str, str], Need] = {}
    for precision, needs in steps:
        for need in needs:
            kind = need.what, precision if need.what == "pre-activations" else ""
            if kind not in found or need.bytes > found[kind].bytes:
                found[kind] = need
    return list(found.values())


def _reading_needs(part: _Part, where: Place) -> list[Need]:
    """The state while it is read: the weights, which are then copied; the optimiser keeps its tensors."""
    needs = [Need("state, while it is read", part.weights, where, "as the autoencoder", (RESUMING,))]
    if where == "gpu":
        how = "the weights, the optimiser and the average"
        tensors = part.weights + 2 * part.gradients + part.averages
        needs.append(Need("state, before it is moved", tensors, "memory", how, (RESUMING,)))
    return needs


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
