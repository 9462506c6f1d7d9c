"""The check of analyses that take a reconstruction apart into rows of the decoder."""

from saelab.errors import SaelabError
from saelab.sae.model import SparseAutoencoder


def check_affine(sae: SparseAutoencoder, what: str) -> None:
    """Raises SaelabError, which begins with `what`, unless every reconstruction is codes W_dec + b_dec."""
    if not sae.affine:
        because = "adds W_skip x to it" if sae.normalisation is None else f"scales each token ({sae.normalisation})"
        raise SaelabError(
            f"{what}: the reconstruction of this autoencoder is not a sum of its features' rows: it {because}; use an "
            "autoencoder without that"
        )
