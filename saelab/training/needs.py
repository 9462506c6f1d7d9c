"""The memory and disk that training an autoencoder needs, apart from the source of its activations."""

from collections.abc import Iterable

import torch
from torch import Tensor

from saelab.memory import Need, Place, no_numbers
from saelab.sae.allocation.methods import allocation_of
from saelab.sae.model import bare_autoencoder
from saelab.sae.needs import calibration_bytes, initialisation_bytes, step_needs
from saelab.sae.settings import SaeSettings
from saelab.training.settings import TrainingSettings
from saelab.training.trainer import Trainer

STATE_TEXT = 65_536
"""Most bytes of a state besides its tensors: names, counters, the position in the text (`saelab.corpus.rows`)."""


def training_needs(
    sae: SaeSettings,
    settings: TrainingSettings,
    d_in: int,
    where: Place,
    *,
    sample_tokens: int,
    calibration_tokens: int,
    sample_bytes: int = 0,
    resumed: bool = False,
) -> list[Need]:
    """Needs of a `Trainer` on its device, `where`, from initialisation to calibration, and of its files.

    `resumed`: it starts from a state instead of a sample of `sample_tokens`, which takes `sample_bytes` until the first
    step and is counted here, since most of a step's memory is not in use by then. No setting makes a transcoder, so
    d_out is d_in.
    """
    with no_numbers():
        trainer = Trainer(bare_autoencoder(sae, d_in), settings, sae)
        parameters, trained = list(trainer.sae.parameters()), trainer.optimiser.trained
        weights, gradients = _nbytes(parameters), _nbytes(trained)
        statistics = trainer.usage.state_bytes() + trainer.allocation.state_bytes(sae.n_features)
        largest = max(parameter.nbytes for parameter in parameters)
    shapes = " + ".join(" x ".join(f"{n:,}" for n in parameter.shape) for parameter in parameters)
    sizes = f"({shapes}) x 4 bytes"
    of_trained = "the autoencoder" if gradients == weights else f"the autoencoder without {sae.freeze}"
    step = step_needs(sae, d_in, settings.batch, where)
    needs = [
        Need("autoencoder", weights, where, sizes),
        Need("its gradients", gradients, where, f"as {of_trained}"),
        Need("optimiser", 2 * gradients, where, f"Adam: 2 x {of_trained}"),
        Need("statistics of features", statistics, where, f"of {sae.n_features:,} features, as in the states"),
        *step,
    ]

    # Before the first step only the autoencoder exists; after the last step `release` has freed the gradients and the
    # optimiser. The buffers of the step stay with the autoencoder.
    freed = 3 * gradients + sum(need.bytes for need in step if need.what != "pre-activations")
    kept = sum(need.bytes for need in step if need.what == "pre-activations")
    if resumed:
        needs += _reading_needs(weights, gradients, where)
    else:
        beginning = initialisation_bytes(sae, d_in, sample_tokens, where) + sample_bytes
        needs.append(_more("initialisation", beginning, freed + kept, where))
    needs.append(_more("thresholds", calibration_bytes(sae, calibration_tokens, where), freed, where))
    if where == "gpu":
        needs.append(Need("writing", largest, "memory", "a copy of the largest tensor"))

    counters = 4 * len(trained) + torch.get_rng_state().nbytes
    state = weights + 2 * gradients + statistics + counters + STATE_TEXT
    thresholds = 4 * sae.n_features * allocation_of(sae).calibrated
    keep = settings.checkpoint.keep
    needs += [
        Need("checkpoint", weights + thresholds, "disk", f"{sizes}, {thresholds:,} bytes of thresholds"),
        Need("states", (keep + 1) * state, "disk", f"{keep} that are kept + 1 being written, {state:,} bytes each"),
    ]
    return [need for need in needs if need.bytes]


def _reading_needs(weights: int, gradients: int, where: Place) -> list[Need]:
    """The state while it is read: the weights, which are then copied; the optimiser keeps its tensors."""
    needs = [Need("state, while it is read", weights, where, "as the autoencoder")]
    if where == "gpu":
        how = "the weights and the optimiser"
        needs.append(Need("state, before it is moved", weights + 2 * gradients, "memory", how))
    return needs


def _more(what: str, needed: int, free: int, where: Place) -> Need:
    how = f"{needed:,} bytes, less {free:,} that only steps need"
    return Need(what, max(0, needed - free), where, how)


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
