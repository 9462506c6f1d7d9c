"""The training loop. A step: who gets the budget, forward, backward, the optimiser's step (optim.py), who fired."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.profiler import record_function

from saelab.errors import SaelabError
from saelab.sae.allocation.selection import Wanted
from saelab.sae.model import SparseAutoencoder
from saelab.sae.settings import SaeSettings
from saelab.training.budget import Budget, Usage
from saelab.training.optim import adam, release
from saelab.training.optim import step as optimiser_step
from saelab.training.settings import TrainingSettings

Batch = Tensor | tuple[Tensor, Tensor]
"""Activations ``[batch, d_in]``, or those and the gradients of the language model's loss there."""


@dataclass(frozen=True)
class Trained:
    """What training leaves behind beside the weights."""

    tokens: int
    """Tokens seen."""
    steps: int
    """Steps taken."""
    densities: Tensor | None
    """What an inference threshold has to reproduce (thresholds.py): for mutual choice the mean density, a scalar; for
    feature choice each feature's, ``[n_features]``; None for token choice, which needs no threshold."""
    curve: tuple[float, float] | None = None
    """Feature choice: exponent and shift of the capacities."""


def train(
    sae: SparseAutoencoder,
    batches: Iterable[Batch],
    settings: TrainingSettings,
    sae_settings: SaeSettings,
    *,
    log: Callable[[dict[str, Any]], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train `sae` in place on batches scaled so that E||x||^2 = d_in.

    A batch is x ``[batch, d_in]``, or (x, gradients) where the affinity needs gradients. Ends after
    ``settings.steps`` steps, when the batches do, or after the step in which `should_stop` becomes true. Raises
    SaelabError, before the weights change, where the gradient is not finite (on a GPU, which is not waited for,
    at the next line of metrics; the weights do not change in between).
    """
    sae.beta = sae_settings.beta
    device, aux = sae.W_dec.device, sae_settings.aux
    optimiser = adam(sae, settings.lr)
    usage = Usage(sae.n_features, sae_settings, settings.dead_after, device)
    budget = Budget(sae_settings, usage, settings.steps)
    tokens, steps, begin = 0, 0, time.monotonic()
    for batch, step in zip(batches, range(settings.steps), strict=False):  # the shorter of the two ends the run
        x, gradients = batch if isinstance(batch, tuple) else (batch, None)
        if gradients is None and sae.beta:
            raise SaelabError("training: the gradient affinity needs batches of (activations, gradients)")
        rate = learning_rate(step, settings)
        for group in optimiser.param_groups:
            group["lr"] = rate

        mask = usage.wanted(len(x))
        if mask is not None and aux.lift:
            sae.lift(x, mask)
        losses = sae.training_pass(
            x,
            budget.rule(step, len(x)),
            gradients=gradients,
            beta=sae.beta,
            low=sae_settings.selection == "bfloat16",
            multi=sae_settings.multi_topk,
            wanted=None if mask is None else Wanted(mask, aux.features or max(1, sae.d_in // 2)),
        )
        with record_function("backward"):
            (losses.fvu + losses.multi / 8 + aux.coefficient * losses.aux).backward()
        with record_function("optimiser"):
            norm = optimiser_step(sae, optimiser, settings.clip)
        counts = losses.codes.firing_counts()
        usage.observe(counts, len(x))

        tokens, steps = tokens + len(x), step + 1
        logged = step % settings.log_every == 0 or step == settings.steps - 1
        if (logged or device.type == "cpu") and not math.isfinite(norm):
            raise SaelabError(f"training: the gradient is not finite at step {step}; a smaller lr may help")
        if logged:
            seconds = time.monotonic() - begin
            log(
                {
                    "step": step,
                    "tokens": tokens,
                    "lr": rate,
                    "fvu": losses.fvu.item(),
                    "aux": losses.aux.item(),
                    "l0": counts.sum().item() / len(x),
                    "gradient_norm": norm.item(),
                    "dead": int(usage.dead().sum()),
                    "wanted": 0 if mask is None else int(mask.sum()),
                    "reached": losses.reached.item(),
                    "tokens_per_second": tokens / seconds,
                }
            )
        if should_stop():
            break
    release(sae)
    return Trained(tokens, steps, budget.target(), budget.curve)


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """The rate of a step: a linear rise, a plateau and a linear fall that would reach zero after the last step."""
    rise = (step + 1) / max(1.0, settings.warmup * settings.steps)
    fall = (settings.steps - step) / max(1.0, settings.decay * settings.steps)
    return settings.lr * min(1.0, rise, fall)
