"""Memory of a process, and bytes that it sends in a step, on 1 to 64 processes: the table of docs/distributed.md.

    python scripts/bench/layouts.py

An autoencoder of 2^20 features on 4,096 dimensions, k 64, batches of 65,536 tokens, on GPUs. The numbers are those of
`saelab plan`, without the language model and its passes; nothing is allocated.
"""

from collections.abc import Iterator

from saelab.activations.needs import stream_needs
from saelab.activations.settings import StreamSettings
from saelab.activations.source import SAMPLE_TOKENS
from saelab.memory import fullest
from saelab.ranks import Ranks, layout
from saelab.sae.new import Widths
from saelab.sae.settings import SaeSettings
from saelab.sae.thresholds import CALIBRATION_TOKENS
from saelab.training.needs import training_needs
from saelab.training.settings import TrainingSettings
from saelab.training.traffic import activation_traffic, step_traffic

D_IN, BF16 = 4096, 2
SAE = SaeSettings(n_features=2**20, k=64)
TRAINING = TrainingSettings(tokens=10**9, batch=65_536)
LAYOUTS = {
    "data": [(n, 1) for n in (1, 2, 4, 8, 16, 32, 64)],
    "features": [(1, n) for n in (2, 4, 8, 16, 32, 64)],
    "both": [(2, 2), (2, 4), (4, 4), (4, 8), (8, 8)],
}
KINDS = ("gradients", "reconstruction", "candidates", "auxiliary loss", "activations", "counts and means")


def memory(ranks: Ranks) -> tuple[int, int]:
    """Bytes of GPU memory that a process needs, and that process 0 needs, which ends with the whole autoencoder."""
    source = stream_needs(
        StreamSettings(), D_IN, "gpu", batch_tokens=TRAINING.batch, sample_tokens=SAMPLE_TOKENS, gradients=False
    )
    training = training_needs(
        [(SAE, Widths(D_IN))],
        TRAINING,
        "gpu",
        sample_tokens=SAMPLE_TOKENS,
        calibration_tokens=CALIBRATION_TOKENS,
        ranks=ranks,
    )
    needs = [need for need in (*source, *training) if need.where == "gpu"]
    others = [need for need in needs if need.what != "whole autoencoder"]
    return sum(need.bytes for need in fullest(others)[1]), sum(need.bytes for need in fullest(needs)[1])


def traffic(ranks: Ranks) -> dict[str, int]:
    """Bytes that a process sends in a step, by kind."""
    found = step_traffic(SAE, TRAINING, Widths(D_IN), ranks)
    found.append(activation_traffic(D_IN, TRAINING.batch, BF16, gradients=False, ranks=ranks))
    return {each.what: each.bytes for each in found}


def table() -> Iterator[str]:
    """The lines of the table, in Markdown."""
    yield f"| processes | data x features | memory | of process 0 | sent in a step | {' | '.join(KINDS)} |"
    yield "|" + "---:|" * (len(KINDS) + 5)
    for layouts in LAYOUTS.values():
        for data, features in layouts:
            ranks = layout(data, features)
            sent = traffic(ranks)
            sizes = [*memory(ranks), sum(sent.values()), *(sent[kind] for kind in KINDS)]
            cells = [f"{data * features}", f"{data} x {features}", *(f"{size / 1e9:,.1f}" for size in sizes)]
            yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join(table()))
