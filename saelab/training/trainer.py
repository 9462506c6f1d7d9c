"""The training loop. Order of a step: backward, decoder-parallel gradient out, clip, Adam, unit decoder rows."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from saelab.errors import SaelabError, SettingError
from saelab.sae.model import SaeSettings, SparseAutoencoder

MAX_DEAD_AFTER = 10_000_000
DEAD_SHARE = 0.10


@dataclass(frozen=True)
class TrainingSettings:
    tokens: int = 1_000_000
    """Ordinary tokens (no BOS, no other special token) to train on."""
    batch: int = 2048
    """Tokens per step."""
    lr: float = 1e-3
    """Peak learning rate of Adam."""
    warmup: float = 0.05
    """Share of the steps over which the rate rises from zero."""
    decay: float = 0.5
    """Share of the steps, the last ones, over which the rate falls to zero."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    log_every: int = 10
    """Steps between lines of metrics."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "log_every"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}: {getattr(self, name)} is not a positive number")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingError(f"{name}: {getattr(self, name)} is not a positive number")
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"{name}: {getattr(self, name)} is not a share between 0 and 1")
        if self.batch < 2:
            raise SettingError(f"batch: {self.batch} token has no variance to explain; at least 2 are needed")
        if self.batch > self.tokens:
            raise SettingError(f"batch: {self.batch} is more than the {self.tokens} tokens of the run")

    @property
    def steps(self) -> int:
        return self.tokens // self.batch

    @property
    def dead_after(self) -> int:
        """A feature is dead, while training, when it was not active for this many tokens."""
        return min(MAX_DEAD_AFTER, round(DEAD_SHARE * self.tokens))


def train(
    sae: SparseAutoencoder,
    batches: Iterable[Tensor],
    settings: TrainingSettings,
    sae_settings: SaeSettings,
    *,
    log: Callable[[dict[str, Any]], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Train `sae` in place on batches ``[batch, d_in]`` scaled so that E||x||^2 = d_in; returns the tokens seen.

    Ends after ``settings.steps`` steps, when the batches do, or after the step in which `should_stop` becomes true.
    Raises SaelabError, before the weights change, where the gradient is not finite.
    """
    k_aux = sae_settings.aux_features or max(1, sae.d_in // 2)
    optimiser = torch.optim.Adam(sae.parameters(), lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    silent_for = torch.zeros(sae.n_features, dtype=torch.long, device=sae.W_dec.device)  # tokens since last active
    tokens, begin = 0, time.monotonic()
    for x, step in zip(batches, range(settings.steps), strict=False):  # the shorter of the two ends the run
        rate = learning_rate(step, settings)
        for group in optimiser.param_groups:
            group["lr"] = rate

        dead = (silent_for >= settings.dead_after).nonzero().squeeze(1) if sae_settings.aux == "aux_k" else None
        losses = sae.training_pass(x, dead, k_aux)
        with record_function("backward"):
            (losses.fvu + sae_settings.aux_coefficient * losses.aux).backward()
        with record_function("optimiser"):
            remove_parallel_gradient(sae)
            gradient_norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), settings.clip)
            if not math.isfinite(gradient_norm):
                raise SaelabError(f"training: the gradient is not finite at step {step}; a smaller lr may help")
            optimiser.step()
            optimiser.zero_grad()
            sae.renormalise_decoder()

        tokens += len(x)
        silent_for += len(x)
        silent_for[losses.codes.features[losses.codes.values > 0]] = 0
        if step % settings.log_every == 0 or step == settings.steps - 1:
            seconds = time.monotonic() - begin
            log({
                "step": step, "tokens": tokens, "lr": rate, "fvu": losses.fvu.item(), "aux": losses.aux.item(),
                "l0": (losses.codes.values > 0).sum().item() / len(x), "gradient_norm": gradient_norm.item(),
                "dead": int((silent_for >= settings.dead_after).sum()), "tokens_per_second": tokens / seconds,
            })  # fmt: skip
        if should_stop():
            break
    return tokens


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """The rate of a step: a linear rise, a plateau and a linear fall that would reach zero after the last step."""
    rise = (step + 1) / max(1.0, settings.warmup * settings.steps)
    fall = (settings.steps - step) / max(1.0, settings.decay * settings.steps)
    return settings.lr * min(1.0, rise, fall)


@torch.no_grad()
def remove_parallel_gradient(sae: SparseAutoencoder) -> None:
    """Take out the part of the decoder's gradient that would change the length of its (unit) rows."""
    gradient = sae.W_dec.grad
    assert gradient is not None
    gradient.addcmul_(torch.linalg.vecdot(gradient, sae.W_dec)[:, None], sae.W_dec, value=-1)
