"""The sites of an autoencoder: where its input is read, and what its reconstruction stands for."""

from typing import NamedTuple


class Sites(NamedTuple):
    """The sites of an autoencoder, or of a transcoder."""

    input: str
    target: str | None = None
    """The site that a transcoder reconstructs; None: the input itself."""

    @property
    def all(self) -> tuple[str, ...]:
        """Every site that is read, each once."""
        return (self.input,) if self.target is None else (self.input, self.target)

    @property
    def output(self) -> str:
        """The site that the reconstruction stands for."""
        return self.target or self.input

    def __str__(self) -> str:
        return self.input if self.target is None else f"{self.input} -> {self.target}"


def as_sites(site: str | Sites) -> Sites:
    """The sites of an autoencoder at one site, or of one whose `Sites` are given."""
    return Sites(site) if isinstance(site, str) else site
