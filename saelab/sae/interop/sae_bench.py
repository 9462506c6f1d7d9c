"""An autoencoder as sae-bench 0.6 evaluates one: dense activations, the encoder as columns, and a `cfg`.

sae = SaeBenchAutoencoder(saelab.load("runs/quickstart"))
multiple_evals([("quickstart", sae)], ...)  # of sae_bench.evals.core.main
"""

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saelab.errors import SaelabError
from saelab.sae.fold import fold
from saelab.sae.interop.saelens import architecture_of, rule_of
from saelab.sae.model import SparseAutoencoder


@dataclass
class SaeBenchConfig:
    """The fields that sae-bench reads of an autoencoder; it adds others."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    dtype: str
    device: str
    architecture: str
    context_size: int | None
    dataset_path: str
    prepend_bos: bool
    apply_b_dec_to_input: bool
    training_tokens: int
    normalize_activations: str = "none"
    """sae-bench's normalisation before `encode`."""
    hook_head_index: None = None
    seqpos_slice: tuple[None] = (None,)
    dataset_trust_remote_code: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as they go into results."""
        return asdict(self)


class SaeBenchAutoencoder(nn.Module):
    """`sae` with the attributes of sae-bench's `BaseSAE`; its weights are those of `sae`, not copies.

    `model_name` and `hook_name`, TransformerLens' names of the model and the site, are by default those of the
    checkpoint. Raises SaelabError if one is missing, if the site has no number of a layer, and for what sae-bench
    cannot evaluate: a transcoder, a crosscoder, a skip connection, or a normalisation of each token.
    """

    def __init__(self, sae: SparseAutoencoder, model_name: str | None = None, hook_name: str | None = None) -> None:
        super().__init__()
        facts = sae.metadata
        model_name, hook_name = model_name or facts.get("model_name"), hook_name or facts.get("hook_name")
        if not model_name or not hook_name:
            raise SaelabError(
                "sae-bench: the checkpoint does not say its model and site; give model_name and hook_name"
            )
        layer = re.search(r"\d+", hook_name)
        if layer is None:
            raise SaelabError(f"sae-bench: needs the number of a layer, and {hook_name} has none")
        if len(sae.site_widths) > 1:
            raise SaelabError("sae-bench: reads one site, and a crosscoder reads several")
        if sae.transcodes:
            raise SaelabError("sae-bench: puts the reconstruction where x was read, and a transcoder writes elsewhere")
        if not sae.affine:
            raise SaelabError(
                "sae-bench: decodes from activations only, and this autoencoder also needs x (a skip connection or "
                "normalised tokens)"
            )
        self.sae = fold(sae, 1.0) if sae.log_threshold is not None or sae.r_mag is not None or sae.power else sae
        self.cfg = SaeBenchConfig(
            model_name=model_name,
            d_in=sae.d_in,
            d_sae=sae.n_features,
            hook_layer=int(layer[0]),
            hook_name=hook_name,
            dtype=str(sae.W_dec.dtype).removeprefix("torch."),
            device=str(sae.W_dec.device),
            architecture=architecture_of(rule_of(self.sae), transcodes=False, skip=False),
            context_size=facts.get("context_size"),
            dataset_path=facts.get("dataset_path") or "",
            prepend_bos=bool(facts.get("prepend_bos", True)),
            apply_b_dec_to_input=sae.centred,
            training_tokens=facts.get("saelab", {}).get("tokens") or -1,
        )

    @property
    def W_enc(self) -> Tensor:
        """``[d_in, d_sae]``"""
        return self.sae.W_enc.T

    @property
    def W_dec(self) -> Tensor:
        """``[d_sae, d_in]``"""
        return self.sae.W_dec

    @property
    def b_enc(self) -> Tensor:
        return self.sae.b_enc

    @property
    def b_dec(self) -> Tensor:
        return self.sae.b_dec

    @property
    def dtype(self) -> torch.dtype:
        return self.sae.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.sae.W_dec.device

    def encode(self, x: Tensor) -> Tensor:
        """Dense activations ``[..., d_sae]`` of x ``[..., d_in]``."""
        return self.sae.encode(x).to_dense().view(*x.shape[:-1], -1)

    def decode(self, activations: Tensor) -> Tensor:
        """The reconstruction ``[..., d_in]`` of activations ``[..., d_sae]``, which the caller may have changed."""
        return activations.to(self.dtype) @ self.sae.W_dec + self.sae.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x ``[..., d_in]``."""
        return self.decode(self.encode(x))
