"""The ways to allocate: the rule of each training step, and the density that inference must reproduce. One table.

A method may have a schedule of its own, and state that a resumed run continues from.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from saelab.sae.allocation.candidates import Bands, runs_of
from saelab.sae.allocation.capacity import draw_capacities, fit_zipf, ranks, zipf_capacities
from saelab.sae.allocation.rules import FeatureChoice, GroupMax, MutualChoice, Rule, Threshold, TokenChoice
from saelab.sae.encoder import Encoder
from saelab.sae.settings import SaeSettings


class Allocation(Protocol):
    """A way to allocate in one training of `steps` steps."""

    saelens: ClassVar[str]
    """Name of the architecture in training with a linear encoder; SAELens' name if it has one."""
    calibrated: ClassVar[bool]
    """Whether inference needs thresholds set after training, because the rule compares tokens of a batch."""
    whole_columns: ClassVar[bool]
    """Whether the rule compares all tokens of a batch at one feature, so that no tile may split the tokens."""
    initial_threshold: ClassVar[float | None]
    """Initial threshold of the autoencoder; None: it has no threshold and keeps the k best of each token."""

    def __init__(self, settings: SaeSettings, steps: int) -> None: ...

    @staticmethod
    def first_rule(settings: SaeSettings) -> Rule | None:
        """The rule of the first step of a training with the final k; None: there is no budget, and the rule is
        inference's."""
        ...

    def rule(self, step: int, tokens: int, densities: Tensor, encoder: Encoder) -> Rule:
        """The rule of step `step` for a batch of `tokens`; densities ``[n_features]`` are those of the run so far."""
        ...

    def target(self) -> Tensor | None:
        """The density that inference must reproduce: a scalar (mean), ``[n_features]``, or None (no calibration)."""
        ...

    def facts(self) -> dict[str, Any]:
        """Facts about the allocation that the checkpoint records."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def state_bytes(self, n_features: int) -> int:
        """Most bytes that the tensors of `state_dict` take."""
        ...


class _Stateless(Allocation):
    """For methods whose rule depends on nothing but the settings, the step and the weights."""

    whole_columns, initial_threshold = False, None

    def __init__(self, settings: SaeSettings, steps: int) -> None:
        self.settings, self.steps = settings, steps

    def facts(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None

    def state_bytes(self, n_features: int) -> int:
        return 0


class TokenAllocation(_Stateless):
    """Token choice in every step. Inference does the same."""

    saelens, calibrated = "topk", False

    @staticmethod
    def first_rule(settings: SaeSettings) -> Rule:
        return TokenChoice(settings.k)

    def rule(self, step: int, tokens: int, densities: Tensor, encoder: Encoder) -> Rule:
        return TokenChoice(self.settings.k_at(step, self.steps))

    def target(self) -> None:
        return None


class GroupAllocation(_Stateless):
    """GroupMax in every step. Inference does the same."""

    saelens, calibrated = "groupmax", False

    @staticmethod
    def first_rule(settings: SaeSettings) -> Rule:
        return GroupMax(settings.k, settings.n_features)

    def rule(self, step: int, tokens: int, densities: Tensor, encoder: Encoder) -> Rule:
        return self.first_rule(self.settings)

    def target(self) -> None:
        return None


class MutualAllocation(_Stateless):
    """Mutual choice in every step. Inference uses one threshold that gives the same mean density, k / n_features."""

    saelens, calibrated = "batchtopk", True

    @staticmethod
    def first_rule(settings: SaeSettings) -> Rule:
        return MutualChoice(settings.k)

    def rule(self, step: int, tokens: int, densities: Tensor, encoder: Encoder) -> Rule:
        return MutualChoice(self.settings.k_at(step, self.steps))

    def target(self) -> Tensor:
        return torch.tensor(self.settings.k / self.settings.n_features, dtype=torch.float64)


class ThresholdAllocation(_Stateless):
    """Every entry above the encoder's threshold: 0 (ReLU), or a trained one (JumpReLU). Inference does the same."""

    saelens, calibrated, initial_threshold = "standard", False, 0.0

    @staticmethod
    def first_rule(settings: SaeSettings) -> None:
        return None

    def rule(self, step: int, tokens: int, densities: Tensor, encoder: Encoder) -> Rule:
        return Threshold(encoder.cut())

    def target(self) -> None:
        return None


