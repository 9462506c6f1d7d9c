"""Settings of the feature database: how much text it is made from."""

from dataclasses import dataclass

from saelab.errors import SettingError, check_positive
from saelab.features.layout import MOST_PLACES


@dataclass(frozen=True)
class FeatureSettings:
    tokens: int = 300_000
    """Held-out tokens that the database is made from."""
    rows_per_forward: int = 16
    """Rows in one forward pass. `saelab run` shares the pass with evaluation if this is `eval.rows_per_forward`."""

    def __post_init__(self) -> None:
        check_positive(self, "tokens", "rows_per_forward")
        if self.tokens > MOST_PLACES:
            raise SettingError(
                f"tokens: {self.tokens:,} are more than a database can have; set {MOST_PLACES:,} or less"
            )
