"""The feature database equals a brute-force pass over dense activations."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from saelab.errors import SaelabError
from saelab.features import merge, shards
from saelab.features.activity import Activity
from saelab.features.contexts import strongest_entries
from saelab.features.settings import FeatureSettings
from saelab.features.statistics import BINS
from saelab.lm.model import LanguageModel
from saelab.lm.sites import resolve_sites
from saelab.sae.model import SparseAutoencoder
from tests.features.made import index
from tests.tiny import CONTEXT, language_model, random_rows

SITE = "blocks.1.hook_resid_post"
SETTINGS = FeatureSettings(contexts=4, window=8, rows_per_forward=5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[SparseAutoencoder, torch.Tensor, Path, dict]:
    torch.manual_seed(0)
    lm = language_model("llama")
    rows = random_rows(lm, 24)
    sae = SparseAutoencoder(32, 48, 3)
    sae.initialise(lm.activations(rows, [SITE])[SITE][lm.ordinary(rows)])
    with torch.no_grad():
        sae.b_enc[7] = -1e6  # a feature that is never active
    folder = tmp_path_factory.mktemp("features")
    return sae, rows, folder, index(sae, lm, rows, SITE, folder, SETTINGS)[1]


def dense(sae: SparseAutoencoder, rows: torch.Tensor) -> np.ndarray:
    """Activations ``[rows, context, n_features]``, zero at special positions."""
    lm = language_model("llama")
    z = torch.zeros(*rows.shape, sae.n_features)
    keep = lm.ordinary(rows)
    z[keep] = sae.encode(lm.activations(rows, [SITE])[SITE][keep]).to_dense()
    return z.numpy()


def test_statistics_are_those_of_the_dense_activations(made: tuple) -> None:
    sae, rows, folder, summary = made
    z = dense(sae, rows)
    n = int(language_model("llama").ordinary(rows).sum())
    table = pq.read_table(folder / "features.parquet").to_pandas()
    assert summary["n_tokens"] == n and summary["n_features"] == len(table) == 48
    active = (z > 0).sum((0, 1))
    np.testing.assert_array_equal(table.n_active, active)
    np.testing.assert_allclose(table.density, active / n)
    np.testing.assert_allclose(table.max_activation, z.max((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(table.mean_activation, z.sum((0, 1)) / np.maximum(active, 1), rtol=1e-4)
    assert summary["never_active"] == (active == 0).sum() >= 1 and active[7] == 0
    histogram = np.stack(table.histogram)
    assert histogram.shape == (48, BINS)
    np.testing.assert_array_equal(histogram.sum(1), active)  # conserved
    for f in range(48):
        expected = np.histogram(z[..., f][z[..., f] > 0], bins=BINS, range=(0, max(z[..., f].max(), 1e-9)))[0]
        assert np.abs(histogram[f] - expected).sum() <= 2  # a value on an edge may round into the next bin


def test_contexts_are_the_strongest_activations_one_per_row(made: tuple) -> None:
    sae, rows, folder, _ = made
    z = dense(sae, rows)
    tokenizer = language_model("llama").tokenizer
    table = pq.read_table(folder / "contexts.parquet").to_pandas()
    assert table[["feature", "rank"]].equals(table[["feature", "rank"]].sort_values(["feature", "rank"]))
    assert not (table.feature == 7).any()
    for f in range(48):
        best = np.sort(z[..., f].max(1))[::-1][:4]
        mine = table[table.feature == f]
        np.testing.assert_allclose(mine.activation, best[best > 0], rtol=1e-5)
        assert mine.row.is_unique
    for line in table.itertuples():
        start = line.position - line.peak
        assert 0 <= start <= CONTEXT - 8 and len(line.tokens) == len(line.activations) == 8
        np.testing.assert_allclose(line.activations, z[line.row, start : start + 8, line.feature], rtol=1e-5)
        assert (
            line.activations[line.peak]
            == line.activation
            == pytest.approx(z[line.row, line.position, line.feature], rel=1e-5)
        )
        assert list(line.tokens) == [tokenizer.decode([i]) for i in rows[line.row, start : start + 8]]


def test_tables_do_not_depend_on_where_shards_and_buckets_end(
    made: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, rows, folder, summary = made
    monkeypatch.setattr(shards, "SHARD_PLACES", 5 * CONTEXT)
    monkeypatch.setattr(merge, "BUCKET", 7)  # nearly every feature comes in several parts
    assert index(sae, language_model("llama"), rows, SITE, tmp_path / "features", SETTINGS)[1] == summary
    for name in ("features.parquet", "contexts.parquet"):
        assert pq.read_table(tmp_path / "features" / name).equals(pq.read_table(folder / name))


def test_logits_and_neighbours_are_their_matrix_products(made: tuple) -> None:
    sae, _, folder, _ = made
    lm = language_model("llama")
    table = pq.read_table(folder / "features.parquet").to_pandas()
    logits = (sae.W_dec @ lm.unembedding.T).detach()
    cosines = (sae.W_dec @ sae.W_dec.T).detach().fill_diagonal_(-2)
    for f in range(48):
        top, bottom = logits[f].topk(10), logits[f].topk(10, largest=False)
        np.testing.assert_allclose(table.top_logits[f], top.values, rtol=1e-4)
        np.testing.assert_allclose(table.bottom_logits[f], bottom.values, rtol=1e-4)
        assert list(table.top_logit_tokens[f]) == [lm.tokenizer.decode([i]) for i in top.indices]
        near = cosines[f].topk(10)
        assert list(table.neighbours[f]) == near.indices.tolist()
        np.testing.assert_allclose(table.neighbour_cosines[f], near.values, rtol=1e-4, atol=1e-6)


def test_a_site_that_does_not_write_the_residual_stream_has_no_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lm = language_model("gpt2")
    rows = random_rows(lm, 6)
    sae = SparseAutoencoder(32, 16, 2)
    sae.initialise(torch.randn(100, 32))
    index(sae, lm, rows, "blocks.1.attn.hook_z", tmp_path, SETTINGS)  # as wide as the residual stream
    table = pq.read_table(tmp_path / "features.parquet").to_pandas()
    assert all(len(tokens) == 0 for tokens in table.top_logit_tokens)


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    lm, sae = language_model("gpt2"), SparseAutoencoder(32, 16, 2)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(SaelabError, match=r"holds thesis\.txt, which is no part of a feature database"):
        index(sae, lm, random_rows(lm, 3), SITE, tmp_path, SETTINGS)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_no_activity_at_all_still_makes_whole_tables(tmp_path: Path) -> None:
    lm = language_model("gpt2")
    sae = SparseAutoencoder(32, 16, 2)
    sae.initialise(torch.randn(100, 32))
    with torch.no_grad():
        sae.b_enc.fill_(-1e9)
    _, summary = index(sae, lm, random_rows(lm, 3), SITE, tmp_path, SETTINGS)
    assert summary["never_active"] == 16
    assert pq.read_table(tmp_path / "contexts.parquet").num_rows == 0


def test_ties_go_to_the_earlier_position_and_order_is_kept() -> None:
    places = torch.tensor([2, 3, 5, 4], dtype=torch.int32)
    activity = Activity(torch.tensor([1.0, 0.5, 1.0, 3.0]), places, torch.tensor([0, 3, 4]), first=7)
    assert activity.features.tolist() == [7, 7, 7, 8] and activity.stop == 9
    entries, ranks = strongest_entries(activity, context=4, per_feature=5)
    assert entries.tolist() == [0, 2, 3] and ranks.tolist() == [0, 1, 0]
    one_row, _ = strongest_entries(activity, context=8, per_feature=5)
    assert one_row.tolist() == [0, 3]


def test_an_output_that_is_normalised_before_it_is_added_has_no_logits(tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    tokenizer = language_model("llama").tokenizer
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, intermediate_size=64, **heads
    )
    model = Gemma3ForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    lm = LanguageModel("gemma3", model, tokenizer, resolve_sites(tmp_path / "model"), "")
    sae = SparseAutoencoder(32, 16, 2)
    sae.initialise(torch.randn(100, 32))
    lengths = {}
    for site in ("mlp.hook_out", "hook_mlp_out", "attn.hook_out", "hook_attn_out", "hook_resid_mid"):
        index(sae, lm, random_rows(lm, 6), f"blocks.1.{site}", tmp_path / site, SETTINGS)
        table = pq.read_table(tmp_path / site / "features.parquet").to_pandas()
        lengths[site] = set(map(len, table.top_logit_tokens))
    assert lengths == {
        "mlp.hook_out": {0},
        "hook_mlp_out": {10},
        "attn.hook_out": {0},
        "hook_attn_out": {10},
        "hook_resid_mid": {10},
    }
