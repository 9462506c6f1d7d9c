"""Settings of an evaluation."""

from dataclasses import dataclass

from saelab.errors import SettingError


@dataclass(frozen=True)
class EvalSettings:
    tokens: int = 300_000
    """Held-out tokens for FVU, L0, cosine and never-active features; at least 300 k for a figure to report."""
    ce_tokens: int = 65_536
    """The first of these tokens, for CE and KL: four runs of the model, which share the layers below the site."""
    rows_per_forward: int = 16
    """Rows in one forward pass."""

    def __post_init__(self) -> None:
        for name in ("tokens", "ce_tokens", "rows_per_forward"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}: {getattr(self, name)} is not a positive number")
