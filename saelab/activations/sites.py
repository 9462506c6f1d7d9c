"""The sites of an autoencoder: where its input is read, and what its reconstruction stands for. Sites of a second model
end in ``@second``."""

from typing import NamedTuple


class Sites(NamedTuple):
    """The sites of an autoencoder, of a transcoder, or of a crosscoder."""

    input: str
    target: str | None = None
    """The site that a transcoder reconstructs; None: the input itself."""
    more: tuple[str, ...] = ()
    """Further sites that a crosscoder reads, and reconstructs."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The sites whose activations, side by side, are the input."""
        return (self.input, *self.more)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The sites that the reconstruction stands for."""
        return self.inputs if self.target is None else (self.target,)

    @property
    def all(self) -> tuple[str, ...]:
        """Every site that is read, each once."""
        return self.inputs if self.target is None else (*self.inputs, self.target)

    def __str__(self) -> str:
        read = " + ".join(self.inputs)
        return read if self.target is None else f"{read} -> {self.target}"


def as_sites(site: str | Sites) -> Sites:
    """The sites of an autoencoder at one site, or of one whose `Sites` are given."""
    return Sites(site) if isinstance(site, str) else site
