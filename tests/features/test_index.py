"""What is written equals the formulas of dense.py on dense activations, whatever the sizes of shards and buckets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from saelab.encoded import encoded
from saelab.errors import SaelabError
from saelab.features import coactivation, facts_writer, layout, merge, shards
from saelab.features.arrays import open_arrays
from saelab.features.database import open_database
from saelab.features.layout import EARLIER, FACTS, MOST_PLACES, QUANTILES
from saelab.features.quantiles import counted_quantiles, sorted_quantiles
from saelab.features.settings import FeatureSettings
from saelab.features.shards import Entries
from saelab.features.statistics import COLUMNS
from saelab.lm.model import LanguageModel
from saelab.sae.initial import initialise
from saelab.sae.model import SparseAutoencoder
from tests.features import dense, made
from tests.features.made import blocks
from tests.tiny import language_model, random_rows

SITE = "blocks.1.hook_resid_post"
SETTINGS = FeatureSettings(rows_per_forward=5)
WORDS = [b"<s>", b"a", b"\xe6", b" b", b"\n", b""]
LENGTH = 8


def activations(n_rows: int, n_features: int, density: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Made-up activations ``[rows, LENGTH, n_features]`` of many sizes, and token ids, of which 0 is special.

    Feature 0 is never active, the last one on every ordinary token, and the one before it constant.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, len(WORDS) - 1, (n_rows, LENGTH), generator=generator)
    rows[-1, -1] = 1  # at least one ordinary token
    shape = (n_rows, LENGTH, n_features)
    z = torch.exp(5 * torch.randn(shape, generator=generator)) * (torch.rand(shape, generator=generator) < density)
    z[::2] = z[::2].round()  # so that there are ties
    z[..., -1] = torch.rand(shape[:2], generator=generator) + 0.5
    z[..., -2] = 1000.1
    z[..., 0] = 0
    return z * (rows != 0)[..., None], rows


def assert_equals_dense(found: dict[str, np.ndarray], z: np.ndarray, tokens: np.ndarray, words: list[bytes]) -> None:
    """`found` are the facts and statistics of z ``[rows, context, n_features]``, of which 0 is the special token."""
    ordinary, flat = tokens != 0, z.reshape(-1, z.shape[2])
    expected = dense.facts_of(flat, tokens, ordinary, words)
    columns = dense.activity(flat, tokens, ordinary)
    expected |= {f"table.{name}": columns[name] for name in COLUMNS}
    for name, column in expected.items():
        if name.split(".")[-1] in ("mass", "mean_square", "skew", "kurtosis", "token_entropy", "top_token_shares"):
            np.testing.assert_allclose(found[name], column, rtol=1e-6, atol=1e-9, err_msg=name)
        else:
            np.testing.assert_array_equal(found[name], column, err_msg=name)
    assert {name.split(".")[-1]: found[name].dtype.str for name in ("table.mass", "tokens", "by_feature.values")} == {
        "mass": "<f8",
        "tokens": FACTS["tokens"][0],
        "values": FACTS["by_feature.values"][0],
    }


def with_small_parts(monkeypatch: pytest.MonkeyPatch, bucket: int = 16) -> None:
    """Let shards, buckets and files of pairs be so small that even tiny texts have several."""
    monkeypatch.setattr(shards, "SHARD_PLACES", 5 * LENGTH)
    monkeypatch.setattr(shards, "SHARD_ENTRIES", 40)
    monkeypatch.setattr(merge, "BUCKET", bucket)
    monkeypatch.setattr(facts_writer, "FEATURE_ENTRIES", 1)
    monkeypatch.setattr(facts_writer, "PAIRS", 7)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_rows=st.integers(1, 40),
    n_features=st.integers(3, 9),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    rows_per_forward=st.integers(1, 5),
    bucket=st.sampled_from([5, 16, 60]),
    seed=st.integers(0, 10**6),
)
def test_everything_equals_its_dense_formula(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    n_rows: int,
    n_features: int,
    density: float,
    rows_per_forward: int,
    bucket: int,
    seed: int,
) -> None:
    with_small_parts(monkeypatch, bucket)
    z, rows = activations(n_rows, n_features, density, seed)
    found = made.write(tmp_path_factory.mktemp("database"), z, rows, WORDS, rows_per_forward)
    assert_equals_dense(found, z.numpy(), rows.numpy(), WORDS)


def test_a_larger_text_in_whole_and_in_many_parts_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, tokens = dense.made_up(150, 16, 24, 60)
    z *= (tokens != 0)[..., None]
    words = [f"token {i}".encode() for i in range(60)]
    parts = torch.from_numpy(z), torch.from_numpy(tokens)
    whole = made.write(tmp_path / "whole", *parts, words)
    assert_equals_dense(whole, z, tokens, words)
    with_small_parts(monkeypatch, 100)
    many = made.write(tmp_path / "many", *parts, words)
    assert len(list((tmp_path / "whole" / "unfinished").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "many" / "unfinished").glob("*.safetensors"))) > 4
    assert whole.keys() == many.keys()
    for name, array in whole.items():
        assert array.tobytes() == many[name].tobytes(), name


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(2.0**-149, 2.0**127, width=32), min_size=1, max_size=80),
    repeat=st.integers(1, 3),
    at=st.integers(0, 80),
)
def test_quantiles_by_counting_equal_those_by_sorting(values: list[float], repeat: int, at: int) -> None:
    array = np.array(values * repeat, np.float32)

    def part(values: np.ndarray) -> Entries:
        return Entries(np.array([len(values)]), np.zeros(0, np.int32), values)

    counted = counted_quantiles(lambda: [part(array[:at]), part(array[at:])], len(array))
    expected = np.quantile(array, QUANTILES, method="inverted_cdf")[None]
    np.testing.assert_array_equal(counted, expected)
    np.testing.assert_array_equal(sorted_quantiles(part(array)), expected)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[SparseAutoencoder, Tensor, Path, dict[str, Any]]:
    torch.manual_seed(0)
    lm = language_model("llama")
    rows = random_rows(lm, 24)
    sae = SparseAutoencoder(32, 48, 3)
    initialise(sae, lm.activations(rows, [SITE])[SITE][lm.ordinary(rows)])
    with torch.no_grad():
        sae.b_enc[7] = -1e6  # a feature that is never active
    folder = tmp_path_factory.mktemp("features")
    return sae, rows, folder, made.index(sae, lm, rows, SITE, folder, SETTINGS)[1]


def test_a_database_of_a_model_has_the_activations_of_its_pass(
    whole: tuple[SparseAutoencoder, Tensor, Path, dict[str, Any]],
) -> None:
    sae, rows, folder, manifest = whole
    lm = language_model("llama")
    z = torch.zeros(rows.numel(), 48)
    for block in encoded(sae, lm, rows, SITE, SETTINGS.rows_per_forward):
        z[block.positions] = block.codes.to_dense()
    database = open_database(folder)
    database.verify()
    ordinary = lm.ordinary(rows).numpy()
    words = [database.vocabulary.bytes(token) for token in range(len(lm.unembedding))]
    expected = dense.facts_of(z.detach().numpy(), rows.numpy(), ordinary, words)
    for name, array in expected.items():
        np.testing.assert_allclose(database.arrays[name], array, rtol=1e-6, err_msg=name)
    columns = dense.activity(z.detach().numpy(), rows.numpy(), ordinary)
    for name in COLUMNS:
        np.testing.assert_allclose(database.table[name], columns[name], rtol=1e-6, err_msg=name)
    assert manifest["n_tokens"] == ordinary.sum() and manifest["never_active"] == (z.sum(0) == 0).sum() >= 1
    assert (database.site, database.model, manifest["d_in"], manifest["k"]) == (SITE, lm.name, 32, 3)
    assert database.arrays.manifest == json.loads((folder / "manifest.json").read_text())
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *database.arrays.manifest["files"]}


def test_a_database_of_a_model_has_the_columns_of_pairs_and_of_weights(
    whole: tuple[SparseAutoencoder, Tensor, Path, dict[str, Any]],
) -> None:
    sae, rows, folder, manifest = whole
    lm, database = language_model("llama"), open_database(folder)
    gain = lm.model.get_parameter("model.norm.weight")
    W_U = (lm.unembedding * gain).detach().numpy()
    expected = dense.weights(sae.W_enc.detach().numpy(), sae.W_dec.detach().numpy(), W_U)
    z = np.zeros((rows.numel(), 48), np.float32)
    for block in encoded(sae, lm, rows, SITE, SETTINGS.rows_per_forward):
        z[block.positions] = block.codes.to_dense().detach().numpy()
    columns = dense.activity(z, rows.numpy(), lm.ordinary(rows).numpy())
    expected |= {name: columns[name] for name in coactivation.COLUMNS}
    assert expected.keys() | set(COLUMNS) == layout.COLUMNS.keys()
    for name, column in expected.items():
        if name == "logit_histogram":
            assert np.abs(database.table[name] - column).sum() <= 1e-2 * column.sum()
        else:
            np.testing.assert_allclose(database.table[name], column, rtol=1e-3, atol=1e-5, err_msg=name)
    assert manifest["lens"] == "with the gain of the final norm (RMSNorm)"


def test_a_database_of_version_1_is_refused_with_a_sentence_and_replaced(
    whole: tuple[SparseAutoencoder, Tensor, Path, dict[str, Any]], tmp_path: Path
) -> None:
    sae, rows, folder, _ = whole
    for name in EARLIER:
        (tmp_path / "run" / "features" / name).mkdir(parents=True)
    with pytest.raises(SaelabError, match=r"made by an earlier saelab.* `saelab index \S+run` makes it again"):
        open_arrays(tmp_path / "run" / "features")
    made.index(sae, language_model("llama"), rows, SITE, tmp_path / "run" / "features", SETTINGS)
    names = {path.name for path in (tmp_path / "run" / "features").iterdir()}
    assert names == {path.name for path in folder.iterdir()}


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    lm, sae = language_model("gpt2"), SparseAutoencoder(32, 16, 2)
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(SaelabError, match=r"contains thesis\.txt, which is no part of a feature database"):
        made.index(sae, lm, random_rows(lm, 3), SITE, tmp_path, SETTINGS)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_no_activity_at_all_still_makes_a_whole_database(tmp_path: Path) -> None:
    lm = language_model("gpt2")
    sae = SparseAutoencoder(32, 16, 2)
    initialise(sae, torch.randn(100, 32))
    with torch.no_grad():
        sae.b_enc.fill_(-1e9)
    _, manifest = made.index(sae, lm, random_rows(lm, 3), SITE, tmp_path, SETTINGS)
    assert manifest["never_active"] == 16 and manifest["entries"] == manifest["pairs"] == 0
    database = open_database(tmp_path)
    assert database.feature(3).never_active and not len(database.at(0, 5).features)
    database.verify()


def test_more_places_than_int32_counts_are_refused_with_the_setting(tmp_path: Path) -> None:
    lm: LanguageModel = language_model("gpt2")
    rows = torch.zeros(1, 1, dtype=torch.int32).expand(1 << 16, 1 << 15)
    with pytest.raises(SaelabError, match=r"features\.tokens: .*2,147,483,648 places.* at most 2,147,483,647"):
        made.index(None, lm, rows, "", tmp_path, FeatureSettings())  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    with pytest.raises(SaelabError, match="tokens: 2,147,483,648"):
        FeatureSettings(tokens=MOST_PLACES + 1)


def test_an_infinite_activation_is_an_error_that_names_the_feature(tmp_path: Path) -> None:
    z, rows = activations(6, 5, 0.3)
    rows[2, 3] = 1
    z[2, 3, 1] = torch.inf
    with pytest.raises(SaelabError, match="feature 1 has an infinite activation on rows 0 to 5"):
        made.write(tmp_path, z, rows, WORDS)


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_stopped_pass_continues_after_its_last_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    with_small_parts(monkeypatch)
    z, rows = activations(23, 6, 0.3)
    rows[8:14] = 0  # forward passes without an ordinary token give no block
    z = z * (rows != 0)[..., None]
    identity = {"n_features": 6, "rows": 23, "context": LENGTH, "rows_per_forward": 2, "inputs": "inputs"}
    writer = shards.ShardWriter(tmp_path / "stopped" / "unfinished", identity)
    for block in list(blocks(z, rows, 2))[:stop]:
        writer.add(block)
    continued = shards.ShardWriter(tmp_path / "stopped" / "unfinished", identity)
    assert continued.first_row % 2 == 0 and continued.first_row == writer.first_row + sum(
        shard.stop - shard.first for shard in continued._shards
    )
    found = made.write(tmp_path / "stopped", z, rows, WORDS)
    assert_equals_dense(found, z.numpy(), rows.numpy(), WORDS)
    for name, array in made.write(tmp_path / "whole", z, rows, WORDS).items():
        assert array.tobytes() == found[name].tobytes(), name


def test_shards_of_something_else_are_dropped_and_damaged_ones_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_small_parts(monkeypatch)
    z, rows = activations(23, 6, 0.3)
    made.write(tmp_path / "whole", z, rows, WORDS)
    folder = tmp_path / "whole" / "unfinished"
    identity = json.loads((folder / "identity.json").read_text())
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) > 3 and len(shards.open_shards(folder, identity)) == len(names)
    (folder / names[2]).write_bytes((folder / names[2]).read_bytes()[:-1])
    assert len(shards.open_shards(folder, identity)) == 2
    (folder / names[1]).write_bytes((folder / names[0]).read_bytes())  # another shard under its name
    assert len(shards.open_shards(folder, identity)) == 1
    assert shards.open_shards(folder, identity | {"inputs": "other"}) == []
    assert [path.name for path in folder.iterdir()] == ["identity.json"]