class FeatureAllocation(Allocation):
    """Mutual choice for a share of the steps, in which densities are measured; then feature choice.

    That first phase, and capacities by the rank of a feature's density, are our reconstruction (capacity.py). Inference
    uses one threshold for each feature that gives it the density of its capacity.
    """

    saelens, calibrated, whole_columns, initial_threshold = "feature_choice", True, True, None

    def __init__(self, settings: SaeSettings, steps: int) -> None:
        self.settings, self.steps = settings, steps
        self.curve: tuple[float, float] | None = None
        """Exponent and shift of the capacities, set when feature choice begins."""
        self.densities: Tensor | None = None
        """Share of a batch's tokens that each feature may have, ``[n_features]`` float64."""
        self._by_rank = self._rank = self._carry = torch.empty(0)
        self._bands: Bands | None = None

    @staticmethod
    def first_rule(settings: SaeSettings) -> Rule:
        return MutualChoice(settings.k)

    def rule(self, step: int, tokens: int, densities: Tensor, encoder: Encoder) -> Rule:
        options, k = self.settings.allocation, self.settings.k_at(step, self.steps)
        if step < options.after * self.steps:
            return MutualChoice(k)
        if self.curve is None:
            self._begin(tokens, densities)
        if self.densities is None or step % options.refresh == 0:
            self._rank = ranks(densities)
            self._set_rank(tokens)
        real, bands = self._by_rank, self._bands
        if k != self.settings.k:
            real, bands = self._larger(k, tokens)
        capacities, self._carry = draw_capacities(real, self._carry)
        return FeatureChoice(capacities[self._rank], k * tokens, bands)

    def target(self) -> Tensor:
        return MutualAllocation(self.settings, self.steps).target() if self.densities is None else self.densities

    def facts(self) -> dict[str, Any]:
        return {"curve": self.curve}

    def state_dict(self) -> dict[str, Any]:
        if self.densities is None:
            return {}
        return {
            "curve": self.curve,
            "densities": self.densities,
            "by_rank": self._by_rank,
            "rank": self._rank,
            "carry": self._carry,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            self.curve, self.densities = tuple(state["curve"]), state["densities"]
            self._by_rank, self._rank, self._carry = state["by_rank"], state["rank"], state["carry"]
            self._bands = Bands(torch.argsort(self._rank), runs_of(self._by_rank))

    def state_bytes(self, n_features: int) -> int:
        return 3 * 8 * n_features + 8  # densities, by_rank and rank; the carry

    def _begin(self, tokens: int, densities: Tensor) -> None:
        options = self.settings.allocation
        if options.capacity == "uniform":
            self.curve = (0.0, 0.0)
        elif options.exponent is not None and options.shift is not None:
            self.curve = (options.exponent, options.shift)
        else:
            fit = fit_zipf(densities)
            self.curve = (fit.exponent, fit.shift)
        self._by_rank = self._capacities(self.settings.k, tokens).to(densities.device)
        self._carry = torch.zeros((), dtype=torch.float64, device=densities.device)

    def _capacities(self, k: int, tokens: int) -> Tensor:
        """Real capacities by rank of a budget of k per token, on the CPU."""
        assert self.curve is not None
        return zipf_capacities(self.settings.n_features, k * tokens, tokens, *self.curve)

    def _larger(self, k: int, tokens: int) -> tuple[Tensor, Bands]:
        """Capacities by rank, and bands, of a step with a larger k than the final one."""
        assert self._bands is not None
        by_rank = self._capacities(k, tokens)
        return by_rank.to(self._rank.device), Bands(self._bands.order, runs_of(by_rank))

    def _set_rank(self, tokens: int) -> None:
        self.densities = (self._by_rank / tokens)[self._rank]
        runs = runs_of(self._by_rank) if self._bands is None else self._bands.runs
        self._bands = Bands(torch.argsort(self._rank), runs)


ALLOCATIONS: dict[str, type[Allocation]] = {
    "token_choice": TokenAllocation,
    "mutual_choice": MutualAllocation,
    "feature_choice": FeatureAllocation,
    "group_max": GroupAllocation,
    "threshold": ThresholdAllocation,
}


def allocation_of(settings: SaeSettings) -> type[Allocation]:
    """The class that `settings` names."""
    return ALLOCATIONS[settings.allocation.name]
