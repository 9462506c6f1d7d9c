"""How often features are active in training: densities, dead features, targets of auxiliary losses.

The numbers stay on the device and no step waits for them; the host reads the densities only to fit a curve.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from saelab.sae.allocation.capacity import expected_densities, fit_zipf, ranks
from saelab.sae.losses import under_used
from saelab.sae.settings import SaeSettings

AVERAGED_STEPS = 500
"""Densities are means over all steps so far, or over about this many once there are more."""
REFRESH = 100
"""Steps between two rankings of the features for aux_zipf, and before the first."""


class Usage:
    """How often each feature is active, over the steps so far."""

    def __init__(self, settings: SaeSettings, dead_after: int, device: torch.device) -> None:
        self.settings, self.dead_after = settings, dead_after
        self.densities = torch.zeros(settings.n_features, dtype=torch.float64, device=device)
        self.silent_for = torch.zeros(settings.n_features, dtype=torch.long, device=device)
        """Tokens since each feature was last active."""
        self.steps = 0
        self._expected: Tensor | None = None

    def observe(self, counts: Tensor, tokens: int) -> None:
        """Add a batch of `tokens`, on `counts` ``[n_features]`` of which each feature was active."""
        self.steps += 1
        self.densities.lerp_(counts.double() / tokens, 1 / min(self.steps, AVERAGED_STEPS))
        self.silent_for.add_(tokens).masked_fill_(counts > 0, 0)

    def dead(self) -> Tensor:
        """Features not active for `dead_after` tokens, bool ``[n_features]``."""
        return self.silent_for >= self.dead_after

    def targets(self, tokens: int) -> Tensor | None:
        """The features that the auxiliary loss targets, bool ``[n_features]``; None if there is no such loss."""
        return _TARGETS[self.settings.aux.name](self, tokens)

    def under_used_or_dead(self, tokens: int) -> Tensor:
        """The targets of aux_zipf. Until there are densities to rank, the dead features, as in aux_k."""
        if self.steps < REFRESH:
            return self.dead()
        aux, n_features, k = self.settings.aux, self.settings.n_features, self.settings.k
        if self._expected is None or self.steps % REFRESH == 0:
            exponent, shift = aux.exponent, aux.shift
            if exponent is None or shift is None:
                fit = fit_zipf(self.densities)
                exponent, shift = fit.exponent, fit.shift
            curve = expected_densities(n_features, k, tokens, exponent, shift)
            self._expected = curve.to(self.densities.device)[ranks(self.densities)]
        return under_used(self.densities, self._expected, aux.share, k / n_features) | self.dead()

    def state_dict(self) -> dict[str, Any]:
        return {
            "densities": self.densities,
            "silent_for": self.silent_for,
            "steps": self.steps,
            "expected": self._expected,
        }

    def state_bytes(self) -> int:
        """Most bytes that the tensors of `state_dict` take: `expected` exists only after a ranking."""
        ranks_features = _TARGETS[self.settings.aux.name] is Usage.under_used_or_dead
        return self.densities.nbytes + self.silent_for.nbytes + (self.densities.nbytes if ranks_features else 0)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.densities, self.silent_for = state["densities"], state["silent_for"]
        self.steps, self._expected = state["steps"], state["expected"]


_TARGETS: dict[str, Callable[[Usage, int], Tensor | None]] = {
    "none": lambda usage, tokens: None,
    "aux_k": lambda usage, tokens: usage.dead(),
    "aux_zipf": Usage.under_used_or_dead,
}
