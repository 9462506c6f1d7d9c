"""The bytes that are said to be exchanged in a step are those that threads exchange."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from saelab.ranks import ALONE, Ranks, layout
from saelab.sae.model import Batch
from saelab.sae.new import Widths, bare_autoencoder
from saelab.sae.settings import (
    AffinitySettings,
    AllocationSettings,
    AuxSettings,
    EncoderSettings,
    SaeSettings,
    SparsitySettings,
)
from saelab.training.settings import TrainingSettings
from saelab.training.traffic import step_traffic
from saelab.training.trainer import Trainer
from tests.threads import ThreadAxis, run_threads

D_IN, N, K, BATCH = 24, 600, 12, 3000
THRESHOLD = AllocationSettings("threshold")
METHODS = {
    "topk": SaeSettings(N, K),
    "mutual": SaeSettings(N, K, allocation=AllocationSettings("mutual_choice"), aux=AuxSettings("none")),
    "feature": SaeSettings(N, K, allocation=AllocationSettings("feature_choice", capacity="uniform")),
    "multi": SaeSettings(N, K, multi_topk=True, affinity=AffinitySettings("gradient"), aux=AuxSettings("none")),
    "lift": SaeSettings(N, K, aux=AuxSettings("aux_zipf", features=7, lift=True), freeze="decoder"),
    "gated": SaeSettings(N, K, EncoderSettings("gated"), allocation=THRESHOLD, sparsity=SparsitySettings("tanh")),
    "prefixes": SaeSettings(N, K, allocation=AllocationSettings("group_max"), prefixes=(0.1, 0.5)),
    "relu": SaeSettings(N, K, allocation=THRESHOLD, sparsity=SparsitySettings("l1"), aux=AuxSettings("none")),
    "jumprelu": SaeSettings(
        N, K, EncoderSettings("jumprelu"), allocation=THRESHOLD, sparsity=SparsitySettings("l0"), freeze="encoder"
    ),
}
KINDS = {
    "auxiliary": "auxiliary loss",
    "strongest": "auxiliary loss",
    "lift": "auxiliary loss",
    "_target_coverage": "auxiliary loss",
    "keep": "candidates",
    "training_pass": "reconstruction",  # without the choice of entries, which is above
    "decode": "reconstruction",
    "_counts": "counts and means",
    "_norm": "counts and means",
    "batch_fvu": "counts and means",
    "l1": "counts and means",
    "_nested": "counts and means",
    "_fvu": "counts and means",
    "smooth_l0": "counts and means",
    "gate": "reconstruction",
    "l0": "counts and means",
    "backward": "counts and means",
}
"""By the function that exchanges; what is left is the optimiser's, the gradients."""


def exchanged(settings: SaeSettings, training: TrainingSettings, ranks: Ranks) -> Counter[str]:
    """Bytes that this thread sends in a step, by kind; of feature choice, in the phase that sends more."""
    if settings.allocation.name != "feature_choice":
        return exchanged_in_a_step(settings, training, ranks)
    phases = [replace(settings, allocation=replace(settings.allocation, after=after)) for after in (0.0, 1.0)]
    first, second = (exchanged_in_a_step(phase, training, ranks) for phase in phases)
    return first | second


def exchanged_in_a_step(settings: SaeSettings, training: TrainingSettings, ranks: Ranks) -> Counter[str]:
    sae = bare_autoencoder(settings, D_IN, ranks=ranks)
    generator = torch.Generator().manual_seed(0)
    weights = torch.nn.functional.normalize(torch.randn(N, D_IN, generator=generator), dim=1)[sae.part]
    for table in (sae.W_enc, sae.W_dec):
        table.data.copy_(weights)
    trainer = Trainer(sae, training, settings)
    trainer.usage.dead_after = 0  # the auxiliary loss targets all features
    trainer.step(Batch(torch.randn(BATCH, D_IN, generator=generator), gradients=torch.ones(BATCH, D_IN)))
    sent: Counter[str] = Counter()
    for axis in (ranks.data, ranks.features, ranks.every):
        assert isinstance(axis, ThreadAxis)
        sent_now, axis.exchanges[:] = axis.sent, []
        for each, size in sent_now:
            sent[next((kind for name, kind in KINDS.items() if name in each.callers), "gradients")] += round(size)
    return sent


@pytest.mark.parametrize(
    ("method", "data", "features"),
    [*((name, 2, 2) for name in METHODS), *((name, *n) for name in ("topk", "mutual") for n in ((3, 1), (1, 3)))],
)
def test_a_step_exchanges_what_the_plan_says(method: str, data: int, features: int) -> None:
    parts = 3 if method == "lift" else 1
    settings, training = METHODS[method], TrainingSettings(10 * BATCH, BATCH, log_every=1, accumulate=parts)
    said = {each.what: each.bytes for each in step_traffic(settings, training, Widths(D_IN), layout(data, features))}
    for found in run_threads(lambda ranks: exchanged(settings, training, ranks), data=data, features=features):
        assert found.keys() <= said.keys()
        for kind, size in said.items():
            assert size == pytest.approx(found[kind], rel=0.05, abs=100), kind


def test_one_process_exchanges_nothing() -> None:
    for settings in METHODS.values():
        assert not any(each.bytes for each in step_traffic(settings, TrainingSettings(), Widths(D_IN), ALONE))
