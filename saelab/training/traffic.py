"""The bytes that a process sends to the others in a training step, by kind; it receives as many.

They are counted as rings move them: of S bytes that n processes add up (all-reduce), each sends 2 (n - 1) / n x S; of S
bytes of each that all of them get (gather), (n - 1) x S; and of S bytes of each, an n-th for every process (swap),
(n - 1) / n x S.
"""

from dataclasses import dataclass

from saelab.memory import no_numbers
from saelab.ranks import Axis, Ranks
from saelab.sae.losses import MULTI_FACTOR
from saelab.sae.needs import aux_entries, candidates
from saelab.sae.new import Widths, bare_autoencoder
from saelab.sae.settings import SaeSettings
from saelab.training.optim import Optimiser
from saelab.training.settings import TrainingSettings

_CANDIDATE = 12
"""Bytes of a candidate: its token, its feature and its score."""
_CHOSEN = 1
"""Bytes of the answer whether it is chosen."""
_SIZE = 8
"""Bytes of a size that is sent before tensors of that size."""
_ORIGIN = 24
"""Bytes of the id, row and position of a token, int64."""


@dataclass(frozen=True)
class Traffic:
    what: str
    bytes: int
    """Bytes that a process sends in a step, and receives."""
    how: str
    """What is exchanged, in words."""


def step_traffic(sae: SaeSettings, settings: TrainingSettings, widths: Widths, ranks: Ranks) -> list[Traffic]:
    """What `Trainer.step` exchanges if the processes are as `ranks`.

    Candidates and the auxiliary loss are those of a step in which all budgets are spent: an upper bound.
    """
    data, features, every, parts = ranks.data, ranks.features, ranks.every, settings.accumulate
    part = -(-settings.batch // parts)
    tokens, n = data.share(part), features.share(sae.n_features)
    budgets = [sae.largest_k, *[MULTI_FACTOR * sae.largest_k] * sae.multi_topk]
    gradients, d_out = _trained_bytes(sae, settings, widths, ranks), widths.d_out or widths.d_in
    gated, nested = sae.encoder.name == "gated", len(sae.prefix_sizes)
    decodings = len(budgets) - 1 + nested + gated
    decoded, mean, counted = 4 * tokens * d_out, 4 * d_out, _reduced(8 * n, data) + _gathered(8 * n, features)
    in_parts = f", {parts} times" * (parts > 1)
    competing, how = _candidate_traffic(sae, budgets, part, ranks)
    found = [
        Traffic("gradients", _reduced(gradients, data), f"{gradients:,} bytes, added up over the parts of the tokens"),
        Traffic(
            "reconstruction",
            parts * decodings * _reduced(decoded, features),
            f"{tokens:,} tokens x {d_out:,} x 4 bytes{f' x {decodings}' * (decodings > 1)}, added up over the parts of "
            f"the features{in_parts}",
        ),
        Traffic("candidates", parts * competing, how + in_parts),
    ]
    if sae.aux.name != "none":
        most = min(n, aux_entries(sae, widths.d_in))
        aux = _swapped(4 * tokens * most, features) + _swapped(_CHOSEN * tokens * most, features)
        aux += _reduced(_SIZE, features) + nested * (_reduced(decoded, features) + _reduced(mean + 8, data))
        aux += (1 + nested * (sae.aux.name == "aux_zipf")) * _reduced(4, every) + counted // settings.log_every
        how = f"{tokens:,} tokens x {most:,} pre-activations x {4 + _CHOSEN} bytes, and a reconstruction, added up"
        lift = sae.aux.lift * _reduced(4 * n, data)
        found.append(Traffic("auxiliary loss", parts * aux + lift, how + in_parts))
    sums = decodings * _reduced(4, data) + _reduced(mean + 4, features)
    sums += (sae.sparsity.name != "none") * _reduced(4, every)
    how = f"of {n:,} features x 8 bytes, {d_out:,} x 4 bytes of means, and sums of the losses"
    return [*found, Traffic("counts and means", parts * (counted + sums), how + in_parts)]


def activation_traffic(d_in: int, batch: int, itemsize: int, gradients: bool, ranks: Ranks) -> Traffic:
    """What `FromModel` exchanges for a batch: each process runs the model on its share of the rows, and gets all.

    d_in is the sum of the sites' widths, and `itemsize` that of the model's dtype.
    """
    each = itemsize * d_in + _ORIGIN + 4 * d_in * gradients
    own = ranks.every.share(batch) * each
    return Traffic("activations", (ranks.every.size - 1) * own, f"{batch:,} tokens x {each:,} bytes, gathered")


def _candidate_traffic(sae: SaeSettings, budgets: list[int], batch: int, ranks: Ranks) -> tuple[int, str]:
    """Bytes of the candidates for which processes compete, and how; of feature choice, in the phase that sends more."""
    found = [(0, "nothing is compared")]
    for phase in zip(*(candidates(sae, k, batch, ranks) for k in budgets), strict=True):
        sent = sum(
            _gathered(_CANDIDATE * each.sent, each.axis)
            if each.by_all
            else _swapped(_CANDIDATE * each.sent, each.axis) + _swapped(_CHOSEN * each.sent, each.axis)
            for each in phase
        )
        size = _CANDIDATE if phase[0].by_all else _CANDIDATE + _CHOSEN
        found.append((sent, f"{sum(each.sent for each in phase):,} entries x {size} bytes"))
    return max(found)


def _trained_bytes(sae: SaeSettings, settings: TrainingSettings, widths: Widths, ranks: Ranks) -> int:
    with no_numbers():
        optimiser = Optimiser(bare_autoencoder(sae, *widths, ranks=ranks), settings.lr, freeze=sae.freeze)
        return sum(parameter.nbytes for parameter in optimiser.trained)


def _reduced(size: int, axis: Axis) -> int:
    return round(2 * size * (axis.size - 1) / axis.size)


def _gathered(size: int, axis: Axis) -> int:
    return (size + _SIZE) * (axis.size - 1)


def _swapped(size: int, axis: Axis) -> int:
    return (size // axis.size + _SIZE * axis.size) * (axis.size - 1)
