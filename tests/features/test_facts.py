"""What a database of made-up activations answers equals those activations; damage is an error with a remedy."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saelab.errors import SaelabError
from saelab.features import layout
from saelab.features.database import Database, open_database
from saelab.features.layout import COLUMNS, FACTS
from tests.features.dense import made_up, write_database

CONTEXT, N_FEATURES = 8, 9


@pytest.fixture(scope="module")
def z() -> np.ndarray:
    """``[rows, context, n_features]``; feature 7 is never active."""
    activations, tokens = made_up(20, CONTEXT, N_FEATURES, 30)
    return activations * (tokens != 0)[..., None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, z: np.ndarray) -> Path:
    tokens = made_up(20, CONTEXT, N_FEATURES, 30)[1]
    words = [f"w{token}".encode() for token in range(30)]
    return write_database(tmp_path_factory.mktemp("run") / "features", z, tokens, words)


@pytest.fixture(scope="module")
def database(folder: Path) -> Database:
    return open_database(folder)


def test_the_code_in_the_specification_reads_a_feature(database: Database, z: np.ndarray) -> None:
    text = (Path(layout.__file__).parent / "FORMAT.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("7", "3").replace("8", "4").replace("RUN", str(database.folder.parent)), names)
    places, values = database.facts.activations(3)
    np.testing.assert_array_equal(names["places"][names["entries"]], places)
    np.testing.assert_array_equal(names["activations"], values)
    assert len(values) == (z[..., 3] > 0).sum() > 0


def test_the_facts_are_the_dense_activations_in_each_order(database: Database, z: np.ndarray) -> None:
    facts, flat = database.facts, z.reshape(-1, N_FEATURES)
    assert facts.n_features == N_FEATURES and facts.rows.shape == (20, CONTEXT)
    assert facts.n_tokens == database.n_tokens == (facts.rows != 0).sum()
    for feature in range(N_FEATURES):
        places, values = facts.activations(feature)
        np.testing.assert_array_equal(places, flat[:, feature].nonzero()[0])
        np.testing.assert_allclose(values, flat[places, feature], rtol=2**-11, atol=2**-24 * facts.maxima[feature])
    for row, position in ((0, 0), (3, 5), (19, 7)):
        features, values = facts.at(row, position)
        np.testing.assert_array_equal(features, z[row, position].nonzero()[0])
        for feature, value in zip(features, values, strict=True):  # the same number as by feature
            places, of_feature = facts.activations(feature)
            assert value == of_feature[places == row * CONTEXT + position]
    for token in range(30):
        mass = flat[facts.rows.flatten() == token].sum(0)
        features, values = facts.on_token(token)
        np.testing.assert_array_equal(features, mass.nonzero()[0])
        np.testing.assert_allclose(values, mass[features], rtol=1e-6)


def test_what_is_not_there_is_named(database: Database, tmp_path: Path) -> None:
    for feature in (-1, N_FEATURES):
        with pytest.raises(SaelabError, match=f"no feature {feature} .* 0 to {N_FEATURES - 1}"):
            database.facts.activations(feature)
        with pytest.raises(SaelabError, match=f"no feature {feature} .* 0 to {N_FEATURES - 1}"):
            database.feature(feature)
    for token in (-1, 30):
        with pytest.raises(SaelabError, match=f"no token {token} .* 0 to 29"):
            database.facts.on_token(token)
    for place in ((-1, 0), (20, 0), (0, -1), (0, CONTEXT)):
        with pytest.raises(SaelabError, match="rows are 0 to 19, of 8 tokens"):
            database.at(*place)
    with pytest.raises(SaelabError, match=rf"no feature database in .* `saelab index {tmp_path}` makes it"):
        open_database(tmp_path / "features")


def everything(folder: Path) -> None:
    """Ask all that can be asked of a database."""
    database = open_database(folder)
    for feature in range(database.n_features):
        database.facts.activations(feature)
        database.feature(feature)
    for row, position in np.ndindex(*database.facts.rows.shape):
        database.at(row, position)
    for token in range(len(database.vocabulary)):
        database.facts.on_token(token)
    database.verify()


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "run" / "features"))


@pytest.mark.parametrize("name", [*FACTS, "table.n_active", "table.bottom_logit_tokens"])
def test_a_damaged_array_is_one_error_that_names_it(copy: Path, name: str) -> None:
    path = copy / f"{name}.npy"
    whole, array = path.read_bytes(), np.load(path)

    def contents() -> Iterator[bytes]:
        yield b""
        yield whole[:40]
        yield whole[:-1]
        yield whole + b"\0"
        yield bytes(len(whole))
        yield whole[:128] + bytes([255]) * (len(whole) - 128)
        yield whole[:-1] + bytes([whole[-1] ^ 1])
        yield b"PK\x03\x04" + whole[4:]
        np.save(path, array.astype(f"<{array.dtype.kind}{12 - array.dtype.itemsize}" if array.itemsize > 2 else "<f4"))
        yield path.read_bytes()
        np.save(path, array[None])
        yield path.read_bytes()

    for content in contents():
        path.write_bytes(content)
        with pytest.raises(SaelabError, match=rf"{name}\.npy .*`saelab index {copy.parent}` makes it again"):
            everything(copy)
    path.unlink()
    with pytest.raises(SaelabError, match=rf"{name}\.npy"):
        open_database(copy)


def test_a_damaged_manifest_and_one_of_another_version_are_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    whole = json.loads(path.read_text())
    for content in ("", "[]", "{", "\x00"):
        path.write_text(content)
        with pytest.raises(SaelabError, match=r"manifest\.json"):
            open_database(copy)
    for change, message in (
        ({"version": 3}, "written in version 3 of the format, and this saelab reads version 2"),
        ({"format": "other"}, "is not the manifest of a feature database"),
        ({"rows": "many"}, "is not a whole manifest"),
        ({"rows": 7}, r"tokens\.npy"),
        ({"entries": -1}, r"by_feature\.places\.npy"),
        ({"files": {}}, "is not a whole manifest"),
        ({"files": []}, "is not a whole manifest"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(SaelabError, match=message):
            open_database(copy)
    for key in (*layout.SIZES, *layout.NOT_SIZES):
        path.write_text(json.dumps({name: value for name, value in whole.items() if name != key}))
        with pytest.raises(SaelabError, match=r"manifest\.json is not a whole manifest"):
            open_database(copy)


def test_a_folder_that_a_kill_left_under_its_old_name_is_found(copy: Path) -> None:
    copy.rename(copy.with_name("features.old.tmp"))
    assert open_database(copy).n_features == N_FEATURES


def test_reading_loads_no_torch_and_no_tables(folder: Path) -> None:
    code = (
        "import sys\nfrom saelab.features.database import open_database\n"
        f"database = open_database({str(folder)!r})\ndatabase.feature(4), database.examples(4), database.at(3, 5)\n"
        "print([name for name in ('torch', 'pandas', 'pyarrow', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_feature_is_its_line_of_the_table(database: Database, z: np.ndarray) -> None:
    found, row = database.feature(3), {name: database.table[name][3] for name in COLUMNS}
    assert found != database.feature(3) and len({found, database.feature(3)}) == 2  # its arrays have no one truth value
    values = z[..., 3][z[..., 3] > 0]
    assert (found.index, found.n_active, found.n_tokens) == (3, len(values), database.n_tokens)
    assert found.density == len(values) / database.n_tokens and found.maximum == values.max()
    assert found.mean == pytest.approx(values.mean(), rel=1e-6)
    assert [found.quantiles[share] for share in layout.QUANTILES] == row["quantiles"].tolist()
    assert found.first == divmod(int(row["first_place"]), CONTEXT) and found.last
    assert [each.token for each in found.top_tokens] == [token for token in row["top_tokens"] if token >= 0]
    assert found.top_tokens[0].text == f"w{found.top_tokens[0].token}"
    assert [each.value for each in found.bottom_logits] == row["bottom_logits"].tolist()
    assert [each.feature for each in found.neighbours["decoder"]] == row["decoder_neighbours"][:8].tolist()
    coactive = row["coactive_neighbours"] >= 0
    assert [each.jaccard for each in found.neighbours["coactive"]] == row["coactive_jaccard"][coactive].tolist()
    assert [each.weight for each in found.neurons] == row["neuron_weights"].tolist()
    silent = database.feature(7)
    assert silent.never_active and silent.first is silent.last is None and not silent.top_tokens
