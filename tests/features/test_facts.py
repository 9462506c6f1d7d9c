"""The facts on disk are the dense activations, as FORMAT.md says; damage is an error with a remedy."""

import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from saelab.errors import SaelabError
from saelab.features import layout, merge, shards
from saelab.features.facts import Facts, open_facts
from saelab.features.layout import DTYPES, FACTS, MOST_PLACES
from saelab.features.settings import FeatureSettings
from tests.features import made
from tests.features.made import blocks

CONTEXT = 8


def activations(n_rows: int, n_features: int, density: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Made-up activations ``[rows, context, n_features]`` over many sizes, and token ids, of which 0 is special.

    Feature 0 is never active, and the last one on every ordinary token.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 5, (n_rows, CONTEXT), generator=generator)
    rows[-1, -1] = 1  # at least one ordinary token
    shape = (n_rows, CONTEXT, n_features)
    z = torch.exp(12 * torch.randn(shape, generator=generator)) * (torch.rand(shape, generator=generator) < density)
    z[..., -1] = torch.rand(shape[:2], generator=generator) + 0.5
    z[..., 0] = 0
    return z * (rows != 0)[..., None], rows


def with_small_parts(monkeypatch: pytest.MonkeyPatch, bucket: int = 16) -> None:
    """Let shards and buckets be so small that even tiny texts have several."""
    monkeypatch.setattr(shards, "SHARD_PLACES", 5 * CONTEXT)
    monkeypatch.setattr(shards, "SHARD_ENTRIES", 40)
    monkeypatch.setattr(merge, "BUCKET", bucket)


def read_with_numpy(folder: Path) -> dict[str, np.ndarray]:
    """What FORMAT.md says, and no more."""
    manifest = json.loads((folder / "facts" / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("saelab features", 1)
    found = {}
    for name in manifest["files"]:
        found[name.removesuffix(".npy")] = np.load(folder / "facts" / name, mmap_mode="r")
    return found


def dense(found: dict[str, np.ndarray], order: str) -> np.ndarray:
    """``[places, n_features]`` from one of the two orders."""
    places, maxima = found["tokens"].size, found["by_feature.maxima"]
    z = np.zeros((places, len(maxima)), np.float32)
    offsets = found[f"{order}.offsets"]
    for i in range(len(offsets) - 1):
        entries = slice(offsets[i], offsets[i + 1])
        values = found[f"{order}.values"][entries].astype(np.float32)
        if order == "by_feature":
            z[found["by_feature.places"][entries], i] = values * maxima[i]
        else:
            z[i, found["by_token.features"][entries]] = values * maxima[found["by_token.features"][entries]]
    return z


def assert_facts_are(folder: Path, z: Tensor, rows: Tensor) -> None:
    found, expected = read_with_numpy(folder), z.flatten(0, 1).numpy()
    np.testing.assert_array_equal(found["tokens"], rows)
    np.testing.assert_array_equal(found["by_feature.maxima"], expected.max(0))
    assert {name: array.dtype.str for name, array in found.items()} == DTYPES
    by_feature, by_token = dense(found, "by_feature"), dense(found, "by_token")
    np.testing.assert_array_equal(by_feature, by_token)  # each other's transpose
    np.testing.assert_array_equal(by_feature > 0, expected > 0)  # every activation, and none is rounded to 0
    error = np.abs(by_feature - expected)
    assert (error <= np.maximum(2.0**-11 * expected * 1.001, 2.0**-24 * expected.max(0))).all()
    for order, index in (("by_feature", "places"), ("by_token", "features")):
        offsets, indices = found[f"{order}.offsets"], found[f"{order}.{index}"]
        assert offsets[0] == 0 and offsets[-1] == len(indices) == (expected > 0).sum()
        assert all((np.diff(indices[a:b]) > 0).all() for a, b in pairwise(offsets))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_rows=st.integers(1, 23),
    n_features=st.integers(2, 9),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    rows_per_forward=st.integers(1, 5),
    extra=st.sampled_from([0, 3, 1000]),
    seed=st.integers(0, 10**6),
)
def test_facts_are_the_dense_activations_and_both_orders_agree(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    n_rows: int,
    n_features: int,
    density: float,
    rows_per_forward: int,
    extra: int,
    seed: int,
) -> None:
    with_small_parts(monkeypatch)
    folder = tmp_path_factory.mktemp("facts")
    z, rows = activations(n_rows, n_features, density, seed)
    parts = made.facts(folder, z, rows, rows_per_forward, extra)
    assert_facts_are(folder, z, rows)
    # What statistics are computed from are the exact activations, each once and in order.
    expected = z.flatten(0, 1).T
    feature, place = expected.nonzero(as_tuple=True)
    assert torch.equal(torch.cat([part.features for part in parts]), feature)
    assert torch.equal(torch.cat([part.places for part in parts]).long(), place)
    assert torch.equal(torch.cat([part.values for part in parts]), expected[feature, place])
    for part in parts:  # a part is one feature's, or all entries of its features
        assert part.stop == part.first + 1 or len(part.values) <= merge.BUCKET


def test_where_shards_and_buckets_end_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    z, rows = activations(23, 9, 0.3)
    made.facts(tmp_path / "one", z, rows)
    with_small_parts(monkeypatch)
    made.facts(tmp_path / "many", z, rows)
    assert len(list((tmp_path / "one" / "unfinished").glob("*.safetensors"))) == 1
    assert len(list((tmp_path / "many" / "unfinished").glob("*.safetensors"))) > 4
    for path in (tmp_path / "one" / FACTS).iterdir():
        assert path.read_bytes() == (tmp_path / "many" / FACTS / path.name).read_bytes(), path.name


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Facts, Tensor]:
    folder = tmp_path_factory.mktemp("run") / "features"
    z, rows = activations(20, 7, 0.4)
    made.facts(folder, z, rows)
    return open_facts(folder), z


