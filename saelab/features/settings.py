"""Settings of the feature database: how much text it is made from, and how much of it is kept."""

from dataclasses import dataclass

from saelab.errors import SettingError
from saelab.features.layout import MOST_PLACES


@dataclass(frozen=True)
class FeatureSettings:
    tokens: int = 300_000
    """Held-out tokens that the database is made from."""
    contexts: int = 20
    """Strongest contexts kept per feature, at most one per row of text."""
    window: int = 32
    """Tokens shown of each context."""
    rows_per_forward: int = 16
    """Rows in one forward pass. `saelab run` shares the pass with evaluation if this is `eval.rows_per_forward`."""

    def __post_init__(self) -> None:
        for name in ("tokens", "contexts", "window", "rows_per_forward"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}: {getattr(self, name)} is not a positive number")
        if self.tokens > MOST_PLACES:
            raise SettingError(
                f"tokens: {self.tokens:,} are more than a database can have; set {MOST_PLACES:,} or less"
            )
