"""Every export has the form that its reader expects, and the values of the database."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from saelab.errors import SaelabError
from saelab.features.database import Database, open_database
from saelab.features.export import circuit_tracer, html, neuronpedia, tables
from saelab.features.layout import COLUMNS
from saelab.features.table import SORTABLE
from tests.app.synthetic_run import CONTEXT, N_ROWS, NEVER_ACTIVE, write_run
from tests.features.test_card import Inventory

FEATURES = [0, 3, NEVER_ACTIVE, 39]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    run = write_run(tmp_path_factory.mktemp("runs") / "whole")
    config = run / "sae" / "cfg.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"metadata": {"dataset_path": "stories.txt"}}))
    return open_database(run / "features")


Schema = type | dict[str, Any] | list[Any] | Callable[[Any], bool]


def check(value: Any, schema: Schema, where: str = "") -> None:
    """Asserts that JSON is as a schema says: a type, keys in order, a list of equal items, or a condition."""
    if isinstance(schema, dict):
        assert isinstance(value, dict) and list(value) == list(schema), where
        for key, part in schema.items():
            check(value[key], part, f"{where}.{key}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for i, item in enumerate(value):
            check(item, schema[0], f"{where}[{i}]")
    elif schema is float:
        assert isinstance(value, int | float) and not isinstance(value, bool), where
    elif isinstance(schema, type):
        assert isinstance(value, schema) and not (schema is int and isinstance(value, bool)), where
    else:
        assert schema(value), f"{where}: {value!r}"


def share(value: Any) -> bool:
    return isinstance(value, float) and 0 <= value <= 1


# SAEDashboard, sae_dashboard/neuronpedia/neuronpedia_dashboard.py: to_dict of batch, feature and activation.
BATCH = {
    "model_id": str,
    "layer": int,
    "sae_set": str,
    "sae_id_suffix": lambda value: value is None or isinstance(value, str),
    "features": [
        {
            "feature_index": int,
            "neuron_alignment_indices": [int],
            "neuron_alignment_values": [float],
            "neuron_alignment_l1": [share],
            "correlated_neurons_indices": [int],
            "correlated_neurons_l1": [float],
            "correlated_neurons_pearson": [float],
            "correlated_features_indices": [int],
            "correlated_features_l1": [float],
            "correlated_features_pearson": [float],
            "neg_str": [str],
            "neg_values": [float],
            "pos_str": [str],
            "pos_values": [float],
            "frac_nonzero": share,
            "freq_hist_data_bar_values": [float],
            "freq_hist_data_bar_heights": [float],
            "logits_hist_data_bar_heights": [float],
            "logits_hist_data_bar_values": [float],
            "n_prompts_total": int,
            "n_tokens_in_prompt": int,
            "dataset": str,
            "decoder_weights_dist": [float],
            "activations": [
                {
                    "bin_min": float,
                    "bin_max": float,
                    "bin_contains": lambda value: value == -1 or share(value),
                    "tokens": [str],
                    "values": [lambda value: value >= 0 and value == round(value, 3)],
                    "qualifying_token_index": int,
                }
            ],
            "vector": [float],
        }
    ],
}
PARALLEL = [
    ("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    ("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    ("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    ("neg_str", "neg_values"),
    ("pos_str", "pos_values"),
    ("freq_hist_data_bar_values", "freq_hist_data_bar_heights"),
    ("logits_hist_data_bar_values", "logits_hist_data_bar_heights"),
]


def test_neuronpedias_batches_have_its_form(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuronpedia, "PER_BATCH", 3)
    neuronpedia.write(database, [*range(2, 8), 39], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"batch-{i}.json" for i in range(3)]
    batches = [json.loads((tmp_path / "out" / f"batch-{i}.json").read_text()) for i in range(3)]
    assert [feature["feature_index"] for batch in batches for feature in batch["features"]] == [*range(2, 8), 39]
    for batch in batches:
        check(batch, BATCH)
        assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("demo", 2, "whole")
        for feature in batch["features"]:
            for columns in PARALLEL:
                assert len({len(feature[name]) for name in columns}) == 1
            for found in feature["activations"]:
                assert len(found["tokens"]) == len(found["values"]) == CONTEXT
                assert 0 <= found["qualifying_token_index"] < CONTEXT
                assert all("\0" not in token for token in found["tokens"])


def at_peak(found: dict[str, Any]) -> float:
    return found["values"][found["qualifying_token_index"]]


@pytest.mark.parametrize("index", FEATURES)
def test_neuronpedias_values_are_the_databases(database: Database, index: int) -> None:
    (found,) = neuronpedia.batch(database, [index])["features"]
    feature, table = database.feature(index), database.table
    assert found["frac_nonzero"] == feature.density and found["dataset"] == "stories.txt"
    assert (found["n_prompts_total"], found["n_tokens_in_prompt"]) == (N_ROWS, CONTEXT)
    assert found["freq_hist_data_bar_heights"] == table["histogram"][index].tolist()
    assert sum(found["freq_hist_data_bar_heights"]) == feature.n_active
    assert sum(found["logits_hist_data_bar_heights"]) == len(database.vocabulary)
    assert found["neuron_alignment_indices"] == table["neurons"][index].tolist()
    for name, column in (
        ("neuron_alignment_values", "neuron_weights"),
        ("pos_values", "top_logits"),
        ("neg_values", "bottom_logits"),
    ):
        np.testing.assert_allclose(found[name], table[column][index], atol=0.0006)
    width = feature.maximum / 50
    np.testing.assert_allclose(found["freq_hist_data_bar_values"], width * (np.arange(50) + 0.5), atol=0.0006)
    top = [each for each in found["activations"] if each["bin_contains"] == -1]
    assert all(each["bin_min"] == -1 and each["bin_max"] == round(feature.maximum, 3) for each in top)
    strengths = [at_peak(each) for each in top]
    assert strengths == sorted(strengths, reverse=True) and strengths[:1] in ([round(feature.maximum, 3)], [])
    groups: dict[tuple[float, float], float] = {}
    for each in found["activations"][len(top) :]:
        assert each["bin_min"] - 0.001 <= at_peak(each) <= each["bin_max"] + 0.001
        groups[each["bin_min"], each["bin_max"]] = each["bin_contains"]
    assert sum(groups.values()) == pytest.approx(0 if feature.never_active else 1)


def test_correlated_features_have_the_correlation_and_the_cosine_of_dense_activations(database: Database) -> None:
    z = np.zeros((N_ROWS * CONTEXT, 40))
    for feature in range(40):
        places, values = database.facts.activations(feature)
        z[places, feature] = values
    z = z[database.facts.rows.flatten() > 0]  # token 0 is special
    with np.errstate(invalid="ignore"):
        pearson = np.corrcoef(z.T)
    cosine = z.T @ z
    cosine /= np.sqrt(np.outer(cosine.diagonal(), cosine.diagonal())) + 1e-30
    for feature in neuronpedia.batch(database, [*range(2, 8), 39])["features"]:
        index, others = feature["feature_index"], feature["correlated_features_indices"]
        np.testing.assert_allclose(feature["correlated_features_pearson"], pearson[index, others], atol=0.0006)
        np.testing.assert_allclose(feature["correlated_features_l1"], cosine[index, others], atol=0.0006)
        near = [neighbour.feature for neighbour in database.feature(index).neighbours["coactive"]]
        assert others == sorted(near, key=lambda other: -pearson[index, other])[:3]


# circuit-tracer, circuit_tracer/frontend/feature_models.py.
DETAILS = {
    "transcoder_id": str,
    "index": int,
    "examples_quantiles": [
        {
            "quantile_name": str,
            "examples": [
                {
                    "tokens_acts_list": [float],
                    "train_token_ind": int,
                    "is_repeated_datapoint": bool,
                    "tokens": [str],
                }
            ],
        }
    ],
    "top_logits": [str],
    "bottom_logits": [str],
    "act_min": float,
    "act_max": float,
    "quantile_values": [float],
    "histogram": [float],
    "activation_frequency": share,
}


def test_circuit_tracers_files_have_its_form_and_its_names(database: Database, tmp_path: Path) -> None:
    circuit_tracer.write(database, FEATURES, tmp_path / "out")
    # Its graphs name feature f of layer l by (l + f) (l + f + 1) / 2 + f.
    names = {index: (2 + index) * (3 + index) // 2 + index for index in FEATURES}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{name}.json" for name in names.values()}
    for index, name in names.items():
        found = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        check(found, DETAILS)
        assert (found["transcoder_id"], found["index"]) == ("whole", index)
        for group in found["examples_quantiles"]:
            for example in group["examples"]:
                assert len(example["tokens"]) == len(example["tokens_acts_list"]) == circuit_tracer.WINDOW
                assert example["tokens_acts_list"][example["train_token_ind"]] > 0


@pytest.mark.parametrize("index", FEATURES)
def test_circuit_tracers_values_are_the_databases(database: Database, index: int) -> None:
    found, feature = circuit_tracer.details(database, index), database.feature(index)
    assert found["activation_frequency"] == feature.density
    assert (found["act_min"], found["act_max"]) == (0, feature.maximum)
    assert found["histogram"] == feature.histogram.tolist()
    assert found["top_logits"] == [token.text for token in feature.top_logits]
    assert found["bottom_logits"] == [token.text for token in feature.bottom_logits]
    values = database.facts.activations(index).values
    assert len(found["quantile_values"]) == (0 if feature.never_active else 100)
    for percent, value in enumerate(found["quantile_values"], start=1):
        assert (values <= value).mean() >= percent / 100 - 1e-9 > (values < value).mean() - 1e-9
    names = [group["quantile_name"] for group in found["examples_quantiles"]]
    assert names == [] if feature.never_active else (names[0] == "Top activations" and len(names) > 5)


def test_no_two_features_have_the_same_name_for_circuit_tracer() -> None:
    assert len({circuit_tracer.paired(a, b) for a in range(60) for b in range(60)}) == 3600


@pytest.mark.parametrize("module", [neuronpedia, circuit_tracer])
def test_a_site_in_no_layer_is_refused_by_formats_that_need_one(tmp_path: Path, module: Any) -> None:
    database = open_database(write_run(tmp_path / "run", site="hook_embed") / "features")
    with pytest.raises(SaelabError, match="hook_embed is in no layer"):
        module.write(database, [0], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_parquet_table_is_the_database(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "AT_ONCE", 16)
    features = [5, 39, *range(30)]
    tables.write_parquet(database, features, tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    assert table.num_rows == 32 and pq.ParquetFile(tmp_path / "t.parquet").num_row_groups == 2
    for name in SORTABLE:
        expected = database.table[name][features]
        found = table[name].to_numpy()
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    for name in [name for name in COLUMNS if name not in SORTABLE]:
        np.testing.assert_array_equal(np.stack(table[name].to_pylist()), database.table[name][features])
    for name in ("top_tokens", "top_logit_tokens", "bottom_logit_tokens"):
        for ids, texts in zip(table[name].to_pylist(), table[f"{name}_text"].to_pylist(), strict=True):
            assert texts == [database.vocabulary.text(token) if token >= 0 else "" for token in ids]
    tables.write_parquet(database, [], tmp_path / "none.parquet")
    assert pq.read_table(tmp_path / "none.parquet").schema == table.schema


def test_the_csv_is_the_parquet_table(database: Database, tmp_path: Path) -> None:
    tables.write_parquet(database, FEATURES, tmp_path / "t.parquet")
    tables.write_csv(database, FEATURES, tmp_path / "t.csv")
    expected = pq.read_table(tmp_path / "t.parquet").to_pylist()
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [list(line) for line in found] == [list(line) for line in expected]
    assert [{name: json.loads(text) for name, text in line.items()} for line in found] == expected
    assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f]", (tmp_path / "t.csv").read_text()), "tokens are escaped"


def test_a_page_has_a_card_for_each_feature_and_loads_nothing(database: Database, tmp_path: Path) -> None:
    html.write(database, FEATURES, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    head, body = page.split("</head>")
    assert "default-src 'none'" in head and "<title>Features of whole</title>" in head
    assert not re.search(r"<script|<link|@import|url\(|https?:", head)
    found = Inventory(body.removesuffix("</html>\n").replace("<body>", "").replace("</body>", ""))
    assert found.elements == {"nav", "a", "section", "h2", "h3", "span", "div", "svg", "rect", "details", "summary"}
    assert found.ids == [f"feature-{index}" for index in FEATURES]
    assert set(found.links) <= {f"#{name}" for name in found.ids}
