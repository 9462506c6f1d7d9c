"""The adapter for sae-bench: the same numbers as ours, dense, in sae-bench's layout."""

import json

import pytest
import torch

from saelab.errors import SaelabError
from saelab.sae.interop.sae_bench import SaeBenchAutoencoder
from saelab.sae.model import SparseAutoencoder
from saelab.sae.new import new_autoencoder
from saelab.sae.settings import AllocationSettings, EncoderSettings, SaeSettings, SparsitySettings

D, N, K = 6, 24, 4
FACTS = {"model_name": "gpt2", "hook_name": "blocks.11.hook_resid_post", "context_size": 32, "prepend_bos": True}
THRESHOLD = AllocationSettings("threshold")
SETTINGS = {
    "token_choice": SaeSettings(N, K),
    "mutual_choice": SaeSettings(N, K, allocation=AllocationSettings("mutual_choice")),
    "feature_choice": SaeSettings(N, K, allocation=AllocationSettings("feature_choice")),
    "group_max": SaeSettings(N, K, allocation=AllocationSettings("group_max")),
    "multi_topk": SaeSettings(N, K, multi_topk=True),
    "matryoshka": SaeSettings(N, K, prefixes=(6, 12)),
    "tied": SaeSettings(N, K, encoder=EncoderSettings("tied")),
    "aligned": SaeSettings(N, K, encoder=EncoderSettings("aligned")),
    "relu": SaeSettings(N, K, allocation=THRESHOLD, sparsity=SparsitySettings("l1")),
    "gated": SaeSettings(N, K, allocation=THRESHOLD, encoder=EncoderSettings("gated"), sparsity=SparsitySettings("l1")),
    "jumprelu": SaeSettings(
        N, K, allocation=THRESHOLD, encoder=EncoderSettings("jumprelu"), sparsity=SparsitySettings("l0")
    ),
}


def made(name: str) -> SparseAutoencoder:
    torch.manual_seed(1)
    sae = new_autoencoder(SETTINGS[name], torch.randn(200, D), seed=0)
    sae.metadata |= FACTS
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.b_enc.normal_()
        if sae.r_mag is not None and sae.b_mag is not None:
            sae.r_mag.normal_()
            sae.b_mag.normal_()
        if name in ("mutual_choice", "feature_choice"):  # as calibration sets them
            sae.threshold = torch.rand(1 if name == "mutual_choice" else N)
    return sae.requires_grad_(False)


@pytest.mark.parametrize("name", SETTINGS)
def test_it_computes_what_the_autoencoder_does(name: str) -> None:
    sae, x = made(name), torch.randn(5, 7, D)
    adapted = SaeBenchAutoencoder(sae)
    dense = adapted.encode(x)
    assert dense.shape == (5, 7, N) and bool((dense > 0).any())
    torch.testing.assert_close(dense.flatten(0, 1), sae.encode(x).to_dense())
    torch.testing.assert_close(adapted.decode(dense), sae(x))
    torch.testing.assert_close(adapted(x), sae(x))
    dense[..., 3] = 0  # as an ablation does
    torch.testing.assert_close(adapted.decode(dense), dense @ adapted.W_dec + adapted.b_dec)


def test_weights_are_in_the_layout_of_sae_bench() -> None:
    sae = made("mutual_choice")
    adapted = SaeBenchAutoencoder(sae)
    x = torch.randn(9, D)
    pre = (x - adapted.b_dec) @ adapted.W_enc + adapted.b_enc
    assert sae.threshold is not None
    torch.testing.assert_close(adapted.encode(x), pre * (pre > sae.threshold))
    cfg = adapted.cfg
    assert adapted.W_enc.shape == (cfg.d_in, cfg.d_sae) == (D, N) and adapted.W_dec.shape == (N, D)
    assert (cfg.model_name, cfg.hook_name, cfg.hook_layer) == ("gpt2", "blocks.11.hook_resid_post", 11)
    assert cfg.apply_b_dec_to_input and cfg.dtype == "float32" and cfg.architecture == "jumprelu"
    assert json.loads(json.dumps(cfg.to_dict()))["context_size"] == 32
    assert adapted.to(dtype=torch.float64) is adapted and adapted.dtype == torch.float64
    assert adapted.device == torch.device("cpu") and adapted(x.double()).dtype == torch.float64


def test_names_of_the_model_and_site_may_be_given_and_are_needed() -> None:
    sae = made("token_choice")
    cfg = SaeBenchAutoencoder(sae, "pythia-70m", "blocks.3.hook_mlp_out").cfg
    assert (cfg.model_name, cfg.hook_layer) == ("pythia-70m", 3)
    with pytest.raises(SaelabError, match="number of a layer, and hook_embed has none"):
        SaeBenchAutoencoder(sae, hook_name="hook_embed")
    sae.metadata.clear()
    with pytest.raises(SaelabError, match="give model_name and hook_name"):
        SaeBenchAutoencoder(sae)


def test_what_cannot_be_decoded_from_activations_is_refused() -> None:
    with pytest.raises(SaelabError, match="a transcoder writes elsewhere"):
        SaeBenchAutoencoder(SparseAutoencoder(D, N, K, dict(FACTS), d_out=D))
    normalised, skipping = made("token_choice"), made("token_choice")
    normalised.normalisation = "layer_norm"
    skipping.W_skip = torch.nn.Parameter(torch.zeros(D, D))
    for sae in (normalised, skipping):
        with pytest.raises(SaelabError, match="also needs x"):
            SaeBenchAutoencoder(sae)
