"""The training loop. A step: selection, forward, the terms of the loss, backward, the optimiser, usage of features."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from saelab.codes import Codes
from saelab.errors import SaelabError
from saelab.sae.allocation.methods import allocation_of
from saelab.sae.allocation.selection import Request, Selection
from saelab.sae.losses import Forward, terms
from saelab.sae.model import BY_FEATURE, Batch, SparseAutoencoder, Tables
from saelab.sae.settings import SaeSettings
from saelab.tensors import Rows
from saelab.training.average import Average
from saelab.training.optim import Optimiser
from saelab.training.resample import SHARE, resample
from saelab.training.settings import TrainingSettings
from saelab.training.usage import Usage


@dataclass(frozen=True)
class Trained:
    """Results of a training, besides the weights."""

    tokens: int
    """Tokens seen."""
    steps: int
    """Steps taken."""
    densities: Tensor | None
    """The densities that inference must reproduce with thresholds (thresholds.py): the mean, a scalar, or one for each
    feature, ``[n_features]``; None if inference needs no calibration."""
    facts: dict[str, Any]
    """Facts about the allocation that the checkpoint records."""


class _Part(NamedTuple):
    """Facts about a part of a batch whose gradients were added."""

    values: dict[str, Tensor]
    """The value of each term of the loss."""
    counts: Tensor
    """Number of its tokens on which each feature was active, ``[n_features]``."""
    coverage: dict[str, Any]
    """Targets of the auxiliary loss and the share with a gradient from it; empty without one, or if not logged."""
    losses: Tensor
    """Squared error of each of its tokens, for resampling; empty if no features are resampled."""


class Trainer:
    """Trains `sae` in place, one batch at a time, until `release`."""

    def __init__(self, sae: SparseAutoencoder, settings: TrainingSettings, sae_settings: SaeSettings) -> None:
        if settings.resample is not None and sae_settings.freeze != "none":
            raise SaelabError("training.resample: sets encoder and decoder rows together; set sae.freeze=none with it")
        self.sae, self.settings, self.sae_settings = sae, settings, sae_settings
        sae.beta = sae_settings.beta
        self.terms = terms(sae_settings, sae.d_in, settings.steps)
        self.optimiser = Optimiser(sae, settings.lr, unit_norm=sae_settings.unit_norm, freeze=sae_settings.freeze)
        trained, fixed_lengths = self.optimiser.trained, self.optimiser.fixed_lengths
        self.average = None if settings.ema is None else Average(sae, trained, settings.ema, fixed_lengths)
        self.usage = Usage(sae_settings, settings.dead_after, sae.W_dec.device)
        self.allocation = allocation_of(sae_settings)(sae_settings, settings.steps)
        self.steps = self.tokens = 0
        """Steps taken, and tokens seen."""

    @property
    def finished(self) -> bool:
        return self.steps >= self.settings.steps

    def step(self, batch: Batch) -> dict[str, Any] | None:
        """Train one step on a batch scaled so that E||x||^2 = d_in; returns metrics if the step is logged, else None.

        The loss is the mean of the losses of `training.accumulate` parts of the batch, each as of a batch of its own.
        Processes that share the training (`SparseAutoencoder.ranks`) all get the whole batch, and the same metrics.
        Raises SaelabError, before the weights change, if the gradient is not finite (on a GPU, where the
        host does not wait, at the next logged step; the weights do not change in between).
        """
        step, tokens, sae = self.steps, len(batch.x), self.sae
        if batch.gradients is None and self.sae_settings.needs_gradients:
            raise SaelabError("training: the gradient affinity needs batches with gradients of the model's loss")
        tables = sae.rounded_tables() if self.settings.precision == "bfloat16" else None
        targets = self.usage.targets(tokens)
        if targets is not None and self.sae_settings.aux.lift:
            sae.lift(batch.x, targets, tables)

        logged = step % self.settings.log_every == 0 or step + 1 == self.settings.steps
        batches, due = batch.cut(self.settings.accumulate), self._resampling_due(tokens)
        parts = [self._add_gradients(each, targets, tables, len(batches), logged, due) for each in batches]
        with record_function("optimiser"):
            rate = learning_rate(step, self.settings)
            norm = self.optimiser.step(rate, self.settings.clip)
        if self.average is not None:
            self.average.update(step)
        counts = sum((part.counts for part in parts[1:]), parts[0].counts)
        self.usage.observe(counts, tokens)
        self.steps, self.tokens = step + 1, self.tokens + tokens
        if due:
            share = SHARE if self.sae_settings.allocation.name == "threshold" else 1.0
            losses = torch.cat([part.losses for part in parts])
            resample(sae, self.optimiser, batch, losses, self.usage.dead(), share, seed=step)

        if (logged or norm.device.type == "cpu") and not math.isfinite(norm):
            raise SaelabError(f"training: the gradient is not finite at step {step}; a smaller lr may help")
        if not logged:
            return None
        metrics = {
            "step": step,
            "tokens": self.tokens,
            "lr": rate,
            **{name: _mean([part.values[name].item() for part in parts]) for name in parts[0].values},
            "l0": counts.sum().item() / tokens,
            "gradient_norm": norm.item(),
            "dead": int(self.usage.dead().sum()),
        }
        if parts[0].coverage:  # all parts have the same targets
            reached = _mean([part.coverage["share_reached"] for part in parts])
            metrics |= parts[0].coverage | {"share_reached": reached}
        return metrics

    def _add_gradients(
        self, batch: Batch, targets: Tensor | None, tables: Tables | None, parts: int, logged: bool, resampling: bool
    ) -> _Part:
        """Add the gradients of the loss of `batch`, one of `parts` parts of a step's batch, over `parts`."""
        step, sae = self.steps, self.sae
        rule = self.allocation.rule(step, len(batch.x), self.usage.densities, sae.encoder)
        requests = [term.request(rule, targets) for term in self.terms]
        bf16 = self.sae_settings.selection == "bfloat16"
        forward, found = sae.training_pass(batch, rule, requests, bf16=bf16, tables=tables)
        dead = self.usage.dead()
        values = {
            term.name: term.value(forward, entries, dead) for term, entries in zip(self.terms, found, strict=True)
        }
        coverage = _target_coverage(requests, found, self._counts) if logged else {}
        if logged and targets is not None and not coverage:
            coverage = {"targets": 0, "share_reached": 0.0}
        counts = self._counts(forward.codes)
        losses = self._losses(forward) if resampling else batch.x.new_zeros(0)
        del forward, found  # the backward pass needs the memory
        with record_function("backward"):
            loss = sum(term.weight(step) / parts * values[term.name] for term in self.terms)
            loss.backward()  # type: ignore[union-attr]
        return _Part({name: value.detach() for name, value in values.items()}, counts, coverage, losses)

    def _counts(self, codes: Codes) -> Tensor:
        """Number of tokens of the batch on which each of all features is active, ``[n_features]`` int64."""
        sae, axis = self.sae, self.sae.ranks.features
        counts = sae.ranks.data.sum_(codes.firing_counts())
        sizes = [part.stop - part.start for part in axis.parts(sae.all_features)]
        return torch.cat(axis.gather(counts, sizes))

    def _losses(self, forward: Forward) -> Tensor:
        """Squared error of each token of the batch, ``[tokens]``."""
        error = (forward.target - forward.reconstruction).detach()
        return torch.cat(self.sae.ranks.data.gather(error.square().sum(1)))

    def _resampling_due(self, tokens: int) -> bool:
        """Whether dead features are resampled at the end of this step, of `tokens` tokens; not after the last one."""
        every = self.settings.resample
        if every is None or self.steps + 1 >= self.settings.steps:
            return False
        return (self.tokens + tokens) // every > self.tokens // every

    def trained(self) -> Trained:
        """Results of the training so far."""
        return Trained(self.tokens, self.steps, self.allocation.target(), self.allocation.facts())

    def own_rows(self, name: str, rows: int) -> slice:
        """The rows of this process of a tensor with `rows` rows, given its name in a state, such as sae/W_enc."""
        parts = name.split("/")
        return (
            self.sae.part
            if any(part in BY_FEATURE for part in parts) and rows == self.sae.all_features
            else slice(rows)
        )

    def release(self) -> None:
        """Make the autoencoder an ordinary module again: gradients are None, and backward passes return them.

        With `training.ema` its weights are the averaged ones from then on, and they contain the cosine affinity.
        """
        self.optimiser.release()
        if self.average is not None:
            self.average.apply()
        self.sae.take_in_affinity()

    def state_dict(self) -> dict[str, Any]:
        """State from which a new trainer with the same settings continues exactly here; tensors are not copied.

        Those that processes share the features of are `Rows`.
        """
        moments = self.optimiser.state_dict()
        return {
            "sae": {name: self._rows(name, value) for name, value in self.sae.named_parameters()},
            "optimiser": {
                name: {kind: self._rows(name, value) for kind, value in found.items()}
                for name, found in moments.items()
            },
            "usage": self.usage.state_dict(),
            "allocation": self.allocation.state_dict(),
            "steps": self.steps,
            "tokens": self.tokens,
            **(
                {}
                if self.average is None
                else {"ema": {name: self._rows(name, value) for name, value in self.average.state_dict().items()}}
            ),
        }

    def _rows(self, name: str, value: Tensor) -> Tensor | Rows:
        """`value`, of the parameter `name`, as the rows that this process has of it."""
        sae = self.sae
        if sae.ranks.features.size == 1 or name not in BY_FEATURE or value.ndim == 0:  # Adam's count of steps
            return value
        return Rows(value, sae.part.start, sae.all_features)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state, whose tensors have the rows of this process only (`own_rows`)."""
        for name, parameter in self.sae.named_parameters():
            parameter.data.copy_(state["sae"][name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.usage.load_state_dict(state["usage"])
        self.allocation.load_state_dict(state["allocation"])
        if self.average is not None:
            self.average.load_state_dict(state["ema"])
        self.steps, self.tokens = state["steps"], state["tokens"]


def train(
    sae: SparseAutoencoder,
    batches: Iterable[Batch],
    settings: TrainingSettings,
    sae_settings: SaeSettings,
    *,
    log: Callable[[dict[str, Any]], None] = lambda metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train `sae` in place on batches scaled so that E||x||^2 = d_in; returns the results besides the weights.

    Ends after ``settings.steps`` steps, when the batches do, or after the step in which `should_stop` becomes true.
    Raises SaelabError if a gradient is not finite (`Trainer.step`).
    """
    trainer, begin = Trainer(sae, settings, sae_settings), time.monotonic()
    for batch in batches:
        metrics = trainer.step(batch)
        if metrics is not None:
            log(metrics | {"tokens_per_second": trainer.tokens / (time.monotonic() - begin)})
        if trainer.finished or should_stop():
            break
    trainer.release()
    return trainer.trained()


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """The rate of step `step`, from 0: a linear rise, a plateau and a fall that would reach zero after the last step.

    lr * min(1, rise, fall). With s steps, rise is (step + 1) / (warmup s), and r = (s - step) / (decay s) falls to
    zero; fall is r if the schedule is linear, and (1 - cos(pi min(1, r))) / 2 if it is cosine.
    """
    rise = (step + 1) / max(1.0, settings.warmup * settings.steps)
    fall = (settings.steps - step) / max(1.0, settings.decay * settings.steps)
    if settings.schedule == "cosine":
        fall = (1 - math.cos(math.pi * min(1.0, fall))) / 2
    return settings.lr * min(1.0, rise, fall)


def _target_coverage(
    requests: list[Request | None],
    found: list[Selection | None],
    counts: Callable[[Codes], Tensor] = Codes.firing_counts,
) -> dict[str, Any]:
    """Number of target features of the auxiliary loss, and the share with a gradient from it; empty without one."""
    for request, entries in zip(requests, found, strict=True):
        if request is not None and request.mask is not None and entries is not None:
            selected = int((counts(entries.pattern) > 0).sum())
            targets = int(request.mask.sum())
            return {"targets": targets, "share_reached": selected / max(1, targets)}
    return {}


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
