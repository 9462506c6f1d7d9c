"""Qwen Scope: TopK autoencoders, a file of torch.save for each layer, such as ``layer12.sae.pt``.

The files do not have k: only the name of their repository has it, such as ``SAE-Res-Qwen3-1.7B-Base-W32K-L0_50``, so a
folder above the file must keep that name. b_dec is not subtracted from x.
"""

import re

from saelab.errors import SaelabError
from saelab.sae.interop.stored import Config, Stored
from saelab.sae.interop.weights import From, built
from saelab.sae.model import SparseAutoencoder

NAME = "Qwen Scope"
MARKS = ({"W_enc", "W_dec", "b_enc", "b_dec"},)
LACKS = frozenset({"threshold", "k"})
"""Tensors that files of dictionary_learning with the same names have."""
SUFFIX = ".pt"


def read(stored: Stored) -> SparseAutoencoder:
    """The autoencoder in `stored`. Raises SaelabError if no folder's name says k, or if the file is damaged."""
    place = stored.path.absolute().parts[:-1]
    named = [match for part in place if (match := re.search(r"SAE-Res-(.+)-W(\d+)K-L0_(\d+)$", part))]
    if not named:
        raise SaelabError(
            f"{stored.path}: has W_enc, W_dec, b_enc and b_dec, as Qwen Scope's files, but no folder above it says k; "
            "give it the name of their repository, such as SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
        )
    model, thousands, k = named[-1][1], int(named[-1][2]), int(named[-1][3])
    names = {
        "W_enc": From("W_enc"),
        "W_dec": From("W_dec", turned=True),
        "b_enc": From("b_enc"),
        "b_dec": From("b_dec"),
    }
    folder = Config(stored.path.parent, {})
    sae = built(stored, names, folder, {"n_features": thousands * 1024})
    if not 1 <= k <= sae.n_features:
        raise SaelabError(f"{stored.path}: k is {k}, not between 1 and {sae.n_features}")
    sae.k, sae.centred = k, False
    layer = re.match(r"layer(\d+)\.", stored.path.name)
    sae.metadata = {"model_name": f"Qwen/{model}"}
    sae.metadata |= {"hook_name": f"blocks.{layer[1]}.hook_resid_post"} if layer else {}
    return sae
