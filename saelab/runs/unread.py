"""Settings that have no effect because of other settings, and the note that names those that a user has set.

The table is about the settings of a training. A setting counts as read if files decide about it, as the thresholds in a
checkpoint to start from do.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NamedTuple

from saelab.progress import Say
from saelab.runs.config import RunSettings, leaves


class Rule(NamedTuple):
    settings: str
    """Names of settings, or of sections, all of whose settings are meant."""
    read: Callable[[RunSettings], bool]
    """Whether a run reads them. A setting of several rules is read if all of them say so."""
    why: str
    """What leaves them without effect; braces name settings, whose values stand there."""


_ENCODER, _AFFINITY, _ALLOCATION, _AUX, _SPARSITY = (
    f"with {name}: {{sae.{name}.name}}" for name in ("encoder", "affinity", "allocation", "aux", "sparsity")
)
_CAPACITIES = "sae.allocation.capacity sae.allocation.exponent sae.allocation.shift sae.allocation.refresh"
_TEXT = " ".join(
    f"corpus.{name}" for name in ("source", "text_column", "split", "subset", "revision", "min_tokens", "max_tokens")
)

RULES = (
    Rule(
        "sae.k",  # jumprelu: the first scale of the encoder; aux_zipf: the expected densities
        lambda s: (
            s.sae.allocation.name != "threshold" or s.sae.encoder.name == "jumprelu" or s.sae.aux.name == "aux_zipf"
        ),
        _ALLOCATION,
    ),
    Rule("sae.k_steps", lambda s: s.sae.k_start is not None, "without k_start"),
    Rule("sae.seed", lambda s: s.sae.init_from is None, "with init_from"),
    Rule("sae.unit_norm", lambda s: s.sae.freeze != "decoder" or s.sae.init_from is not None, "with freeze: decoder"),
    Rule("sae.encoder.bandwidth sae.encoder.threshold", lambda s: s.sae.encoder.name == "jumprelu", _ENCODER),
    Rule("sae.affinity.beta", lambda s: s.sae.affinity.name == "gradient", _AFFINITY),
    Rule("sae.affinity.power", lambda s: s.sae.affinity.name == "cosine", _AFFINITY),
    Rule(f"{_CAPACITIES} sae.allocation.after", lambda s: s.sae.allocation.name == "feature_choice", _ALLOCATION),
    Rule(_CAPACITIES, lambda s: s.sae.allocation.after < 1, "with after: 1"),
    Rule(
        "sae.allocation.exponent sae.allocation.shift",
        lambda s: s.sae.allocation.capacity == "zipf",
        "with capacity: uniform",
    ),
    Rule("sae.aux.coefficient sae.aux.features sae.aux.lift", lambda s: s.sae.aux.name != "none", _AUX),
    Rule("sae.aux.exponent sae.aux.shift sae.aux.share", lambda s: s.sae.aux.name == "aux_zipf", _AUX),
    Rule("sae.sparsity.coefficient sae.sparsity.warmup", lambda s: s.sae.sparsity.name != "none", _SPARSITY),
    Rule(
        "sae.sparsity.target_l0",  # jumprelu: the first thresholds
        lambda s: s.sae.sparsity.name == "l0" or (s.sae.encoder.name == "jumprelu" and s.sae.encoder.threshold is None),
        _SPARSITY,
    ),
    Rule("sae.sparsity.p", lambda s: s.sae.sparsity.name == "lp", _SPARSITY),
    Rule("sae.sparsity.slope", lambda s: s.sae.sparsity.name == "tanh", _SPARSITY),
    Rule("training.schedule", lambda s: s.training.decay > 0, "with decay: 0"),
    Rule(
        "corpus.held_out",
        lambda s: s.corpus.source != "demo" or s.activations.array is not None,
        "with corpus: demo",
    ),
    Rule("activations.stream", lambda s: s.activations.cache is None, "with activations.cache"),
    Rule(
        f"activations.stream activations.special_tokens cache model eval.ce_tokens {_TEXT}",
        lambda s: s.activations.array is None,
        "with activations.array",
    ),
)
"""Which settings are read when."""
DEFAULTS = leaves(asdict(RunSettings(out="-", site="-")))


def note_unread(runs: Sequence[RunSettings], say: Say) -> None:
    """Report on one line the settings that a run changes from their defaults and that none of `runs` reads."""
    unread = [_unread(run) for run in runs]
    changed = {name for run in runs for name, value in leaves(asdict(run)).items() if value != DEFAULTS.get(name)}
    found: dict[str, list[str]] = {}
    for name, why in unread[0].items():
        if name in changed and all(name in each for each in unread):
            found.setdefault(why, []).append(name)
    if found:
        parts = (f"{', '.join(names)} {'have' if names[1:] else 'has'} no effect {why}" for why, names in found.items())
        say(f"note: {'; '.join(parts)}")


def _unread(run: RunSettings) -> dict[str, str]:
    """The settings that `run` does not read, each with the reason."""
    found: dict[str, str] = {}
    for rule in RULES:
        if not rule.read(run):
            why, given = rule.why.format(**vars(run)), tuple(f"{name}." for name in rule.settings.split())
            for name in DEFAULTS:
                if f"{name}.".startswith(given):
                    found.setdefault(name, why)
    return found
