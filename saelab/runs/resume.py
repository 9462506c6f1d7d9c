"""Exact resume of a run: checkpoints of its state, and the settings that may differ.

The folder `state/` of a run has the last few states, each in a folder named by the steps taken, whole or absent.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saelab.errors import SaelabError, WriteError
from saelab.files import make_folder, remove_folder, replace_folder, temporary, translate_errors
from saelab.ranks import ALONE, ElsewhereError, LostProcessError, Ranks
from saelab.runs import folder
from saelab.runs.config import RunSettings, leaves
from saelab.runs.job import settings_of
from saelab.training.settings import CheckpointSettings
from saelab.training.state import VALUES, load_state, load_tensor, load_values, save_state

FREE = frozenset(
    {
        "out",
        "device",
        "activations.array.labels",
        "model.self_check",
        "second_model.self_check",
        "training.log",
        "training.log_every",
        "training.checkpoint.minutes",
        "training.checkpoint.tokens",
        "training.checkpoint.keep",
        "parallel.data",
        "parallel.features",
    }
)
"""Settings that may differ when a run is resumed: they do not change the training. So may those of analyses."""
RAISED = frozenset({"training.tokens"})
"""Settings that may be larger when a run is resumed. From then on the schedules use the new value."""
_SAME = """
    site target more_sites seed context
    model.name model.dtype model.device_map model.attention
    second_model second_model.name second_model.dtype second_model.device_map second_model.attention
    corpus.source corpus.text_column corpus.split corpus.subset corpus.revision corpus.held_out corpus.min_tokens
    corpus.max_tokens
    activations.stream.buffer_tokens activations.stream.rows_per_forward activations.cache activations.cache.path
    activations.cache.buffer_tokens activations.array activations.array.path activations.array.tensor
    activations.array.buffer_tokens activations.special_tokens activations.max_norm activations.inputs
    cache.dtype cache.sites cache.gradients cache.rows_per_forward cache.shard_tokens cache.lanes cache.nonfinite
    sae.n_features sae.k sae.k_start sae.k_steps
    sae.encoder.name sae.encoder.bandwidth sae.encoder.threshold sae.affinity.name sae.affinity.beta
    sae.affinity.power sae.allocation.name sae.allocation.capacity sae.allocation.exponent sae.allocation.shift
    sae.allocation.after sae.allocation.refresh sae.aux.name sae.aux.coefficient sae.aux.features sae.aux.exponent
    sae.aux.shift sae.aux.share sae.aux.lift sae.sparsity.name sae.sparsity.coefficient sae.sparsity.target_l0
    sae.sparsity.warmup sae.sparsity.p sae.sparsity.slope sae.prefixes
    sae.multi_topk sae.selection sae.b_dec_init sae.unit_norm sae.seed sae.freeze sae.skip
    sae.init_from
    training.batch training.lr training.warmup training.decay training.schedule training.clip training.accumulate
    training.precision training.ema training.resample
    eval.tokens eval.ce_tokens eval.rows_per_forward
    features.tokens features.rows_per_forward
"""
SAME = frozenset(_SAME.split())
"""Settings that must not differ. A new setting belongs in one of the three sets."""


def resumed_settings(run: Path, settings: RunSettings) -> RunSettings:
    """`settings`, if the run in the folder `run` can continue with them. Raises SaelabError that names both values."""
    before, now = leaves(asdict(settings_of(run / folder.SETTINGS))), leaves(asdict(settings))
    wrong = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        free = name in FREE or name.startswith("analysis.")
        raised = name in RAISED and new is not None and old is not None and new > old
        if old == new or free or raised:
            continue
        wrong.append(f"{name}: is {old} in the run, not {new}" + (" (it can only be raised)" if name in RAISED else ""))
    if wrong:
        raise SaelabError(f"{run}: cannot be resumed with other settings; {'; '.join(wrong)}")
    return settings


@contextmanager
def resumable(run: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """Add to the message of an error of writing, or of the end of another process, how the training in `run` goes
    on."""
    try:
        yield
    except ElsewhereError:
        raise
    except (WriteError, LostProcessError) as error:
        raise type(error)(f"{error}: `{resuming(run, ranks)}` goes on from the last state") from error


def resuming(run: Path, ranks: Ranks = ALONE) -> str:
    """The command that goes on with the training in the folder `run`."""
    return f"{'torchrun ... -m ' if ranks.every.size > 1 else ''}saelab train --resume {run}"


class Checkpoints:
    """Writes the state of a run at intervals, and keeps the last few."""

    def __init__(self, run: Path, settings: CheckpointSettings) -> None:
        self.folder, self.settings = run / folder.STATE, settings
        self._time, self._tokens = time.monotonic(), 0

    def due(self, tokens: int) -> bool:
        """Whether the interval in minutes, or in tokens of training, has passed since the last state."""
        minutes, every = self.settings.minutes, self.settings.tokens
        by_time = minutes is not None and time.monotonic() - self._time >= 60 * minutes
        return by_time or (every is not None and tokens // every > self._tokens // every)

    def save(self, steps: int, tokens: int, state: Mapping[str, Any], ranks: Ranks = ALONE) -> Path:
        """Write `state`, of which each of `ranks` has a part, and return its folder.

        If that fails, as on a full disk, the earlier states stay.
        """
        path = self.folder / f"{steps:09d}"
        if ranks.first:
            with translate_errors(self.folder):
                make_folder(self.folder)
                with replace_folder(path) as unfinished:
                    save_state(unfinished, state, ranks)
                for older in states(self.folder.parent)[: -self.settings.keep]:
                    remove_folder(older)
        else:
            save_state(temporary(path), state, ranks)
        self._time, self._tokens = time.monotonic(), tokens
        return path


def states(run: Path) -> list[Path]:
    """Folders of the complete states of a run, in order of their steps."""
    found = (run / folder.STATE).glob("[0-9]*")
    return sorted(path for path in found if path.name.isdecimal() and (path / VALUES).is_file())


def last_state(run: Path, device: torch.device, own: Callable[[str, int], slice]) -> dict[str, Any]:
    """The last of the `states` of a run, of which there is one, with the tensors and arguments of `load_state`."""
    return load_state(states(run)[-1], device, own)


def last_position(run: Path) -> dict[str, Any]:
    """The position in the source of the last of the `states` of a run. Raises SaelabError if it is damaged."""
    return load_values(states(run)[-1])["source"]


def silent_for(run: Path) -> Tensor | None:
    """Training tokens since each feature was last active, ``[n_features]`` int64, at the end of the training of a run.

    None if the run has no state any more. Raises SaelabError if the state is damaged.
    """
    found = states(run)
    return load_tensor(found[-1], "trainer", "usage", "silent_for") if found else None
