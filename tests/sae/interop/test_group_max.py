"""GroupMax in files: sparsify's, and ours, which SAELens does not have."""

import json
from pathlib import Path

import pytest
import torch

import saelab
from saelab.errors import SaelabError
from saelab.sae.checkpoint import save_sae
from saelab.sae.initial import initialise
from saelab.sae.interop.writing import WRITERS
from saelab.sae.model import SparseAutoencoder

D, F, K = 6, 24, 4


def made() -> SparseAutoencoder:
    torch.manual_seed(0)
    sae = SparseAutoencoder(D, F, K)
    sae.groups = True
    initialise(sae, torch.randn(50, D))
    return sae.requires_grad_(False)


@pytest.mark.parametrize("writer", ["ours", "sparsify"])
def test_it_is_written_and_read_with_its_groups(writer: str, tmp_path: Path) -> None:
    sae, x = made(), torch.randn(100, D)
    (save_sae if writer == "ours" else WRITERS[writer])(sae, tmp_path)
    loaded = saelab.load(tmp_path)
    assert loaded.groups and loaded.k == K and not torch.equal(loaded(x), made_topk()(x))
    torch.testing.assert_close(loaded.encode(x).to_dense(), sae.encode(x).to_dense())
    pre = sae.pre_activations(x).unflatten(1, (K, F // K))
    best = (pre == pre.amax(2, keepdim=True)) * pre.relu()
    torch.testing.assert_close(loaded.encode(x).to_dense(), best.flatten(1))


def made_topk() -> SparseAutoencoder:
    sae = made()
    sae.groups = False
    return sae


def test_peers_without_it_say_so_and_unequal_groups_are_refused(tmp_path: Path) -> None:
    for peer in ("saelens", "dictionary_learning"):
        with pytest.raises(SaelabError, match="has no GroupMax"):
            WRITERS[peer](made(), tmp_path / peer)
    save_sae(made(), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["architecture"] == "saelab_groupmax"
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"k": 5}))
    with pytest.raises(SaelabError, match="k is 5, and 24 features are not 5 equal groups"):
        saelab.load(tmp_path)