def test_the_code_in_the_specification_reads_a_feature(opened: tuple[Facts, Tensor]) -> None:
    facts, z = opened
    text = (Path(layout.__file__).parent / "FORMAT.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("7", "3").replace("8", "4").replace("RUN", str(facts.folder.parent)), names)
    places, values = facts.activations(3)
    np.testing.assert_array_equal(names["places"][names["entries"]], places)
    np.testing.assert_array_equal(names["activations"], values)
    assert len(values) == (z[..., 3] > 0).sum() > 0


def test_questions_are_answered_from_the_dense_activations(opened: tuple[Facts, Tensor]) -> None:
    facts, z = opened
    flat = z.flatten(0, 1).numpy()
    assert facts.n_features == 7 and facts.rows.shape == (20, CONTEXT)
    assert facts.n_tokens == (facts.rows != 0).sum()
    for feature in range(7):
        places, values = facts.activations(feature)
        np.testing.assert_array_equal(places, flat[:, feature].nonzero()[0])
        np.testing.assert_allclose(values, flat[places, feature], rtol=2**-11, atol=2**-24 * facts.maxima[feature])
    for row, position in ((0, 0), (3, 5), (19, 7)):
        features, values = facts.at(row, position)
        np.testing.assert_array_equal(features, z[row, position].nonzero().flatten())
        for feature, value in zip(features, values, strict=True):  # the same number as by feature
            places, of_feature = facts.activations(feature)
            assert value == of_feature[places == row * CONTEXT + position]
    facts.verify()


def test_examples_are_drawn_from_the_range_and_show_their_window(opened: tuple[Facts, Tensor]) -> None:
    facts, z = opened
    places, values = facts.activations(6)
    low, high = np.quantile(values, [0.2, 0.8])
    inside = {int(place) for place in places[(values >= low) & (values <= high)]}
    found = facts.examples(6, low, high, 10, window=5)
    assert len(found) == 10 and {each.row * CONTEXT + each.position for each in found} < inside
    assert [each.activation for each in found] == sorted((each.activation for each in found), reverse=True)
    for each in found:
        start = each.position - each.index
        assert len(each.token_ids) == len(each.activations) == 5 and 0 <= start <= CONTEXT - 5
        np.testing.assert_array_equal(each.token_ids, facts.rows[each.row, start : start + 5])
        np.testing.assert_allclose(each.activations, z[each.row, start : start + 5, 6], rtol=2**-10)
        assert each.activations[each.index] == each.activation

    def drawn(n: int, low: float = 0.0) -> set[tuple[int, int]]:
        return {(each.row, each.position) for each in facts.examples(6, low, np.inf, n)}

    assert drawn(10) == drawn(10) < drawn(20) < drawn(10**6) and len(drawn(10**6)) == len(places)
    assert {row for row, _ in drawn(20)} - set(range(10)) and {row for row, _ in drawn(20)} & set(range(10))
    assert facts.examples(0, 0, np.inf, 10) == [] == facts.examples(6, high, low, 10)


def test_what_is_not_there_is_named(opened: tuple[Facts, Tensor], tmp_path: Path) -> None:
    facts, _ = opened
    for feature in (-1, 7):
        with pytest.raises(SaelabError, match=f"no feature {feature} .* 0 to 6"):
            facts.activations(feature)
    for place in ((-1, 0), (20, 0), (0, -1), (0, CONTEXT)):
        with pytest.raises(SaelabError, match="rows are 0 to 19, of 8 tokens"):
            facts.at(*place)
    with pytest.raises(SaelabError, match=rf"has no facts .* `saelab index {tmp_path}` makes them"):
        open_facts(tmp_path / "features")


def everything(folder: Path) -> None:
    """Ask all that can be asked of a database."""
    facts = open_facts(folder)
    for feature in range(facts.n_features):
        facts.activations(feature)
        facts.examples(feature, 0, np.inf, 3)
    for row, position in np.ndindex(*facts.rows.shape):
        facts.at(row, position)
    facts.verify()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made.facts(tmp_path / "features", *activations(6, 5, 0.4))
    everything(tmp_path / "features")
    return tmp_path / "features"


@pytest.mark.parametrize("name", DTYPES)
def test_a_damaged_array_is_one_error_that_names_it(folder: Path, name: str) -> None:
    path = folder / FACTS / f"{name}.npy"
    whole = path.read_bytes()
    other = np.load(path)

    def contents() -> Any:
        yield b""
        yield whole[:40]
        yield whole[:-1]
        yield whole + b"\0"
        yield bytes(len(whole))
        yield whole[:128] + bytes([255]) * (len(whole) - 128)
        yield whole[:-1] + bytes([whole[-1] ^ 1])
        yield b"PK\x03\x04" + whole[4:]
        np.save(path, other.astype(">i4" if name != "by_feature.maxima" else ">f4"))
        yield path.read_bytes()
        np.save(path, other[None])
        yield path.read_bytes()

    for content in contents():
        path.write_bytes(content)
        with pytest.raises(SaelabError, match=rf"{name}\.npy .*`saelab index {folder.parent}` makes it again"):
            everything(folder)
    path.unlink()
    with pytest.raises(SaelabError, match=rf"{name}\.npy"):
        open_facts(folder)


def test_a_damaged_manifest_and_one_of_another_version_are_refused(folder: Path) -> None:
    path = folder / FACTS / "manifest.json"
    whole = json.loads(path.read_text())
    for content in ("", "[]", "{", "\x00"):
        path.write_text(content)
        with pytest.raises(SaelabError, match=r"manifest\.json"):
            open_facts(folder)
    for change, message in (
        ({"version": 2}, "written in version 2 of the format, and this saelab reads version 1"),
        ({"format": "other"}, "is not the manifest of a feature database"),
        ({"rows": "many"}, "is not a whole manifest"),
        ({"rows": 7}, r"tokens\.npy"),
        ({"entries": -1}, r"by_feature\.places\.npy"),
        ({"files": {}}, "is not a whole manifest"),
        ({"files": []}, "is not a whole manifest"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(SaelabError, match=message):
            open_facts(folder)
    for key in whole:
        path.write_text(json.dumps({name: value for name, value in whole.items() if name != key}))
        if key != "inputs":
            with pytest.raises(SaelabError, match=r"manifest\.json"):
                open_facts(folder)


def test_reading_loads_no_torch_and_no_tables(folder: Path) -> None:
    code = (
        f"import sys\nfrom saelab.features.facts import open_facts\nopen_facts({str(folder)!r}).examples(4, 0, 9, 3)\n"
        "print([name for name in ('torch', 'pandas', 'pyarrow', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_more_places_than_int32_counts_are_refused_with_the_setting(tmp_path: Path) -> None:
    from tests.tiny import language_model

    lm = language_model("gpt2")
    rows = torch.zeros(1, 1, dtype=torch.int32).expand(1 << 16, 1 << 15)
    with pytest.raises(SaelabError, match=r"features\.tokens: .*2,147,483,648 places.* at most 2,147,483,647"):
        made.index(None, lm, rows, "", tmp_path, FeatureSettings())  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    with pytest.raises(SaelabError, match="tokens: 2,147,483,648"):
        FeatureSettings(tokens=MOST_PLACES + 1)


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_a_stopped_pass_continues_after_its_last_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    with_small_parts(monkeypatch)
    z, rows = activations(23, 6, 0.3)
    rows[8:14] = 0  # forward passes without an ordinary token give no block
    z = z * (rows != 0)[..., None]
    identity = {"n_features": 6, "rows": 23, "context": CONTEXT, "rows_per_forward": 2, "inputs": "inputs"}
    writer = shards.ShardWriter(tmp_path / "features" / "unfinished", identity)
    for block in list(blocks(z, rows, 2))[:stop]:
        writer.add(block)
    continued = shards.ShardWriter(tmp_path / "features" / "unfinished", identity)
    assert continued.first_row % 2 == 0 and continued.first_row == writer.first_row + sum(
        shard.stop - shard.first for shard in continued._shards
    )
    made.facts(tmp_path / "features", z, rows)
    assert_facts_are(tmp_path / "features", z, rows)
    made.facts(tmp_path / "whole", z, rows)
    for path in (tmp_path / "whole" / FACTS).iterdir():
        assert path.read_bytes() == (tmp_path / "features" / FACTS / path.name).read_bytes(), path.name


def test_shards_of_something_else_are_dropped_and_damaged_ones_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_small_parts(monkeypatch)
    z, rows = activations(23, 6, 0.3)
    made.facts(tmp_path / "whole", z, rows)
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
