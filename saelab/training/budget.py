"""What changes while an autoencoder is trained: how often features fire, who is dead or under-used, who gets how much.

All of it stays on the device, and nothing in a step waits for it; only where feature choice begins, or a curve is
fitted, does the host read the densities.
"""

import torch
from torch import Tensor

from saelab.sae.allocation.capacity import draw_capacities, expected_densities, fit_zipf, ranks, zipf_capacities
from saelab.sae.allocation.rules import FeatureChoice, MutualChoice, Rule, TokenChoice
from saelab.sae.losses import under_used
from saelab.sae.settings import SaeSettings

MEMORY = 500
"""Densities are means over all steps so far, and over about this many once there are more."""


class Usage:
    """How often each feature fires, and which ones an auxiliary loss is for."""

    def __init__(self, n_features: int, settings: SaeSettings, dead_after: int, device: torch.device) -> None:
        self.settings, self.dead_after = settings, dead_after
        self.densities = torch.zeros(n_features, dtype=torch.float64, device=device)
        self.silent_for = torch.zeros(n_features, dtype=torch.long, device=device)
        """Tokens since each feature was last active."""
        self.steps = 0
        self._expected: Tensor | None = None

    def observe(self, counts: Tensor, tokens: int) -> None:
        """Take in how often each feature was active ``[n_features]`` in a batch of `tokens`."""
        self.steps += 1
        self.densities.lerp_(counts.double() / tokens, 1 / min(self.steps, MEMORY))
        self.silent_for.add_(tokens).masked_fill_(counts > 0, 0)

    def dead(self) -> Tensor:
        """Features not active for `dead_after` tokens, bool ``[n_features]``."""
        return self.silent_for >= self.dead_after

    def wanted(self, tokens: int, refresh: int = 100) -> Tensor | None:
        """The features that the auxiliary loss is for, bool ``[n_features]``; None where there is no such loss.

        aux_zipf begins after `refresh` steps, when there are densities to rank; until then it is aux_k.
        """
        aux, n_features = self.settings.aux, len(self.densities)
        if aux.name == "none":
            return None
        if aux.name == "aux_k" or self.steps < refresh:
            return self.dead()
        if self._expected is None or self.steps % refresh == 0:
            exponent, shift = aux.exponent, aux.shift
            if exponent is None or shift is None:
                fit = fit_zipf(self.densities)
                exponent, shift = fit.exponent, fit.shift
            curve = expected_densities(n_features, self.settings.k, tokens, exponent, shift)
            self._expected = curve.to(self.densities.device)[ranks(self.densities)]
        uniform = self.settings.k / n_features
        return under_used(self.densities, self._expected, aux.share, uniform) | self.dead()


class Budget:
    """The allocation of each step."""

    def __init__(self, settings: SaeSettings, usage: Usage, steps: int) -> None:
        self.settings, self.usage, self.steps = settings, usage, steps
        self.densities: Tensor | None = None
        """Of a batch, the share of tokens that each feature may have, by feature ``[n_features]``: feature choice's."""
        self.curve: tuple[float, float] | None = None
        """Exponent and shift of its capacities, once they are known."""
        self._by_rank = self._rank = self._credit = torch.empty(0)
        self._runs: list[tuple[int, int, int]] = []
        self._ladder: tuple[Tensor, list[tuple[int, int, int]]] | None = None

    def rule(self, step: int, tokens: int) -> Rule:
        """The allocation of step `step`, whose batch has `tokens`."""
        allocation = self.settings.allocation
        if allocation.name == "token_choice":
            return TokenChoice(self.settings.k)
        if allocation.name == "mutual_choice" or step < allocation.after * self.steps:
            return MutualChoice(self.settings.k)
        if self.curve is None:
            self._begin(tokens)
        if self.densities is None or step % allocation.refresh == 0:
            self._rank_features(tokens)
        capacities, self._credit = draw_capacities(self._by_rank, self._credit)
        return FeatureChoice(capacities[self._rank], self.settings.k * tokens, self._ladder)

    def target(self) -> Tensor | None:
        """The densities that inference has to reproduce: see `Trained.densities`."""
        if self.settings.allocation.name == "token_choice":
            return None
        if self.densities is None:
            n_features = len(self.usage.densities)
            return torch.tensor(self.settings.k / n_features, dtype=torch.float64)
        return self.densities

    def _begin(self, tokens: int) -> None:
        allocation = self.settings.allocation
        if allocation.capacity == "uniform":
            self.curve = (0.0, 0.0)
        elif allocation.exponent is not None and allocation.shift is not None:
            self.curve = (allocation.exponent, allocation.shift)
        else:
            fit = fit_zipf(self.usage.densities)
            self.curve = (fit.exponent, fit.shift)
        device, n_features = self.usage.densities.device, len(self.usage.densities)
        by_rank = zipf_capacities(n_features, self.settings.k * tokens, tokens, *self.curve)
        self._by_rank, self._credit = by_rank.to(device), torch.zeros((), dtype=torch.float64, device=device)
        self._runs = _runs(by_rank)

    def _rank_features(self, tokens: int) -> None:
        self._rank = ranks(self.usage.densities)
        self.densities = (self._by_rank / tokens)[self._rank]
        self._ladder = (torch.argsort(self._rank), self._runs)


def _runs(by_rank: Tensor) -> list[tuple[int, int, int]]:
    """Runs of ranks (start, stop, largest capacity) within which no capacity is more than twice another."""
    largest = by_rank.ceil().long().tolist()
    runs, start = [], 0
    for i in range(1, len(largest) + 1):
        if i == len(largest) or largest[i] < max(1, largest[start] // 2):
            runs.append((start, i, largest[start]))
            start = i
    return runs
