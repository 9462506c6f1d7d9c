"""Checks of analyses: of those that take a reconstruction apart into decoder rows, or compare it with the input."""

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


def check_reconstructs(sae: SparseAutoencoder, what: str) -> None:
    """Raises SaelabError, which begins with `what`, unless `sae` reconstructs its input, at one site."""
    if len(sae.site_widths) > 1:
        raise SaelabError(f"{what}: takes an autoencoder of one site, and this crosscoder has {len(sae.site_widths)}")
    if sae.transcodes:
        raise SaelabError(
            f"{what}: compares an input with its reconstruction, and a transcoder reconstructs another "
            "site; use an autoencoder of one site"
        )
